"""AGENTS.md says what is there."""

import re
import shlex

import pytest

from tests.conftest import ROOT
from train.cli import check_words
from train.commands import handloop
from train.profiles import PROFILES
from train.run.exits import ExitCode

PAGE = (ROOT / "AGENTS.md").read_text(encoding="utf-8")
CODE = [line for block in re.findall(r"```\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines()]
SPANS = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL))
# in a run folder, on a user's machine, or made by a command of the page
NOT_IN_GIT = {".venv/bin", ".venv", ".env", "previous-N/", "metrics.jsonl", "exit.json"}


def test_its_commands_are_those_of_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    """Every command exists, each of its options is one of its own or of the recipe, and so is each profile."""
    lines = [line.partition("#")[0].rpartition("| ")[2] for line in CODE if "handloop " in line.partition("#")[0]]
    commands = [shlex.split(line)[1:] for line in [*lines, *(span for span in SPANS if span.startswith("handloop "))]]
    assert len(commands) > 12
    for command, *words in commands:
        assert command in handloop.COMMANDS
        with pytest.raises(SystemExit):
            handloop.main([command, "--help"])
        known = capsys.readouterr().out
        for option, value in zip(words, [*words, ""][1:], strict=True):
            if re.match(r"--[a-z]+[.]", option):
                check_words([option, value], (), ("",), "")
            elif option == "--profile":
                assert value in {*PROFILES, "NAME"}
            elif option.startswith("--"):
                assert option in known or option in ("--print-config",), f"{command} {option}"
    assert {words[0] for words in commands} >= set(handloop.COMMANDS) - {"glossary", "sync", "import-config"}


def test_its_paths_and_options_exist() -> None:
    """Files and folders are in the project, options in the configuration, and exit codes are those of the program."""
    scripts = [word for line in CODE for word in line.split() if re.match(r"(?:launch|tests)/", word)]
    paths = [span for span in SPANS if re.fullmatch(r"[\w.-]+(?:/[\w.-]*)*", span) and re.search(r"[/.]", span)]
    paths = [*scripts, *paths, *re.findall(r"\bdocs/\w+\.md", PAGE)]
    assert len(paths) > 20
    assert [path for path in paths if path not in NOT_IN_GIT and not (ROOT / path).exists()] == []
    options = [span.split() for span in SPANS if re.match(r"--[a-z]+[.]", span) and "section" not in span]
    assert len(options) > 2
    for words in options:
        check_words(words, (), ("",), "")
    codes = {int(code) for code in re.findall(r"\b(?:7\d|8\d)\b(?! lines)", PAGE)}
    assert codes
    assert codes <= {int(code) for code in ExitCode}

"""`--help` is one screen, and the rest is a page away."""

import re

import pytest

from tests.unit.test_advice import OPTIONS
from tests.unit.test_cli import refusal
from train.cli import parse
from train.commands import handloop
from train.help_pages import EXAMPLES, FIRST
from train.profiles import PROFILES


def page(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command line with --help prints."""
    with pytest.raises(SystemExit) as leaving:
        parse(words)
    assert not leaving.value.code
    return capsys.readouterr().out


@pytest.mark.parametrize("words", [["--help"], ["-h"], *(["--profile", name, "--help"] for name in PROFILES)])
def test_one_screen(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """At most 30 lines of 80 columns, which name each profile, what is changed most, and every section."""
    lines = page(capsys, *words).splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert all(name in text for name in [*PROFILES, *(option for option, _ in FIRST)])
    assert {option.split(".")[0] for option in OPTIONS} <= set(re.findall(r"\w+", text))
    assert {option for option, _ in FIRST} <= OPTIONS


def test_a_profiles_values_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """With --profile, wherever it stands, help has that profile's values."""
    assert "tokens in a sample at most [1024]" in page(capsys, "--help", "--profile", "4gb")
    assert "--batch.accumulation NUMBER  [16]" in page(capsys, "--profile=4gb", "--help", "batch")


def test_the_examples_are_command_lines() -> None:
    """Each is accepted by the parser."""
    for line in EXAMPLES.splitlines():
        parse(line.partition("handloop train")[2].split())


def test_all_and_a_section(capsys: pytest.CaptureFixture[str]) -> None:
    """`--help all` has every option with its kind, value and meaning in 80 columns; a section has its own alone."""
    whole = page(capsys, "--help", "all")
    assert set(re.findall(r"^  --(\w+\.\w+) ", whole, re.MULTILINE)) == OPTIONS
    assert max(map(len, whole.splitlines())) <= 80
    assert "--model.quantization nf4|int8|none  [nf4]\n      How the frozen linear layers are stored" in whole
    assert "--checkpoint.every epoch|NUMBER  [epoch]" in whole
    data = page(capsys, "--help", "data")
    assert set(re.findall(r"^  --(\w+)\.", data, re.MULTILINE)) == {"data"}
    for words in (["--help", "data.packing"], ["--help=packing"]):
        assert re.findall(r"^  --(\S+)", page(capsys, *words), re.MULTILINE) == ["data.packing"], words
    assert "did you mean data?" in refusal("--help", "dta")


def test_handloop_is_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    """`handloop --help`: at most 30 lines of 80 columns, one for each command."""
    assert handloop.main(["--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 30
    assert max(map(len, lines)) <= 80
    assert set(handloop.COMMANDS) <= {line.split()[0] for line in lines if line.startswith("  ")}

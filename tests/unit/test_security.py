"""What docs/SECURITY.md claims of options, chat templates, data, caches and the terminal."""

import io
import json
import os
import re
import stat
from pathlib import Path
from typing import Any

import datasets
import pytest
from rich.console import Console

from data_tools import chat_template
from data_tools.cache import cache_root
from data_tools.data_sets import HubData
from data_tools.prepare import PrepareSettings, prepare
from data_tools.records import Tally, read_records
from data_tools.report import DataError, Report
from data_tools.sources import survey
from tests.conftest import tokenizer_at
from train.cli import parse
from train.commands.handloop import main as command
from train.deliver.compare import Answer, show_answers
from train.deliver.generation import Completion
from train.run.durable import publish
from train.run.exits import ExitCode, ExitWith
from train.run.redact import redact

GOOD = '{"prompt": "What is AOG?", "response": "Aircraft on ground."}\n'


def test_no_option_trusts_code_or_takes_a_secret() -> None:
    """`--model.trust_remote_code` and `--model.hub_token` do not exist, and their refusal does not print the secret."""
    secret = "hf_" + "a1B2" * 8
    for option in ("--model.trust_remote_code true", f"--model.hub_token {secret}", f"--track.api_key={secret}"):
        with pytest.raises(ExitWith, match="no such option") as caught:
            parse(["--profile", "demo", *option.split()])
        assert caught.value.code == ExitCode.BAD_INPUT
        assert secret not in caught.value.reason
    sections = {name: fields for name, fields in vars(parse(["--profile", "demo"])).items() if name != "profile"}
    names = [f"{section}.{name}" for section, fields in sections.items() for name in vars(fields)]
    assert len(names) > 30
    assert not [name for name in names if re.search(r"trust|remote|secret|password|(token|key)$", name)]


TEMPLATES = {
    "globals": "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "function": "{{ lipsum.__globals__['os'].system('touch CANARY') }}",
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "format": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "change": "{{ messages.append(1) }}",
    "file": "{% include '/etc/passwd' %}",
    "range": "{% for i in range(10 ** 9) %}x{% endfor %}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "division": "{{ 1 / 0 }}",
    "large": "{{ 'x' * 200000 }}",
}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A file with two good rows."""
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD * 2)
    return path


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template_stays_in_the_sandbox(
    name: str, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A template reaches no Python attribute, file or process, and its error names the row."""
    monkeypatch.setattr(chat_template, "MAX_RENDERED_CHARACTERS", 100_000)
    tokenizer = tokenizer_at()
    canary = tmp_path / "canary"
    tokenizer.chat_template = TEMPLATES[name].replace("CANARY", str(canary))
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the chat template (refuses this|renders 200,000 char)"):
        prepare(PrepareSettings((str(rows),)), tokenizer)
    assert not canary.exists()


def test_a_chat_template_that_does_not_end_is_stopped(rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nested loops end at the first row by the time limit, even with on_error skip."""
    monkeypatch.setattr(chat_template, "MAX_TEMPLATE_SECONDS", 0.2)
    tokenizer = tokenizer_at()
    tokenizer.chat_template = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the chat template did not end within 0\.2 s"):
        prepare(PrepareSettings((str(rows),), on_error="skip"), tokenizer)


def test_scripts_in_data_are_never_executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set with a script owner/name/name.py is read as a folder of rows, and refused as a hub data set."""
    folder, canary = tmp_path / "owner" / "name", tmp_path / "canary"
    folder.mkdir(parents=True)
    (folder / "name.py").write_text(f"open({str(canary)!r}, 'w')\n")
    (folder / "data.jsonl").write_text(GOOD)
    assert len(list(read_records(survey([str(folder)], "auto").sources, Tally.empty()))) == 1
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    report = Report()
    assert list(HubData("owner/name").rows(report.add)) == []
    assert "scripts are no longer supported" in report.lines[0]
    assert not canary.exists()


def test_a_folder_does_not_lead_out_of_itself(tmp_path: Path) -> None:
    """A link to a file outside the folder is refused; a link within it is read."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "private.txt").write_text("a key")
    (folder / "one.txt").write_text("a text")
    (folder / "two.txt").symlink_to(folder / "one.txt")
    assert len(survey([str(folder)], "auto").sources) == 2
    (folder / "three.txt").symlink_to(tmp_path / "private.txt")
    with pytest.raises(DataError, match=r"1 problem(.|\n)*three\.txt: is a link to a file outside the folder"):
        survey([str(folder)], "auto")


def test_checkpoints_and_prepared_data_are_for_their_owner_alone(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Folders of checkpoints, final/ and the cache are 0700 under any umask."""
    before = os.umask(0)
    try:
        monkeypatch.setenv("HANDLOOP_CACHE", str(tmp_path / "cache"))
        with publish(tmp_path / "checkpoints" / "step-0000000001") as folder:
            (folder / "file").touch()
        prepared = prepare(PrepareSettings((str(rows),)), tokenizer_at())
    finally:
        os.umask(before)
    for folder in (tmp_path / "checkpoints" / "step-0000000001", next(cache_root().glob(f"{prepared.fingerprint}-*"))):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700, folder


def test_a_damaged_cache_is_made_again(rows: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A cache that is truncated, has other columns or is not JSON is replaced by the same samples."""
    monkeypatch.setenv("HANDLOOP_CACHE", str(tmp_path / "cache"))
    settings, tokenizer = PrepareSettings((str(rows),)), tokenizer_at()
    prepared = prepare(settings, tokenizer)
    content, folder = prepared.dataset.to_list(), next(cache_root().glob(f"{prepared.fingerprint}-*"))
    other = tmp_path / "other"
    datasets.Dataset.from_dict({"path": ["/etc/passwd"] * 2}).save_to_disk(str(other))
    samples = (folder / "samples.arrow").read_bytes()
    damages: dict[str, bytes] = {"samples.arrow": samples[: len(samples) // 2], "statistics.json": b"[]"}
    for name, damage in (*damages.items(), ("samples.arrow", next(other.glob("*.arrow")).read_bytes())):
        (folder / name).write_bytes(damage)
        assert prepare(settings, tokenizer).dataset.to_list() == content


TITLE, CLEAR, C1, TURN = "\x1b]0;owned\x07", "\x1b[2J", "\x9b31m", "\u202e"
HOSTILE = TITLE + CLEAR + C1 + TURN
HOSTILE_FILES: dict[str, Any] = {
    "content": {"prompt": f"why {HOSTILE}", "response": f"because {HOSTILE}"},
    "field names": {f"q{HOSTILE}": "a", f"r{HOSTILE}": "b"},
    "an unread field": {"prompt": "a", "response": "b", f"x{HOSTILE}": 1},
    "a role": {"messages": [{"role": HOSTILE, "content": "a"}]},
    "a repeated field": GOOD.replace("response", f"prompt{HOSTILE}").replace("prompt\"", f"prompt{HOSTILE}\""),
    "broken": "{" + HOSTILE,
}  # fmt: skip


@pytest.mark.parametrize("words", [["preview"], ["audit"], ["audit", "--data.on_error", "skip"]], ids=" ".join)
@pytest.mark.parametrize("name", HOSTILE_FILES)
def test_data_cannot_steer_the_terminal(name: str, words: list[str], tmp_path: Path, capfd: Any) -> None:
    """Escape sequences in contents, fields, roles and file names are printed only in escaped form."""
    content = HOSTILE_FILES[name]
    path = tmp_path / f"rows{HOSTILE.replace('/', '')}.jsonl"
    path.write_text((content if isinstance(content, str) else json.dumps(content)) + "\n" + GOOD)
    code = command([*words, "--profile", "demo", "--data.path", str(path), "--data.validation_fraction", "0"])
    said = "".join(capfd.readouterr())
    assert code in (0, ExitCode.BAD_INPUT)
    assert "owned" in said
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", said)


def test_answers_are_shown_as_they_are() -> None:
    """The table prints brackets literally, and its cells cannot control the terminal."""
    written = io.StringIO()
    console = Console(file=written, width=200)
    answer = f"see [/etc/hosts] [bold]list[0] {HOSTILE}"
    show_answers(console, "answers", [Answer(answer, answer, Completion(answer, True, 1), Completion(answer, True, 1))])
    said = written.getvalue()
    assert said.count("see [/etc/hosts] [bold]list[0] ") == 3
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e]", said)
    assert redact(f"one\ntwo {TITLE}") == "one\ntwo \\x1b]0;owned\\x07"

"""The run folder: who spells its names, what `--run.resume never` moves, which ids and attempts it remembers."""

import ast
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from train.run import attempts as attempts_module
from train.run import versions as versions_module
from train.run.attempts import Attempt, AttemptLog, plain, read_attempts
from train.run.exits import ExitCode, ExitWith
from train.run.folder import OURS, RunFolder, read_object
from train.run.json_lines import append_line, read_lines
from train.run.versions import code_version

NAMES_ALSO_ELSEWHERE = {"config.json": "train/models/"}  # the base's folder has one too


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def strings(path: Path) -> Iterator[str]:
    """The string constants of a module, without docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def test_no_other_module_spells_a_name_of_the_folder() -> None:
    """Not as a string of its own, nor a name with a suffix or a dot inside another: they ask RunFolder."""
    unmistakable = {name for name in OURS - {*NAMES_ALSO_ELSEWHERE} if "." in name} | {"nonfinite-step-", "previous-"}
    assert {"run.json", "metrics.jsonl", "final", "wandb", ".lock"} <= OURS
    seen = 0
    for path in sorted((ROOT / "train").rglob("*.py")):
        if path == ROOT / "train" / "run" / "folder.py":
            continue
        for text in strings(path):
            seen += 1
            for name in OURS | unmistakable:
                place = NAMES_ALSO_ELSEWHERE.get(name)
                if place and place in str(path):
                    continue
                assert text != name, f"{path} spells {name}"
                is_inside = name in unmistakable and re.search(rf"(?<![\w-]){re.escape(name)}", text)
                assert not is_inside, f"{path}: {text!r} spells {name}"
    assert seen > 1000


def test_every_name_is_in_the_folder(folder: RunFolder) -> None:
    """Each entry is directly in the folder, and no two are the same."""
    paths = [getattr(folder, name) for name, entry in vars(RunFolder).items() if type(entry).__name__ == "Entry"]
    assert {path.parent for path in paths} == {folder.path}
    assert len(paths) == len(OURS) >= 13


def fill(folder: RunFolder, names: list[str]) -> None:
    """Files with their name as content; one that ends in / is a folder with a file."""
    for name in names:
        path = folder.path / name
        if name.endswith("/"):
            path.mkdir(parents=True)
            path = path / "file"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def names_in(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


def test_everything_of_a_run_moves_and_nothing_else(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """All that a run can write, also what a kill left half-written; not what a user has put beside it."""
    listed = ["run.json", "config.json", "plan.json", "attempts.jsonl", "metrics.jsonl", "exit.json", "answers.json"]
    listed += ["answers_held_out.json", "nonfinite-step-3.json", "checkpoints/", "final/", "wandb/", ".heartbeats/"]
    listed += [".tmp-final-0123abcd/", ".run.json.tmp-17"]
    stays = [".lock", "previous-1/", "previous-9/", "log.txt", "rows.jsonl", "texts/", "nonfinite-step-x.json"]
    fill(folder, [*listed, *stays])
    assert {name.rstrip("/") for name in listed} >= OURS - {".lock"}
    folder.archive()
    assert names_in(folder.path) == {name.rstrip("/") for name in stays} | {"previous-10"}
    assert names_in(folder.path / "previous-10") == {name.rstrip("/") for name in listed}
    assert (folder.path / "previous-10" / "wandb" / "file").read_text() == "wandb/"
    assert f"the earlier run is kept in {folder.path / 'previous-10'}\n" in capsys.readouterr().out


@pytest.mark.parametrize("names", [[], ["run.json", ".lock"], ["notes.txt", "some/"], [".lock", "previous-1/"]])
def test_a_folder_without_a_run_is_left_alone(names: list[str], folder: RunFolder) -> None:
    """Fresh, locked, named by an earlier start that did nothing, or a user's: nothing moves, nothing is said."""
    folder.path.mkdir()
    fill(folder, names)
    folder.checkpoints.mkdir()
    before = names_in(folder.path)
    folder.archive()
    assert names_in(folder.path) == before


def test_a_second_job_is_refused(folder: RunFolder) -> None:
    """The lock holds, and a start removes what an earlier one said of its end."""
    fill(folder, ["exit.json", ".heartbeats/"])
    with folder.locked():
        assert names_in(folder.path) == {".lock"}
        with pytest.raises(ExitWith) as caught, folder.locked():
            pass
        assert caught.value.code == ExitCode.BAD_INPUT


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"run_uid": 7}', '{"run_uid": ""}', "[" * 5000])
def test_an_id_that_is_lost_is_made(content: str, folder: RunFolder) -> None:
    """Rubbish, or an id that is none: made once, then kept."""
    fill(folder, ["run.json"])
    folder.identity.write_text(content)
    assert folder.identifier("run_uid", lambda: "made") == "made"
    assert folder.identifier("run_uid", lambda: "again") == "made"


def test_ids_do_not_cost_each_other(folder: RunFolder) -> None:
    """run.json without a tracker's id keeps the run's, and what a later version may have written there."""
    fill(folder, ["run.json"])
    folder.identity.write_text('{"run_uid": "u", "else": [1]}')
    assert folder.identifier("wandb_id", lambda: "w") == "w"
    assert read_object(folder.identity) == {"run_uid": "u", "else": [1], "wandb_id": "w"}
    assert folder.identifier("run_uid", lambda: "other") == "u"


def begun(folder: RunFolder, step: int) -> AttemptLog:
    folder.path.mkdir(exist_ok=True)
    log = AttemptLog(folder)
    log.begin({"run": {"dir": "x"}}, {"engine": "fused"}, {"from_step": step})
    return log


def test_attempts_are_numbered_and_end(folder: RunFolder) -> None:
    """A finished one, a killed one, one that goes on: in order, each with its own start and end."""
    assert read_attempts(folder) == []
    begun(folder, 0).end(ExitCode.INTERRUPTED, "stopped", 4)
    begun(folder, 4)
    begun(folder, 4).end(ExitCode.FINISHED, "finished", 6)
    first, killed, last = read_attempts(folder)
    assert [a.number for a in (first, killed, last)] == [1, 2, 3]
    assert [a.start["from_step"] for a in (first, killed, last)] == [0, 4, 4]
    assert first.end is not None
    assert {"code": 75, "name": "interrupted", "reason": "stopped", "last_step": 4}.items() <= first.end.items()
    assert killed.end is None
    assert last.end is not None
    assert last.end["time"] >= last.start["time"] > "2020-"
    assert read_object(folder.plan) == {"engine": "fused"}


def test_an_attempt_that_never_began_has_no_end(folder: RunFolder) -> None:
    """Bad data ends a start before there is a plan: exit.json tells of it, no line is put on a killed attempt."""
    begun(folder, 0)
    AttemptLog(folder).end(ExitCode.BAD_INPUT, "bad", 0)
    assert [attempt.end for attempt in read_attempts(folder)] == [None]


@pytest.mark.parametrize("length", [1, 20, 60])
def test_a_torn_line_costs_itself_alone(length: int, folder: RunFolder) -> None:
    """Killed within a line: readers leave it out, the next attempt writes on a new line."""
    begun(folder, 0)
    whole = folder.attempts.read_bytes()
    folder.attempts.write_bytes(whole + whole[:length])
    assert [attempt.number for attempt in read_attempts(folder)] == [1]
    begun(folder, 2).end(ExitCode.FINISHED, "finished", 3)
    assert [(a.number, a.end is not None) for a in read_attempts(folder)] == [(1, False), (2, True)]
    assert read_attempts(folder)[1].start["from_step"] == 2


def test_lines_that_are_none_of_ours(folder: RunFolder) -> None:
    """Other JSON, other events and bytes that are no text do not reach a reader."""
    begun(folder, 0)
    with folder.attempts.open("ab") as file:
        file.write(
            b'[1]\n7\n{"attempt": "x", "event": "start"}\n{"attempt": 2, "event": "?"}\n\xff\xfe\n' + b"[" * 5000
        )
    assert [attempt.number for attempt in read_attempts(folder)] == [1]
    assert isinstance(read_attempts(folder)[0], Attempt)


def test_a_full_disk_is_said_once(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """None of the records can be written: nothing is raised, one line, and later records are written again."""

    def full(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(attempts_module, "write_atomically", full)
        patch.setattr(attempts_module, "append_line", full)
        log = begun(folder, 0)
        log.end(ExitCode.FINISHED, "finished", 6)
    assert capsys.readouterr().err.count("No space left on device") == 1
    assert not folder.attempts.exists()
    log.end(ExitCode.FINISHED, "finished", 6)
    (attempt,) = read_attempts(folder)
    assert attempt.start == {}
    assert attempt.end is not None


def test_half_a_write_is_completed_or_left_as_a_torn_line(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write of a few bytes is gone on with; where the disk is full after it, the next line is whole."""
    folder.path.mkdir()
    real, limits = os.write, [3, 0]

    def write(descriptor: int, content: bytes) -> int:
        limit = limits.pop(0) if limits else len(content)
        if not limit:
            raise OSError(28, "No space left on device")
        return real(descriptor, content[:limit])

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(OSError, match="No space"):
        append_line(folder.attempts, {"a": 1})
    limits[:] = [2]
    append_line(folder.attempts, {"b": 2})
    assert read_lines(folder.attempts) == [{"b": 2}]


def test_secrets_are_taken_out(folder: RunFolder) -> None:
    """Wherever they stand in the records: values, lists, names of fields, the reason of the end."""
    token, url = "hf_" + "Canary" * 5, "https://someone:c4nary@host/x"
    folder.path.mkdir()
    log = AttemptLog(folder)
    log.begin({"data": {"path": (url, Path("a"))}}, {"reason": token}, {"data": {"ignored": {token: 1}}})
    log.end(ExitCode.BAD_INPUT, f"cannot read {url}", 0)
    for path in (folder.config, folder.plan, folder.attempts):
        text = path.read_text()
        assert "anary" not in text
        assert "[secret]" in text


def test_values_are_plain_json() -> None:
    """What JSON has no word for is text; numbers and truth stay what they are."""
    values = {"norm": float("inf"), "path": Path("a/b"), "words": ("a", 1), "flag": True, "none": None, "x": 0.5}
    expected = {"norm": "inf", "path": "a/b", "words": ["a", 1], "flag": True, "none": None, "x": 0.5}
    assert plain(values) == expected
    assert json.loads(json.dumps(plain(values), allow_nan=False)) == expected


def test_the_code_version_says_when_files_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit in a checkout, -dirty behind it when a tracked file has changed; elsewhere no commit of others."""

    def git(*words: str) -> str:
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.invalid"]
        done = subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "--quiet")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "--quiet", "-m", "one")
    monkeypatch.setattr(versions_module, "ROOT", tmp_path)
    commit = git("rev-parse", "--short=12", "HEAD")
    assert code_version() == commit
    (tmp_path / "file").write_text("2")
    assert code_version() == f"{commit}-dirty"
    (tmp_path / "below").mkdir()
    monkeypatch.setattr(versions_module, "ROOT", tmp_path / "below")
    assert commit not in code_version()

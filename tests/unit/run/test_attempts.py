"""What the run folder keeps of each attempt, through kills, full disks and files that are none of ours."""

import fcntl
import os
import threading
from pathlib import Path

import pytest

from tests.unit.run.folders import fill, names_in
from train.run import attempts as attempts_module
from train.run.attempts import Attempt, AttemptLog, read_attempts
from train.run.exits import ExitCode
from train.run.folder import RunFolder, read_object
from train.run.json_lines import append_line, read_lines

PLAN = {"engine": "fused", "summary": "all blocks"}


def begun(folder: RunFolder, step: int) -> AttemptLog:
    folder.path.mkdir(exist_ok=True)
    log = AttemptLog(folder)
    log.begin({"profile": "demo", "run": {"dir": "x"}}, PLAN, {"from_step": step})
    return log


def test_attempts_are_numbered_and_end(folder: RunFolder) -> None:
    """A finished one, a killed one, one that goes on: in order, each with its own start and end."""
    assert read_attempts(folder) == []
    log = begun(folder, 0)
    folder.metrics.write_text('{"step": 3}\n{"step": 4}\n')
    log.end(ExitCode.INTERRUPTED, "stopped")
    begun(folder, 4)
    folder.metrics.unlink()  # a checkpoint of another folder goes on here
    begun(folder, 4).end(ExitCode.FINISHED, "finished")
    first, killed, last = read_attempts(folder)
    assert [a.number for a in (first, killed, last)] == [1, 2, 3]
    assert [a.start["from_step"] for a in (first, killed, last)] == [0, 4, 4]
    assert first.end is not None
    assert {"code": 75, "name": "interrupted", "reason": "stopped", "last_step": 4}.items() <= first.end.items()
    assert killed.end is None
    assert last.end is not None
    assert last.end["time"] >= last.start["time"] > "2020-"
    assert last.end["last_step"] == 4
    assert read_object(folder.plan) == PLAN


def test_an_attempt_that_never_began_has_no_end(folder: RunFolder) -> None:
    """Bad data ends a start before there is a plan: exit.json tells of it, no line is put on a killed attempt."""
    begun(folder, 0)
    AttemptLog(folder).end(ExitCode.BAD_INPUT, "bad")
    assert [attempt.end for attempt in read_attempts(folder)] == [None]


def test_an_attempt_that_was_killed_long_ago_is_not_ended(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process fails before the first one has begun an attempt: the killed one before stays without an end."""
    monkeypatch.setattr(attempts_module, "_now", lambda: "2020-01-01T00:00:00+00:00")
    begun(folder, 0)
    monkeypatch.undo()
    as_second(monkeypatch)
    AttemptLog(folder).end(ExitCode.DEFECT, "while loading")
    assert [attempt.end for attempt in read_attempts(folder)] == [None]


def as_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes this the second of two processes."""
    for name, value in {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 1}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")


def test_a_process_that_is_left_ends_the_attempt_of_the_first(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first process has died: another one writes exit.json, and the end of what the first had begun."""
    begun(folder, 0).end(ExitCode.INTERRUPTED, "stopped")
    other = AttemptLog(folder)
    begun(folder, 2)
    as_second(monkeypatch)
    other.end(ExitCode.PEER_FAILURE, "another process died")
    codes = [attempt.end and attempt.end["code"] for attempt in read_attempts(folder)]
    assert codes == [75, 81]


@pytest.mark.parametrize(
    ("first", "second", "lines"), [(70, 81, [70]), (70, 78, [70]), (78, 78, [78]), (81, 78, [81, 78]), (81, 81, [81])]
)
def test_an_attempt_has_one_end(
    first: int, second: int, lines: list[int], folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two processes, or of one that is ended again; where the consequence was written first, its cause counts."""
    other = AttemptLog(folder)
    mine = begun(folder, 0)
    for log in (mine, mine, other):
        log.end(ExitCode(first), "one")
    as_second(monkeypatch)
    for log in (other, mine, other):
        log.end(ExitCode(second), "two")
    found = [row["code"] for row in read_lines(folder.attempts) if row["event"] == "end"]
    assert found == lines
    (attempt,) = read_attempts(folder)
    assert attempt.end is not None
    assert attempt.end["code"] == lines[-1]


def test_two_processes_that_end_at_once_write_one_end(folder: RunFolder) -> None:
    """Whether there is one is looked up and written while no other process does so."""
    logs = [begun(folder, 0), AttemptLog(folder)]
    logs[1].take_over(read_attempts(folder)[0])
    threads = [threading.Thread(target=log.end, args=(ExitCode.DEFECT, "a bug")) for log in logs]
    with folder.attempts.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        for thread in threads:
            thread.start()
        threads[0].join(0.3)
        assert read_attempts(folder)[0].end is None
    for thread in threads:
        thread.join()
    assert [row["event"] for row in read_lines(folder.attempts)] == ["start", "end"]


def test_a_configuration_of_something_else_stays(
    folder: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the run folder is a model's: its config.json is not overwritten, nor moved, nor taken for a run."""
    fill(folder, ["config.json", "plan.json"])
    folder.config.write_text('{"model_type": "llama"}')
    folder.archive()
    assert names_in(folder.path) == {"config.json", "plan.json"}
    begun(folder, 0).end(ExitCode.FINISHED, "finished")
    assert folder.config.read_text() == '{"model_type": "llama"}'
    assert "config.json is no record of a run and stays as it is" in capsys.readouterr().err
    folder.archive()
    assert names_in(folder.path) == {"config.json", "plan.json", "previous-1"}
    assert names_in(folder.path / "previous-1") == {"attempts.jsonl"}


@pytest.mark.parametrize("length", [1, 20, 60])
def test_a_torn_line_costs_itself_alone(length: int, folder: RunFolder) -> None:
    """Killed within a line: readers leave it out, the next attempt writes on a new line."""
    begun(folder, 0)
    whole = folder.attempts.read_bytes()
    folder.attempts.write_bytes(whole + whole[:length])
    assert [attempt.number for attempt in read_attempts(folder)] == [1]
    begun(folder, 2).end(ExitCode.FINISHED, "finished")
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
        log.end(ExitCode.FINISHED, "finished")
    assert capsys.readouterr().err.count("No space left on device") == 1
    assert not folder.attempts.exists()
    log.end(ExitCode.FINISHED, "finished")
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
    log.end(ExitCode.BAD_INPUT, f"cannot read {url}")
    for path in (folder.config, folder.plan, folder.attempts):
        text = path.read_text()
        assert "anary" not in text
        assert "[secret]" in text


def test_a_lock_that_is_held_for_ever_delays_an_end(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """By seconds: its holder may be stopped."""
    monkeypatch.setattr(attempts_module, "LOCK_SECONDS", 0.1)
    log = begun(folder, 0)
    with folder.attempts.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        log.end(ExitCode.DEFECT, "a bug")
    assert [row["event"] for row in read_lines(folder.attempts)] == ["start", "end"]

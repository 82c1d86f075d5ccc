"""Listeners that hang, raise or fall behind, and what the run is told of them."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.unit.track.listeners import Fake, Minimal
from train.track import isolated
from train.track.isolated import Isolated, Listener

METHODS = ("start", "catch_up", "log", "table", "finish")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolated, "PATIENCE_SECONDS", 0.3)


def a_whole_run(listener: Listener, metrics: Path, steps: int = 3) -> Isolated:
    """Rows, a table and the end, as training would tell them; an exception would reach training."""
    telling = Isolated(listener, "uid", metrics)
    for step in range(1, steps + 1):
        telling.log({"step": step, "train/loss": 0.5})
    telling.table("answers", [{"question": "q"}])
    telling.request_finish()
    telling.finish()
    return telling


def test_everything_arrives_in_order(metrics: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rows, then the table; what the listener says at its end is printed; it is not abandoned."""
    fake = Fake()
    a_whole_run(fake, metrics)
    assert fake.calls == ["start", "catch_up", "log", "log", "log", "table", "finish"]
    assert [row["step"] for row in fake.rows[:3]] == [1, 2, 3]
    assert fake.rows[3] == ("answers", [{"question": "q"}])
    assert capsys.readouterr().out == "Fake is at rest\n"


def test_a_listener_needs_four_names(metrics: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """name, start, log and finish are enough: it catches up by log, and leaves tables out."""
    metrics.write_text('{"step": 1}\n')
    minimal = Minimal()
    a_whole_run(minimal, metrics)
    assert [row["step"] for row in minimal.rows] == [1, 2, 3]
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("has", [-1, 0, 3, 5, 9])
def test_missing_steps_come_out_of_the_metrics_file(has: int, metrics: Path) -> None:
    """Killed before six rows were delivered: each step that it lacks arrives once, step 0 too, and no list does."""
    rows = [{"step": step, "train/loss": step / 2, "data/sample_ids": [step]} for step in range(6)]
    metrics.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 6, "tr')
    fake = Fake(has)
    telling = Isolated(fake, "uid", metrics)
    for step in range(4, 11):  # the run was resumed behind step 3
        telling.log({"step": step, "train/loss": step / 2, "data/sample_ids": [step]})
    telling.request_finish()
    telling.finish()
    assert fake.rows == [{"step": step, "train/loss": step / 2} for step in range(has + 1, 11)]
    assert telling.failure == ""


def fail() -> None:
    raise RuntimeError("a bad day with https://someone:c4nary@host/\nin two lines")


@pytest.mark.parametrize("method", METHODS)
def test_what_raises_is_said_once(method: str, metrics: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In whichever method: one line without secrets, nothing is told it any more, and it is abandoned at the end."""
    fake = Fake(acts={method: fail})
    telling = Isolated(fake, "uid", metrics)
    telling.log({"step": 1})
    telling.table("answers", [])
    if method == "finish":
        telling.request_finish()
    telling.thread.join(30)
    assert not telling.thread.is_alive()
    calls = list(fake.calls)
    assert calls[-1] == method
    for step in (2, 3):
        telling.log({"step": step})
    telling.request_finish()
    telling.finish()
    assert fake.calls == [*calls, "abandon"]
    reason = "stopped recording (RuntimeError: a bad day with https://[secret]@host/)"
    assert capsys.readouterr().out == f"Fake: {reason}; all metrics are in {metrics}\n"


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("method", METHODS)
def test_what_hangs_is_waited_for_a_little(
    method: str, metrics: Path, hang: Callable[[], object], capsys: pytest.CaptureFixture[str]
) -> None:
    """In whichever method: no call of training's takes time but the last, which takes as long as patience lasts."""
    fake = Fake(acts={method: hang})
    began = time.monotonic()
    telling = a_whole_run(fake, metrics)
    assert 0.3 <= time.monotonic() - began < 5
    assert fake.calls[-2:] == [method, "abandon"]
    assert telling.thread.is_alive()
    assert capsys.readouterr().out == f"Fake: no answer within 0 s; all metrics are in {metrics}\n"


def test_only_numbers_leave_the_run(metrics: Path) -> None:
    """A warning may name a file of the user's, sample ids are a list: both stay in metrics.jsonl, also in a replay."""
    row = {"step": 1, "train/loss": 0.5, "warning": "step 1 is skipped: /home/me/rows.jsonl:3", "data/sample_ids": [7]}
    metrics.write_text(json.dumps(row) + "\n")
    fake = Fake()
    telling = Isolated(fake, "uid", metrics)
    telling.log({**row, "step": 2})
    telling.request_finish()
    telling.finish()
    assert fake.rows == [{"step": 1, "train/loss": 0.5}, {"step": 2, "train/loss": 0.5}]


def test_a_slow_listener_is_waited_for(metrics: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All of it arrives where patience is long enough."""
    fake = Fake(acts={"log": lambda: time.sleep(0.1), "finish": lambda: time.sleep(0.1)})
    a_whole_run(fake, metrics)
    assert len(fake.rows) == 4
    assert capsys.readouterr().out == "Fake is at rest\n"


def test_a_full_queue_is_a_failure(
    metrics: Path, hang: Callable[[], object], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More rows behind than the queue holds: said once, memory stays bounded, nobody waits at the end."""
    monkeypatch.setattr(isolated, "QUEUE_SIZE", 3)
    fake = Fake(acts={"start": hang})
    began = time.monotonic()
    telling = a_whole_run(fake, metrics, steps=50)
    assert time.monotonic() - began < 5
    assert telling.messages.qsize() == 3
    reason = "it is more than 3 messages behind"
    assert capsys.readouterr().out == f"Fake: {reason}; all metrics are in {metrics}\n"
    assert fake.calls == ["start", "abandon"]


def test_an_exit_in_the_thread_is_a_failure_too(metrics: Path) -> None:
    """Also an error without a message, and one that is no Exception."""

    def leave() -> None:
        raise SystemExit

    telling = a_whole_run(Fake(acts={"log": leave}), metrics)
    assert telling.failure == "stopped recording (SystemExit: without a message)"


def test_metrics_that_cannot_be_read_are_a_failure(tmp_path: Path) -> None:
    """The file is gone: the listener fails, the run does not."""
    telling = a_whole_run(Fake(), tmp_path / "none")
    assert "FileNotFoundError" in telling.failure


def test_a_terminal_that_is_gone_does_not_keep_the_service_alive(
    metrics: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The failure cannot be said; the service is ended all the same."""

    def gone(*words: object, **options: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("builtins.print", gone)
    fake = Fake(acts={"log": fail})
    a_whole_run(fake, metrics)
    assert fake.calls[-1] == "abandon"


@pytest.mark.parametrize("has", [-1, 1, 2])
def test_answers_of_validations_come_once_and_behind_their_step(has: int, metrics: Path, tmp_path: Path) -> None:
    """Those of missing steps are read from their file; what training tells of the same steps is not told again."""
    metrics.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(5)))
    answers = tmp_path / "validation_answers.jsonl"
    answers.write_text("".join(json.dumps({"step": step, "now": "x"}) + "\n" for step in (0, 2, 2, 4)))
    fake = Fake(has)
    telling = Isolated(fake, "uid", metrics, answers)
    for step in range(5, 8):
        telling.table("validation", [{"step": step - 1, "now": "x"}])
        telling.log({"step": step})
    telling.request_finish()
    telling.finish()
    tables = [row for row in fake.rows if isinstance(row, tuple)]
    assert [(name, rows[0]["step"], len(rows)) for name, rows in tables if rows[0]["step"] > has] == [
        (name, step, 1 + (step == 2)) for name, step in (("validation", s) for s in (0, 2, 4, 5, 6)) if step > has
    ]
    assert fake.rows.index({"step": 4}) + 1 == fake.rows.index(("validation", [{"step": 4, "now": "x"}]))
    assert len(tables) == len([step for step in (0, 2, 4, 5, 6) if step > has])


@pytest.mark.usefixtures("impatient")
def test_an_upload_that_was_asked_for_is_waited_for(metrics: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The listener's own seconds come on top of the patience."""

    class Uploading(Fake):
        def extra_seconds(self) -> float:
            return 30.0

    a_whole_run(Uploading(acts={"finish": lambda: time.sleep(0.8)}), metrics)
    assert capsys.readouterr().out == "Fake is at rest\n"

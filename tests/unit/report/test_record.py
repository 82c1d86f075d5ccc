"""Run folders are read whatever is missing in them or damaged."""

import fcntl
import json
import random
import warnings
from pathlib import Path

import pytest

from tests.run_folders import damage, row, write, write_answers, write_lines, write_run
from train.report import page
from train.report.outcome import ending_line
from train.report.page import page_of, page_of_several, render
from train.report.record import is_run, read_run
from train.report.state import State
from train.report.summary import summary_of
from train.run.folder import RunFolder


def test_what_a_folder_says(tmp_path: Path) -> None:
    """Steps, resumes, skipped steps, checkpoints and time of a whole folder; nothing is complained of."""
    run = read_run(write_run(tmp_path / "run", num_steps=120))
    assert (run.state, run.last_step, run.total_steps, run.notes) == (State.FINISHED, 120, 120, [])
    assert (run.resumes, run.skipped, run.saved) == ([60], [60], [50, 100])
    assert run.seconds == 600  # five minutes each


def test_checkpoints_of_older_runs_are_found(tmp_path: Path) -> None:
    """Rows that only have the time of saving stand for the step before; folders of checkpoints count, too."""
    rows = [row(step) | ({"perf/save_seconds": 0.1} if step == 41 else {}) for step in range(1, 60)]
    write_lines(tmp_path / "metrics.jsonl", rows)
    (tmp_path / "checkpoints" / "step-0000000059").mkdir(parents=True)
    (tmp_path / "checkpoints" / "quarantine-step-0000000050-abcd").mkdir()
    assert read_run(tmp_path).saved == [40, 59]


@pytest.mark.parametrize(
    ("exit_code", "ends", "state"),
    [
        (0, True, State.FINISHED),
        (75, True, State.STOPPED),
        (83, True, State.KILLED),
        (79, True, State.FAILED),
        (None, True, State.FINISHED),  # exit.json is lost, attempts.jsonl says the same
        (None, False, State.KILLED),
    ],
)
def test_states(tmp_path: Path, exit_code: int | None, ends: bool, state: State) -> None:
    """The state is that of exit.json, or of the last attempt's end; without either the run was killed."""
    folder = RunFolder(write_run(tmp_path))
    folder.exit.unlink()
    if exit_code is not None:
        write(folder.exit, {"code": exit_code, "name": "x", "reason": "why"})
    if not ends:
        folder.attempts.write_text("\n".join(folder.attempts.read_text().splitlines()[:3]))
    assert read_run(tmp_path).state == state


@pytest.mark.parametrize("code", [77, 78, 80])
def test_a_refused_command_leaves_the_run_as_it_was(tmp_path: Path, code: int) -> None:
    """A mistyped option overwrites exit.json; what was trained is finished all the same, and the refusal is noted."""
    folder = RunFolder(write_run(tmp_path))
    write(folder.exit, {"code": code, "name": "x", "reason": "no such file\nlook there"})
    run = read_run(tmp_path)
    assert (run.state, run.ending["code"]) == (State.FINISHED, 0)
    assert run.notes == [f"a later command was refused ({code}): no such file"]
    folder.attempts.unlink()  # nothing was ever trained
    assert read_run(tmp_path).state == State.FAILED


def test_a_running_run_is_known_by_its_lock(tmp_path: Path) -> None:
    """While the lock is held the run is running, whatever end is recorded; whoever looks does not take it."""
    folder = RunFolder(write_run(tmp_path))
    with folder.locked():
        assert read_run(tmp_path).state == State.RUNNING
        assert ending_line(read_run(tmp_path)).startswith("Running: step 120 of 120")
    with folder.lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # raises if it were held
    assert read_run(tmp_path).state == State.FINISHED


def test_a_torn_row_is_left_out_and_said(tmp_path: Path) -> None:
    """Half a last line costs that line alone; rows without a step of their own are counted."""
    metrics = RunFolder(write_run(tmp_path)).metrics
    with metrics.open("a") as file:
        file.write('{"step": 120, "train/loss": 1.0}\n{"no step": 1}\n{"step": 121, "train/lo')
    run = read_run(tmp_path)
    assert run.last_step == 120
    assert run.rows[-1]["train/loss"] == 1.0  # the later one of two
    assert "1 of 124 lines hold no whole object" in run.notes[0]
    assert "2 of 123 rows have no step of their own" in run.notes[1]


def test_each_missing_file_costs_its_part_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With any one file gone, cut in half, or a folder in its place, there is a page; what is damaged is noted."""
    monkeypatch.setattr(page, "svg", lambda chart: "<svg></svg>")
    write_answers(write_run(tmp_path))
    names = [path.relative_to(tmp_path) for path in tmp_path.rglob("*.json*")]
    assert len(names) > 10
    for name in names:
        path = tmp_path / name
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        torn = page_of(read_run(tmp_path))
        assert any(name.name in note for note in torn.notes) or "receipt" in name.name or name.name == "attempts.jsonl"
        path.unlink()
        gone = page_of(read_run(tmp_path))
        assert gone.notes == []
        path.mkdir()
        for each in (torn, gone, page_of(read_run(tmp_path))):
            assert "</html>" in render(each)
        path.rmdir()
        path.write_bytes(whole)


@pytest.mark.parametrize("seed", range(12))
def test_nothing_in_a_folder_breaks_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """With a tenth of all values replaced there are pages and a summary, and no markup of the data in them."""
    monkeypatch.setattr(page, "svg", lambda chart: "<svg></svg>")
    noise = random.Random(seed)
    write_answers(write_run(tmp_path, num_steps=6))
    for path in tmp_path.rglob("*.json*"):
        if path.suffix == ".jsonl":
            rows = [damage(json.loads(line), noise, 0.1) for line in path.read_text().splitlines()]
            path.write_text("".join(f"{json.dumps(each)}\n" for each in rows))
        else:
            write(path, damage(json.loads(path.read_text()), noise, 0.1))
    run = read_run(tmp_path)
    pages = render(page_of(run)) + render(page_of_several([run, run]))
    assert pages.count("</html>") == 2
    assert "<b>" not in pages
    json.dumps(summary_of(run).as_json())


def test_numbers_of_any_size_are_drawn_or_left_out(tmp_path: Path) -> None:
    """Losses, speeds, steps and memory of any size in a row make no chart impossible."""
    sizes = [1e308, -1e308, 5e-324, 10**300, 1e38, 1e-38, -5, 0, 2**53]
    keys = [key for key, value in row(1).items() if isinstance(value, float)]
    rows = [row(step) | dict.fromkeys(keys, size) for step, size in enumerate(sizes, start=1)]
    rows += [row(50) | {"checkpoint/step": 10**400}, row(2**53), row(2**60)]
    folder = RunFolder(write_run(tmp_path))
    write_lines(folder.metrics, rows)
    write_lines(folder.attempts, [{"attempt": n, "event": "start", "from_step": 10**300 * n} for n in (1, 2)])
    write(folder.plan, {"engine": "", "summary": "", "peak_bytes": 1e308})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert render(page_of(read_run(tmp_path))).count("<svg ") == 7


def test_a_folder_without_a_run_is_none(tmp_path: Path) -> None:
    """A model's folder has a config.json, too, and an empty folder is no run; one torn file of a run is one."""
    assert not is_run(tmp_path)
    write(tmp_path / "config.json", {"model_type": "llama"})
    assert not is_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"st')
    assert is_run(tmp_path)
    assert read_run(tmp_path).state == State.NOT_STARTED

"""Power cuts never cost what was promised before them, and every fsync is needed for that."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.faults.saves import KEEP, identity, is_what_was_saved, save
from tests.power_cut import Event, Log, State, crash_states, materialise, recorded
from tests.tally import Tally
from train.checkpoints.contents import CONTENTS, MANIFEST, OPTIMIZER
from train.checkpoints.store import OTHER_RUN, CheckpointStore
from train.run.durable import publish
from train.run.exits import ExitCode
from train.run.folder import RunFolder


def record_saves(log: Log, root: Path) -> None:
    """A run with W&B: its identity first, then five saves; two of them push one out, but not the best one."""
    store = CheckpointStore(RunFolder(root / "run"), KEEP)
    log.mark("record", identity(store))
    for step in (1, 2, 3, 4, 5):
        save(store, step)
        log.mark("step", step)


def record_first_save(log: Log, root: Path) -> None:
    """A run without W&B: the identity is made inside the first save."""
    store = CheckpointStore(RunFolder(root / "run"), KEEP)
    for step in (1, 2):
        save(store, step)
        log.mark("step", step)
    log.mark("record", identity(store))


def record_recovery(log: Log, root: Path) -> None:
    """A start that finds leftovers of a killed one and a damaged newest checkpoint, and goes on from the older."""
    store = CheckpointStore(RunFolder(root / "run"), KEEP)
    log.mark("record", identity(store))
    for step in (1, 2):
        newest = save(store, step)
    os.truncate(newest / OPTIMIZER, 20)
    shutil.copytree(newest, store.root / ".tmp-step-0000000003-0")
    shutil.copytree(newest, store.root / ".trash-step-0000000000-0")
    log.mark("damaged", newest.name)
    log.mark("step", 1)
    log.settle()
    found = CheckpointStore(RunFolder(root / "run"), KEEP).latest()
    assert found is not None
    assert found.state.step == 1
    for step in (2, 3):
        save(store, step)
        log.mark("step", step)
        log.mark("damaged", "")


def check_run(root: Path, marks: dict[str, Any]) -> str:
    """What a fresh start on this disk does wrong, or nothing."""
    store, had_record = CheckpointStore(RunFolder(root / "run"), KEEP), (root / "run" / "run.json").exists()
    present = sorted(store.root.glob("step-*"))
    if marks.get("step", 0) and (not present or present[0].name != "step-0000000001"):
        return "the best checkpoint is lost"
    for folder in present:  # seen by another run, so that this one's start finds the disk as it was
        reason = CheckpointStore(RunFolder(root / "another"), KEEP).defect(folder)
        if reason not in ("", OTHER_RUN) and folder.name != marks.get("damaged"):
            return f"{folder.name} is neither whole nor absent: {reason}"
    try:
        found = store.latest()
        step = found.state.step if found else 0
        if step < marks.get("step", 0):
            return f"step {marks['step']} was promised, step {step} is found"
        if found is not None and not is_what_was_saved(found):
            return f"{found.path.name} is not what was saved"
        if "record" in marks and (not had_record or identity(store) != marks["record"]):
            return "run.json is not what it was"
        if left := [path.name for path in store.root.glob(".*")]:
            return f"{left[0]} is left"
        save(store, step + 1)
        after = CheckpointStore(RunFolder(root / "run"), KEEP).latest()
        return "" if after and after.state.step == step + 1 else "the next save is not found"
    except Exception as error:  # any exception is a failed start
        return f"{type(error).__name__}: {error}"


FINAL = {"adapter_model.safetensors": "adapter", "merged/config.json": "shape"}


def record_final(log: Log, root: Path) -> None:
    """A folder, whose files are written without fsync, is published twice."""
    for edition in ("1", "2"):
        log.mark("written", edition)
        with publish(root / "run" / "final") as folder:
            (folder / "merged").mkdir()
            for name, text in FINAL.items():
                (folder / name).write_text(text + edition)
        log.mark("published", edition)


def check_final(root: Path, marks: dict[str, Any]) -> str:
    """final/ has one complete edition; it may be absent only before the first, or while one replaces another."""
    folder, done = root / "run" / "final", marks.get("published", "")
    if not folder.exists():
        return f"final, edition {done}, is lost" if done and done == marks["written"] else ""
    files = [path for path in folder.rglob("*") if path.is_file()]
    content = {path.relative_to(folder).as_posix(): path.read_text() for path in files}
    allowed = {done, marks["written"]} - {""}
    whole = [edition for edition in allowed if content == {name: text + edition for name, text in FINAL.items()}]
    return "" if whole else f"final is neither of {sorted(allowed)}: {content}"


def record_exits(log: Log, root: Path) -> None:
    """exit.json is written three times."""
    for code in (ExitCode.INTERRUPTED, ExitCode.SAVE_FAILED, ExitCode.FINISHED):
        log.mark("written", code.name.lower())
        RunFolder(root / "run").write_exit(code, "a reason")
        log.mark("ended", code.name.lower())


def check_exits(root: Path, marks: dict[str, Any]) -> str:
    """exit.json is the last one that was promised, or the one being written."""
    path, done = root / "run" / "exit.json", marks.get("ended", "")
    try:
        name = json.loads(path.read_text())["name"] if path.exists() else ""
    except ValueError as error:
        return f"exit.json: {error}"
    return "" if name in (done, marks.get("written", "")) else f"exit.json says {name!r} after {done!r}"


@dataclass(frozen=True)
class Scenario:
    """Operations, and the check that every disk after a power cut in them must pass."""

    record: Callable[[Log, Path], None]
    check: Callable[[Path, dict[str, Any]], str]

    def events(self, root: Path) -> list[Event]:
        """The recorded operations; the run folder itself is on the disk before."""
        with recorded(root) as log:
            (root / "run").mkdir()
            log.settle()
            self.record(log, root)
        return log.events

    def problem(self, state: State, folder: Path) -> str:
        """What is wrong after this power cut; empty if nothing."""
        materialise(state.tree, folder)
        try:
            return self.check(folder, state.marks)
        finally:
            shutil.rmtree(folder)


SCENARIOS = {
    "saves": Scenario(record_saves, check_run),
    "first save": Scenario(record_first_save, check_run),
    "recovery": Scenario(record_recovery, check_run),
    "final": Scenario(record_final, check_final),
    "exits": Scenario(record_exits, check_exits),
}
STATES_IN_SHORT = {"saves": 90, "first save": 30, "recovery": 50, "final": 20, "exits": 10}


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Event]]:
    """The recorded operations of every scenario."""
    return {name: scenario.events(tmp_path_factory.mktemp("log")) for name, scenario in SCENARIOS.items()}


@pytest.mark.fault("T3")
@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.usefixtures("no_fsync")
def test_a_power_cut_costs_nothing_that_was_promised(name: str, logs: dict, tally: Tally, tmp_path: Path) -> None:
    """After a cut at any operation, with any unsynced data lost or torn, a start finds all that was promised."""
    states = list(crash_states(logs[name]).values())
    count = tally.times(STATES_IN_SHORT[name], len(states))
    assert len(states) >= count
    for number in range(count):  # evenly spread
        state = states[number * len(states) // count]
        problem = SCENARIOS[name].problem(state, tmp_path / "disk")
        tally.check(not problem, f"{state.label}: {problem}")


def without(events: list[Event], is_dropped: Callable[[Event], bool]) -> list[Event]:
    """The operations without some of the fsyncs."""
    return [event for event in events if not (event.kind == "fsync" and is_dropped(event))]


def first_problem(name: str, logs: dict[str, list[Event]], events: list[Event], folder: Path) -> str:
    """The first failure when `events` replace a scenario's own; empty if there is none.

    Only states that the scenario itself cannot leave are tried, because another test covers those.
    """
    usual = crash_states(logs[name])
    for key, state in crash_states(events).items():
        problem = SCENARIOS[name].problem(state, folder) if key not in usual else ""
        if problem:
            return f"{state.label}: {problem}"
    return ""


def scenarios_lost(is_dropped: Callable[[Event], bool], logs: dict[str, list[Event]], folder: Path) -> Iterator[str]:
    """The scenarios that fail without these fsyncs, and how they fail."""
    for name, events in logs.items():
        fewer = without(events, is_dropped)
        problem = first_problem(name, logs, fewer, folder) if len(fewer) < len(events) else ""
        if problem:
            yield f"{name}: {problem}"


@pytest.mark.fault("T3")
@pytest.mark.usefixtures("no_fsync")
def test_without_any_one_fsync_a_power_cut_costs_something(logs: dict, tally: Tally, tmp_path: Path) -> None:
    """Without the fsync of any one call site some scenario fails, so the replay notices each of them."""
    folder = tmp_path / "disk"
    sites = sorted({event.site for events in logs.values() for event in events if event.kind == "fsync"})
    assert len(sites) >= 7, sites
    for site in sites:
        lost = next(scenarios_lost(lambda event, site=site: event.site == site, logs, folder), "")
        tally.check(bool(lost), f"{site} can go and nothing is lost")
    for name in (*CONTENTS, MANIFEST):
        lost = next(scenarios_lost(lambda event, name=name: event.path.endswith(f"/{name}"), logs, folder), "")
        tally.check(lost, f"no fsync of {name}, and nothing is lost")


@pytest.mark.fault("T3")
def test_a_new_run_folder_survives_a_power_cut(tmp_path: Path, tally: Tally) -> None:
    """The entries of a new run folder, and of new folders above it, are synced before a save is reported."""
    with recorded(tmp_path) as log:
        with RunFolder(tmp_path / "runs" / "new").locked():
            save(CheckpointStore(RunFolder(tmp_path / "runs" / "new"), KEEP), 1)
        log.mark("step", 1)
    for number, state in enumerate(crash_states(log.events).values()):
        if "step" in state.marks:
            folder = tmp_path / f"disk-{number}"
            materialise(state.tree, folder)
            found = CheckpointStore(RunFolder(folder / "runs" / "new"), KEEP).latest()
            tally.check(found is not None, state.label)

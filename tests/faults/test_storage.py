"""Power cuts, truncation, bit rot and tampering never cost a checkpoint that was reported as saved."""

import hashlib
import io
import json
import os
import random
import resource
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.power_cut import Event, Log, State, Tree, crash_states, materialise, recorded, tree_of
from tests.tally import Tally
from train.checkpoints.contents import (
    ADAPTER,
    ADAPTER_CONFIG,
    CONTENTS,
    MANIFEST,
    OPTIMIZER,
    STATE,
    Checkpoint,
    TrainerState,
    adapter_files,
)
from train.checkpoints.store import OTHER_RUN, CheckpointStore
from train.run.durable import publish
from train.run.exits import ExitCode, ExitWith
from train.run.folder import RunFolder

KEEP = 2


def expected(step: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], TrainerState]:
    """What the checkpoint of `step` holds."""
    adapters = {"a.lora_A.weight": torch.full((4, 3), float(step))}
    loss = 0.5 if step == 1 else 0.9  # the first is the best
    state = TrainerState(step, 10 * step, {"seed": 1}, {"processes": 1}, {"torch": "x"}, validation_loss=loss)
    return adapters, {"a/state1": torch.arange(12) + step}, state


def save(store: CheckpointStore, step: int) -> Path:
    """Saves the checkpoint of `step`."""
    adapters, optimizer, state = expected(step)
    return store.save(adapter_files(adapters, {"r": 4}), optimizer, state)


def identity(store: CheckpointStore) -> list[str]:
    """The ids in run.json of a run with W&B, made where there are none."""
    return [store.run_uid(), store.folder.identifier("wandb_id", lambda: uuid.uuid4().hex)]


def is_what_was_saved(found: Checkpoint) -> bool:
    """Whether every tensor and every field is the one saved for its step."""
    adapters, optimizer, state = expected(found.state.step)
    pairs = ((found.adapters, adapters), (found.optimizer, optimizer))
    same = all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in pairs)
    return same and found.state == state


# T3: power cuts


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


FINAL = {"adapter_model.safetensors": "adapter", "tokenizer.json": "tokens"}


def record_final(log: Log, root: Path) -> None:
    """A folder, whose files are written without fsync, is published twice."""
    for edition in ("1", "2"):
        log.mark("written", edition)
        with publish(root / "run" / "final") as folder:
            for name, text in FINAL.items():
                (folder / name).write_text(text + edition)
        log.mark("published", edition)


def check_final(root: Path, marks: dict[str, Any]) -> str:
    """final/ has one complete edition; it may be absent only before the first, or while one replaces another."""
    folder, done = root / "run" / "final", marks.get("published", "")
    if not folder.exists():
        return f"final, edition {done}, is lost" if done and done == marks["written"] else ""
    content = {path.name: path.read_text() for path in folder.iterdir()}
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


@pytest.fixture
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes fsync do nothing: the replay needs no durable disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


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


# T4 to T7: what is read back is not what was written


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """A run folder with the checkpoints of steps 1 and 2."""
    root = tmp_path_factory.mktemp("two") / "run"
    store = CheckpointStore(RunFolder(root), KEEP)
    identity(store)
    for step in (1, 2):
        save(store, step)
    return tree_of(root)


NEWEST = "checkpoints/step-0000000002"
FILES = tuple(f"{NEWEST}/{name}" for name in (*CONTENTS, MANIFEST))


def inventory(root: Path) -> list[tuple[int, int, int]]:
    """All files in `root` by inode, size and modification time, without names."""
    entries = [path.lstat() for path in root.rglob("*") if path.is_symlink() or not path.is_dir()]
    return sorted((entry.st_ino, entry.st_size, entry.st_mtime_ns) for entry in entries)


def fall_back(root: Path, said: str) -> str:
    """What a start does wrong when the newest checkpoint is bad; empty if nothing. Removes `root`."""
    newest, before = max((root / "checkpoints").glob("step-*")), inventory(root)
    output = io.StringIO()
    with redirect_stdout(output):
        found = CheckpointStore(RunFolder(root), KEEP).latest()
    after, aside = inventory(root), list(newest.parent.glob(f"quarantine-{newest.name}-*"))
    stays = newest.exists()
    shutil.rmtree(root)
    if found is None or found.state.step != 1 or not is_what_was_saved(found):
        return f"step 1 is not found, but {found and found.path.name}"
    if before != after:
        return "something was changed or deleted"
    if (stays, len(aside)) != ((True, 0) if said == "another run" else (False, 1)):  # that run may need it
        return f"set aside: {aside}"
    message = output.getvalue()
    return "" if f"{newest.name} is not usable" in message and said in message else f"it only says {message!r}"


@pytest.mark.fault("T4")
@pytest.mark.usefixtures("no_fsync")
def test_every_truncation_is_found(two: Tree, tally: Tally, tmp_path: Path) -> None:
    """A file truncated anywhere is named, its checkpoint set aside, and the older one loaded."""
    seed = random.SystemRandom().randrange(2**32)
    chance = random.Random(seed)
    rounds = tally.times(1, 2)
    for path in (*FILES, "run.json"):
        content = two[path] or b""
        cuts = [0, 1, len(content) // 2, len(content) - 1, chance.randrange(len(content))]
        cuts += [chance.randrange(len(content)) for _ in range(5 * (rounds - 1))]
        for length in cuts:
            materialise({**two, path: content[:length]}, tmp_path / "run")
            label = f"{path} cut at {length} of {len(content)}, seed {seed}"
            if path == "run.json":  # what is lost with it stands in the checkpoints
                found = CheckpointStore(RunFolder(tmp_path / "run"), KEEP).latest()
                tally.check(found and found.state.step == 2 and is_what_was_saved(found), label)
                shutil.rmtree(tmp_path / "run")
                continue
            problem = fall_back(tmp_path / "run", Path(path).name)
            tally.check(not problem, f"{label}: {problem}")


@pytest.mark.fault("T5")
@pytest.mark.usefixtures("no_fsync")
def test_every_flipped_bit_is_found_and_the_older_checkpoint_taken(two: Tree, tally: Tally, tmp_path: Path) -> None:
    """Single bits, drawn uniformly from all files of a checkpoint including the manifest, are found."""
    seed = random.SystemRandom().randrange(2**32)
    chance = random.Random(seed)
    contents = {path: two[path] or b"" for path in FILES}
    places = [(path, position) for path, content in contents.items() for position in range(len(content))]
    for path, position in chance.choices(places, k=tally.times(200, 1000)):
        damaged, bit = bytearray(contents[path]), chance.randrange(8)
        damaged[position] ^= 1 << bit
        materialise({**two, path: bytes(damaged)}, tmp_path / "run")
        problem = fall_back(tmp_path / "run", Path(path).name)
        tally.check(not problem, f"{path}, bit {bit} of byte {position}, seed {seed}: {problem}")


def sign(folder: Path, change: Callable[[dict[str, Any]], object] = lambda manifest: None) -> bytes:
    """Writes and returns a manifest with the hashes of the current files, and with its own hash.

    Anyone who knows the format can do this: the hashes protect against bit rot, not against people.
    """
    manifest = json.loads((folder / MANIFEST).read_bytes())
    del manifest["manifest_sha256"]
    for name in CONTENTS:
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    change(manifest)
    own = hashlib.sha256(json.dumps(manifest, sort_keys=True, indent=1).encode()).hexdigest()
    text = json.dumps({**manifest, "manifest_sha256": own}, sort_keys=True, indent=1).encode()
    (folder / MANIFEST).write_bytes(text)
    return text


def replace(path: Path, by: Callable[[Path], object]) -> None:
    """Replaces a file by whatever `by` creates."""
    path.unlink()
    by(path)


def forge(folder: Path, name: str, content: bytes) -> None:
    """Replaces the content of a file, and the hashes to fit."""
    (folder / name).write_bytes(content)
    sign(folder)


def with_field(content: bytes, name: str) -> bytes:
    """A JSON object with one more field."""
    return json.dumps({**json.loads(content), name: 1}).encode()


def link_folder(folder: Path) -> None:
    """Moves the checkpoint out of the run folder and leaves a symlink to it."""
    shutil.copytree(folder, folder.parents[2] / "outside" / "whole")
    shutil.rmtree(folder)
    folder.symlink_to(folder.parents[2] / "outside" / "whole")


def twice(manifest: bytes) -> bytes:
    """The manifest with its first key twice, of which the second is the original."""
    assert manifest.startswith(b'{\n "files":')
    return b'{\n "files": {},' + manifest[1:]


ELSEWHERE = {"bytes": 4, "sha256": hashlib.sha256(b"root").hexdigest()}
# name -> (change of the newest checkpoint's folder, expected message); ../outside has a file and a FIFO
TAMPERINGS: dict[str, tuple[Callable[[Path], object], str]] = {
    "file missing": (lambda f: (f / OPTIMIZER).unlink(), OPTIMIZER),
    "manifest missing": (lambda f: (f / MANIFEST).unlink(), MANIFEST),
    "extra file": (lambda f: (f / "adapter_model.bin").touch(), "adapter_model.bin"),
    "extra hidden folder": (lambda f: (f / ".hidden").mkdir(), ".hidden"),
    "symlink to /etc/passwd": (lambda f: replace(f / STATE, lambda p: p.symlink_to("/etc/passwd")), STATE),
    "symlink to a FIFO": (
        lambda f: replace(f / STATE, lambda p: p.symlink_to(f.parents[2] / "outside" / "fifo")),
        STATE,
    ),
    "symlink to the same content": (
        lambda f: replace(f / ADAPTER_CONFIG, lambda p: p.symlink_to(f"../step-0000000001/{ADAPTER_CONFIG}")),
        ADAPTER_CONFIG,
    ),
    "the folder is a symlink": (link_folder, "not a folder"),
    "FIFO for tensors": (lambda f: replace(f / OPTIMIZER, os.mkfifo), OPTIMIZER),
    "FIFO for the manifest": (lambda f: replace(f / MANIFEST, os.mkfifo), MANIFEST),
    "folder for a file": (lambda f: replace(f / STATE, os.mkdir), STATE),
    "hard link to a file elsewhere": (
        lambda f: replace(f / STATE, lambda p: p.hardlink_to(f.parents[2] / "outside" / "file")),
        STATE,
    ),
    "later format version": (lambda f: sign(f, lambda m: m.update(format_version=2)), "format version 2"),
    "another run's": (lambda f: sign(f, lambda m: m.update(run_uid="0" * 32)), "another run"),
    "manifest is no object": (lambda f: (f / MANIFEST).write_text("[]"), MANIFEST),
    "manifest nested deeply": (lambda f: (f / MANIFEST).write_text("[" * 200_000), MANIFEST),
    "key given twice": (lambda f: (f / MANIFEST).write_bytes(twice(sign(f))), MANIFEST),
    "../ in the manifest": (
        lambda f: sign(f, lambda m: m["files"].update({"../../../outside/file": ELSEWHERE})),
        MANIFEST,
    ),
    "absolute path in the manifest": (lambda f: sign(f, lambda m: m["files"].update({"/etc/passwd": {}})), MANIFEST),
    "huge header length": (lambda f: forge(f, ADAPTER, (1 << 60).to_bytes(8, "little") + b"{}"), ADAPTER),
    "header longer than the file": (
        lambda f: forge(f, OPTIMIZER, (90 << 20).to_bytes(8, "little") + b"{}"),
        OPTIMIZER,
    ),
    "a terabyte of nothing": (lambda f: os.truncate(f / OPTIMIZER, 1 << 40), OPTIMIZER),
    "field that this program does not know": (
        lambda f: forge(f, STATE, with_field((f / STATE).read_bytes(), "surprise")),
        STATE,
    ),
    "renamed to a later step": (lambda f: f.rename(f.with_name("step-0000000009")), "step-0000000009"),
}


@pytest.fixture
def confined(tmp_path: Path) -> Iterator[list[str]]:
    """Lists what is opened outside the run folder or is no regular file; limits memory growth to 2 GiB."""
    strays: list[str] = []
    original, inside = io.open, str(tmp_path / "run")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("root")
    os.mkfifo(tmp_path / "outside" / "fifo")

    def watched(file: Any, *rest: Any, **named: Any) -> Any:
        real = os.path.realpath(file) if not isinstance(file, int) else inside
        if not real.startswith(inside) or (os.path.exists(real) and not os.path.isfile(real)):
            strays.append(real)
            raise OSError(f"{real} is opened")
        return original(file, *rest, **named)

    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), limits[1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(io, "open", watched)
        yield strays
    resource.setrlimit(resource.RLIMIT_AS, limits)


def tamper(name: str, two: Tree, root: Path, strays: list[str]) -> str:
    """What a start does wrong after this tampering; empty if nothing."""
    change, said = TAMPERINGS[name]
    materialise(two, root)
    change(root / NEWEST)
    strays.clear()
    try:
        problem = fall_back(root, said)
    except Exception as error:  # a start must not end in a traceback
        problem = f"{type(error).__name__}: {error}"
    shutil.rmtree(root, ignore_errors=True)
    return f"{strays[0]} is opened" if strays else problem


@pytest.mark.fault("T6")
@pytest.mark.usefixtures("no_fsync")
def test_every_tampering_is_found(two: Tree, tally: Tally, tmp_path: Path, confined: list[str]) -> None:
    """The older checkpoint is loaded, the bad one kept and its reason printed; nothing outside the run is opened."""
    materialise(two, tmp_path / "run")
    sign(tmp_path / "run" / NEWEST)
    assert tree_of(tmp_path / "run") == two, "the manifest that is signed here is not the product's"
    shutil.rmtree(tmp_path / "run")
    for name in TAMPERINGS:
        problem = tamper(name, two, tmp_path / "run", confined)
        tally.check(not problem, f"{name}: {problem}")


@pytest.mark.fault("T6")
@pytest.mark.parametrize("name", ["symlink to a FIFO", "FIFO for state", "manifest nested deeply"])
@pytest.mark.usefixtures("no_fsync")
def test_nothing_is_read_of_a_bad_older_checkpoint(
    name: str, two: Tree, tally: Tally, tmp_path: Path, confined: list[str]
) -> None:
    """Even without run.json, neither the start, nor retention, nor the search for the run's identity reads it."""
    root = tmp_path / "run"
    materialise({path: content for path, content in two.items() if path != "run.json"}, root)
    older = root / "checkpoints" / "step-0000000001"
    if name == "FIFO for state":
        replace(older / STATE, os.mkfifo)
    else:
        TAMPERINGS[name][0](older)
    store = CheckpointStore(RunFolder(root), KEEP)
    found = store.latest()
    save(store, 3)
    tally.check(found is not None and found.state.step == 2, f"{found}")
    tally.check(confined == [], f"{confined}")


def truncate_all(folder: Path) -> None:
    for path in folder.iterdir():
        os.truncate(path, path.stat().st_size // 2)


def flip_all(folder: Path) -> None:
    for path in folder.iterdir():
        content = bytearray(path.read_bytes())
        content[len(content) // 3] ^= 16
        path.write_bytes(content)


RUINS: dict[str, Callable[[Path], object]] = {
    "all files cut in half": truncate_all,
    "a bit of each file flipped": flip_all,
    "all manifests missing": lambda f: (f / MANIFEST).unlink(),
}


@pytest.mark.fault("T7")
@pytest.mark.parametrize("has_record", [True, False], ids=["", "run.json lost too"])
def test_where_all_are_bad_every_start_ends_with_80(two: Tree, has_record: bool, tally: Tally, tmp_path: Path) -> None:
    """No start, now or later, silently begins a fresh run, and all files stay for inspection."""
    for name, ruin in RUINS.items():
        root = tmp_path / name
        materialise(two, root)
        for folder in (root / "checkpoints").iterdir():
            ruin(folder)
        if not has_record:
            (root / "run.json").unlink()
        codes, before = [], set(inventory(root))
        for _ in range(3):
            with pytest.raises(ExitWith) as caught:
                CheckpointStore(RunFolder(root), KEEP).latest()
            codes.append(caught.value.code)
        tally.check(codes == [ExitCode.NO_VALID_CHECKPOINT] * 3, f"{name}: {codes}")
        tally.check(before <= set(inventory(root)), f"{name}: something is gone")

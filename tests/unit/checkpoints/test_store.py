"""A checkpoint is whole or it is not one."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from tests.conftest import training_of
from train.checkpoints.contents import (
    ADAPTER,
    CONTENTS,
    MANIFEST,
    STATE,
    Checkpoint,
    TrainerState,
    adapter_files,
)
from train.checkpoints.resume import checkpoint_layout, restore
from train.checkpoints.store import CheckpointStore
from train.config import Config
from train.optim import optimizer_state
from train.run.durable import publish
from train.run.exits import ExitCode, ExitWith
from train.run.folder import RunFolder
from train.step import optimizer_step


def write(store: CheckpointStore, step: int) -> Path:
    adapters = {"a.lora_A.weight": torch.full((4, 3), float(step))}
    state = TrainerState(step, 10 * step, {"seed": 1}, {"processes": 1}, {"torch": "x"})
    return store.save(adapter_files(adapters, {"r": 4}), {"a/state1": torch.arange(12)}, state)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(RunFolder(tmp_path / "run"), keep=2)


def test_round_trip_and_retention(store: CheckpointStore) -> None:
    """The newest comes back as it was saved; the newest two stay."""
    for step in (1, 2, 11):
        write(store, step)
    found = store.latest()
    assert found is not None
    assert found.state == TrainerState(11, 110, {"seed": 1}, {"processes": 1}, {"torch": "x"})
    assert torch.equal(found.adapters["a.lora_A.weight"], torch.full((4, 3), 11.0))
    assert torch.equal(found.optimizer["a/state1"], torch.arange(12))
    assert sorted(path.name for path in store.root.iterdir()) == ["step-0000000002", "step-0000000011"]


def test_every_flipped_bit_is_found(store: CheckpointStore) -> None:
    """One bit of each 7th byte of every file, the manifest included."""
    folder = write(store, 1)
    flips = 0
    for name in (*CONTENTS, MANIFEST):
        content = (folder / name).read_bytes()
        for position in range(0, len(content), 7):
            damaged = bytearray(content)
            damaged[position] ^= 1 << (position % 8)
            (folder / name).write_bytes(damaged)
            assert store.defect(folder), (name, position)
            flips += 1
        (folder / name).write_bytes(content)
    assert flips > 100
    assert store.defect(folder) == ""


def forge(folder: Path, change: Callable[[dict], None]) -> None:
    """Rewrites the manifest with a change, leaving its own hash as it was."""
    manifest = json.loads((folder / MANIFEST).read_bytes())
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


TAMPERINGS: dict[str, Callable[[Path], object]] = {
    "truncated": lambda f: os.truncate(f / STATE, 5),
    "emptied": lambda f: os.truncate(f / MANIFEST, 0),
    "missing": lambda f: (f / ADAPTER).unlink(),
    "extra": lambda f: (f / "extra").touch(),
    "symlink": lambda f: ((f / STATE).unlink(), (f / STATE).symlink_to("/etc/passwd")),
    "fifo": lambda f: ((f / STATE).unlink(), os.mkfifo(f / STATE)),
    "folder": lambda f: ((f / STATE).unlink(), (f / STATE).mkdir()),
    "other run": lambda f: forge(f, lambda m: m.update(run_uid="0" * 32)),
    "future format": lambda f: forge(f, lambda m: m.update(format_version=99)),
    "a path": lambda f: forge(f, lambda m: m["files"].update({"../x": {"bytes": 0, "sha256": ""}})),
    "not an object": lambda f: (f / MANIFEST).write_text("[]"),
    "not JSON": lambda f: (f / MANIFEST).write_text("{"),
}


@pytest.mark.parametrize("name", TAMPERINGS)
def test_a_tampered_checkpoint_is_set_aside_with_a_reason(name: str, store: CheckpointStore, capsys) -> None:
    """The older one is taken, the bad one kept under another name, the reason said."""
    write(store, 1)
    TAMPERINGS[name](write(store, 2))
    found = store.latest()
    assert found is not None
    assert found.state.step == 1
    assert "step-0000000002 is not usable: " in capsys.readouterr().out
    assert len(list(store.root.glob("quarantine-step-0000000002-*"))) == 1


def test_none_valid_is_an_error_and_none_at_all_is_a_fresh_start(store: CheckpointStore) -> None:
    """Silently starting again would lose a run."""
    assert store.latest() is None
    os.truncate(write(store, 1) / STATE, 0)
    with pytest.raises(ExitWith) as caught:
        store.latest()
    assert caught.value.code == ExitCode.NO_VALID_CHECKPOINT


def test_records_of_a_checkpoint_that_is_gone(store: CheckpointStore) -> None:
    """A row tells of a save that was written, final/ of one that was published; of a failed save nothing is lost."""
    row = {"step": 2, "perf/save_seconds": 0.1, "perf/failed_saves": 1}
    store.folder.metrics.parent.mkdir(parents=True)
    store.folder.metrics.write_text(json.dumps(row) + "\n")
    assert not store.is_emptied()
    store.folder.metrics.write_text(json.dumps(row | {"perf/failed_saves": 0}) + "\n")
    assert store.is_emptied()
    write(store, 1)
    assert not store.is_emptied()
    shutil.rmtree(store.root)
    store.folder.metrics.unlink()
    assert not store.is_emptied()
    store.folder.final.mkdir()  # anybody's
    assert not store.is_emptied()
    (store.folder.final / "base.json").write_text("{}")
    assert store.is_emptied()
    shutil.rmtree(store.folder.final)
    stop = {"event": "end", "code": 75, "last_step": 0}
    store.folder.attempts.write_text(json.dumps(stop) + "\n")
    assert not store.is_emptied()
    store.folder.attempts.write_text(json.dumps(stop | {"last_step": 3}) + "\n")
    assert store.is_emptied()


def test_a_failed_write_leaves_what_stood(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """No space at the manifest: exit 76, the older checkpoint stands, no temporary folder is left."""
    write(store, 1)
    original = os.fsync
    calls = []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")
        original(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ExitWith) as caught:
        write(store, 2)
    assert caught.value.code == ExitCode.SAVE_FAILED
    assert [path.name for path in store.root.iterdir()] == ["step-0000000001"]
    assert store.latest() is not None


def test_a_start_sweeps_what_is_left_and_not_what_is_being_written(store: CheckpointStore) -> None:
    """Training that goes on beside a merge into its folder removes a killed process's rest, not what is written."""
    write(store, 1)
    run = store.folder.path
    left = [run / ".tmp-final-0123abcd", run / "checkpoints/.tmp-step-0000000002-0123abcd"]
    left.append(run / "checkpoints/.trash-step-0000000000-0123abcd")
    only_copy = run / ".trash-merged-original-0123abcd"
    for folder in (*left, only_copy):
        folder.mkdir()
    with publish(run / "merged") as being_written:
        store.latest()
        assert being_written.is_dir()
        assert only_copy.is_dir()
        assert not any(folder.exists() for folder in left)
    assert (run / "merged").is_dir()


def test_no_weight_that_is_not_a_number_is_published() -> None:
    """NaN or infinity in an adapter ends the run with 79 before anything is written."""
    for value in (float("nan"), float("inf")):
        with pytest.raises(ExitWith) as caught:
            adapter_files({"w": torch.tensor([1.0, value])}, {})
        assert caught.value.code == ExitCode.NON_FINITE


def test_an_old_checkpoint_names_its_layout_otherwise(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The names of before mean the same layout: nothing is said at a resume, and another layout is."""
    training = training_of(config, Accelerator(cpu=True))
    optimizer_step(training, 0)
    layout = checkpoint_layout(training)
    assert layout.keys() >= {"micro_batch_tokens", "mlp_tile_tokens"}
    old_names = {"micro_batch_tokens": "tokens in a pass", "mlp_tile_tokens": "tokens in a tile"}
    old = {old_names.get(name, name): value for name, value in layout.items()}
    older = {name: value for name, value in old.items() if name != "tokens in a tile"}
    adapters = {name: parameter.detach() for name, parameter in training.parameters.items()}
    optimizer = optimizer_state(training.optimizer, training.flat)
    for saved in (layout, old, older, older | {"processes": 2}):
        state = TrainerState(1, 0, {}, saved, {})
        restore(training, Checkpoint(tmp_path, adapters, optimizer, state))
        said = "the layout has changed" in capsys.readouterr().out
        assert said == (saved.get("processes") == 2)

"""Checkpoints that are known by their step, and what a start has to make of a bad one."""

import io
import shutil
import uuid
from contextlib import redirect_stdout
from pathlib import Path

import torch

from train.checkpoints.contents import CONTENTS, MANIFEST, Checkpoint, TrainerState, adapter_files
from train.checkpoints.store import CheckpointStore
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

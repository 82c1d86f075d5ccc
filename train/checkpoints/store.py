"""Checkpoints that are whole or absent: written aside, hashed, renamed, verified.

The newest checkpoint is the highest step whose manifest verifies; there is no pointer file that could be stale.
"""

import errno
import json
import os
import shutil
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import safetensors.torch
import torch

from train.checkpoints import contents
from train.checkpoints.contents import (
    CONTENTS,
    MANIFEST,
    OPTIMIZER,
    STATE,
    STEP_FOLDER,
    UNREADABLE,
    Checkpoint,
    TrainerState,
    manifest_of,
    step_folder,
)
from train.run.durable import aside_name, publish, sync
from train.run.exits import ExitCode, ExitWith
from train.run.folder import RunFolder

OTHER_RUN = "it belongs to another run"
DISK_RESERVE = 1.2  # free space wanted before a save, in sizes of what is saved


class CheckpointStore:
    """The checkpoints of one run folder, in the hands of the process that writes them."""

    def __init__(self, folder: RunFolder, keep: int) -> None:
        self.folder = folder
        self.root = folder.checkpoints
        self.keep = keep

    def run_uid(self) -> str:
        """The run's identity, made at its first start; checkpoints of another run are never taken for ours.

        Where it is lost or damaged that of the newest checkpoint is taken, so that checkpoints outlive it.
        """
        return self.folder.identifier("run_uid", lambda: self._uid_of_checkpoints() or uuid.uuid4().hex)

    def path_of(self, step: int) -> Path:
        """Where the checkpoint of `step` is, if there is one."""
        return self.root / step_folder(step)

    def save(self, files: Mapping[str, bytes], optimizer: Mapping[str, torch.Tensor], state: TrainerState) -> Path:
        """Makes the checkpoint of `state.step` durable, verifies it, and only then lets old ones go.

        Raises ExitWith(SAVE_FAILED) when it cannot be written or read back; what stood before still stands.
        """
        target = self.path_of(state.step)
        written = {
            **files,
            OPTIMIZER: safetensors.torch.save(dict(optimizer)),
            STATE: json.dumps(asdict(state), indent=2, sort_keys=True).encode(),
        }
        try:
            needed, free = int(sum(map(len, written.values())) * DISK_RESERVE), free_bytes(self.folder.path)
            if free < needed:
                raise OSError(errno.ENOSPC, f"it needs {needed / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free")
            with publish(target) as folder:
                for name in CONTENTS:
                    _write(folder / name, written[name])
                _write(folder / MANIFEST, manifest_of(written, state.step, self.run_uid()))
        except OSError as error:
            raise ExitWith(
                ExitCode.SAVE_FAILED, f"{target} could not be written: {error}; older checkpoints stand"
            ) from None
        reason = self.defect(target)
        if reason:
            raise ExitWith(ExitCode.SAVE_FAILED, f"{target} does not read back: {reason}; older checkpoints stand")
        self._retain()
        return target

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that verifies; damaged ones are renamed to quarantine-*, and said, never deleted.

        Raises ExitWith(NO_VALID_CHECKPOINT) when there are checkpoints and none is good.
        """
        self._sweep()
        candidates = self._folders()
        for folder in candidates:
            reason = self.defect(folder)
            if not reason:
                self._retain()  # which a kill may have left undone
                return contents.read(folder)
            if reason != OTHER_RUN:
                reason += f"; kept as {_set_aside(folder, 'quarantine').name}"
            print(f"checkpoint {folder.name} is not usable: {reason}", flush=True)
        set_aside = list(self.root.glob("quarantine-*"))
        if candidates or set_aside:  # also at the next start, when all are set aside: never a silent fresh run
            reason = f"no valid checkpoint in {self.root}, {len(set_aside)} damaged; --run.resume never starts again"
            raise ExitWith(ExitCode.NO_VALID_CHECKPOINT, reason)
        return None

    def chosen(self, folder: Path) -> Checkpoint:
        """The checkpoint that the user named, of this run or another; newer ones of this run are set aside.

        Raises ExitWith(NO_VALID_CHECKPOINT) where it is not whole, ExitWith(BAD_INPUT) where this run folder holds a
        run of its own that another one's checkpoint would overwrite.
        """
        self._sweep()
        found = self.load(folder)
        newer = [path for path in self._folders() if path.name > step_folder(found.state.step)]
        if folder.resolve().parent != self.root.resolve() and self._folders():
            reason = f"{self.folder.path} holds a run of its own; choose another --run.dir to go on from {folder}"
            raise ExitWith(ExitCode.BAD_INPUT, reason)
        for path in newer:
            print(f"{path.name} is newer than the chosen checkpoint; kept as {_set_aside(path, 'superseded').name}")
        return found

    def load(self, folder: Path) -> Checkpoint:
        """The content of `folder`, of whichever run; raises ExitWith(NO_VALID_CHECKPOINT) where it is not whole."""
        reason = self.defect(folder)
        if reason not in ("", OTHER_RUN):
            raise ExitWith(ExitCode.NO_VALID_CHECKPOINT, f"checkpoint {folder} is not usable: {reason}")
        return contents.read(folder)

    def defect(self, folder: Path) -> str:
        """Why `folder` is not a whole checkpoint of this run, or nothing."""
        reason, run_uid = contents.defect(folder)
        return reason or ("" if run_uid == self.run_uid() else OTHER_RUN)

    def _uid_of_checkpoints(self) -> str:
        for folder in self._folders():
            with suppress(OSError, *UNREADABLE):
                if run_uid := contents.run_uid_of(folder):
                    return run_uid
        return ""

    def _folders(self) -> list[Path]:
        """Checkpoint folders, newest first."""
        if not self.root.is_dir():
            return []
        return sorted((path for path in self.root.iterdir() if STEP_FOLDER.fullmatch(path.name)), reverse=True)

    def best(self) -> tuple[Path, float] | None:
        """The checkpoint with the lowest validation loss, and that loss; nothing where none was validated."""
        measured = []
        for folder in self._folders():
            with suppress(OSError, *UNREADABLE):
                loss = contents.validation_loss_of(folder)
                if loss is not None:
                    measured.append((loss, folder))
        return min(measured)[::-1] if measured else None

    def _retain(self) -> None:
        """Removes what is older than the newest `keep` checkpoints, if all of those verify, but not the best one."""
        folders, best = self._folders(), self.best()
        if len(folders) <= self.keep:
            return
        if any(self.defect(folder) for folder in folders[: self.keep]):
            return
        for folder in folders[self.keep :]:
            if best is None or folder != best[0]:
                with suppress(OSError):  # a checkpoint too many is no reason to stop training
                    shutil.rmtree(_set_aside(folder, "trash"))

    def _sweep(self) -> None:
        """Removes what a killed process was writing or deleting; the caller holds the run's lock."""
        for parent in (self.root, self.folder.path):
            for leftover in (*parent.glob(".tmp-*"), *parent.glob(".trash-*")):
                shutil.rmtree(leftover, ignore_errors=True)


def free_bytes(folder: Path) -> int:
    """What an ordinary user can still write where `folder` is, or will be."""
    while not folder.exists():
        folder = folder.parent
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def _write(path: Path, content: bytes) -> None:
    """A new file; publish() syncs it."""
    with path.open("xb") as file:
        file.write(content)


def _set_aside(folder: Path, kind: str) -> Path:
    """Renames `folder`, durably, to a name that is no checkpoint's: hidden for trash, plain for quarantine."""
    aside = aside_name(folder, kind)
    os.rename(folder, aside)
    sync(folder.parent)
    return aside

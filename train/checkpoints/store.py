"""Checkpoints that are whole or absent: written aside, hashed, renamed, verified.

The newest checkpoint is the highest step whose manifest verifies; there is no pointer file that could be stale.
"""

import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
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
from train.run.durable import aside_name, name_before, publish, sweep, sync
from train.run.exits import ExitCode, ExitWith
from train.run.folder import RUN_UID, RunFolder, read_object
from train.run.json_lines import read_lines

OTHER_RUN = "it belongs to another run"
DISK_RESERVE = 1.2  # free space wanted before a save, in sizes of what is saved


class CheckpointStore:
    """The checkpoints in one run folder, as the process that writes them sees them."""

    def __init__(self, folder: RunFolder, keep: int, measured_on: str = "") -> None:
        """`measured_on` is the fingerprint of the samples that validation losses are compared on; empty: any."""
        self.folder = folder
        self.measured_on = measured_on
        self.root = folder.checkpoints
        self.keep = keep

    def run_uid(self) -> str:
        """The run's id, made at its first start, by which checkpoints of another run are told from this one's.

        If run.json is lost or damaged, the id is read from the newest checkpoint: checkpoints outlive run.json.
        """
        return self.folder.identifier(RUN_UID, lambda: self._uid_of_checkpoints() or uuid.uuid4().hex)

    def known_uid(self) -> str:
        """The run's id where this folder holds a run; otherwise nothing, and none is made."""
        return str(read_object(self.folder.identity).get(RUN_UID, "")) or self._uid_of_checkpoints()

    def path_of(self, step: int) -> Path:
        """Where the checkpoint of `step` is, if there is one."""
        return self.root / step_folder(step)

    def holds(self, checkpoint: Checkpoint) -> bool:
        """Whether the checkpoint is in this run folder, and not in another run's."""
        return checkpoint.path.resolve().parent == self.root.resolve()

    def save(self, files: Mapping[str, bytes], optimizer: Mapping[str, torch.Tensor], state: TrainerState) -> Path:
        """Makes the checkpoint of `state.step` durable and verifies it; only then are old ones removed.

        Raises ExitWith(SAVE_FAILED) if it cannot be written or read back; older checkpoints are left as they are.
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
        self.prune()
        return target

    def latest(self) -> Checkpoint | None:
        """The newest checkpoint that verifies; damaged ones are reported and renamed to quarantine-*, never deleted.

        Raises ExitWith(NO_VALID_CHECKPOINT) if there are checkpoints and none is valid.
        """
        self._sweep()
        candidates = self._folders()
        for folder in candidates:
            reason = self.defect(folder)
            if not reason:
                return contents.read(folder)
            if reason != OTHER_RUN:
                reason += f"; kept as {_set_aside(folder, 'quarantine').name}"
            print(f"checkpoint {folder.name} is not usable: {reason}", flush=True)
        set_aside = list(self.root.glob("quarantine-*"))
        if candidates or set_aside:  # also when an earlier start has set all of them aside: never start afresh silently
            reason = f"no valid checkpoint in {self.root}, {len(set_aside)} damaged; --run.resume never starts again"
            raise ExitWith(ExitCode.NO_VALID_CHECKPOINT, reason)
        return None

    def is_emptied(self) -> bool:
        """Whether the run's records tell of a checkpoint, where there is none: final/ is made of one, the row behind
        one has the seconds that it took, and an attempt that was stopped has ended with one."""
        if self._folders() or any(self.root.glob("quarantine-*")):
            return False
        if (self.folder.final / "base.json").is_file():
            return True
        for records in (self.folder.metrics, self.folder.attempts):
            with suppress(OSError):
                if any(map(_tells_of_save, read_lines(records))):
                    return True
        return False

    def chosen(self, folder: Path) -> Checkpoint:
        """The checkpoint that the user named, of this run or another; newer ones of this run are set aside.

        Raises ExitWith(NO_VALID_CHECKPOINT) if it is not whole, and ExitWith(BAD_INPUT) if it comes from another run
        while this run folder has checkpoints of its own, which would be overwritten.
        """
        self._sweep()
        found = self.load(folder)
        newer = [path for path in self._folders() if path.name > step_folder(found.state.step)]
        if not self.holds(found) and self._folders():
            reason = f"{self.folder.path} holds a run of its own; choose another --run.dir to go on from {folder}"
            raise ExitWith(ExitCode.BAD_INPUT, reason)
        for path in newer:
            print(f"{path.name} is newer than the chosen checkpoint; kept as {_set_aside(path, 'superseded').name}")
        return found

    def load(self, folder: Path) -> Checkpoint:
        """The checkpoint in `folder`, of any run; raises ExitWith(NO_VALID_CHECKPOINT) if it is not whole."""
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
        """The checkpoint with the lowest validation loss on `measured_on`, and that loss; None if none has one.

        Without samples, and of a checkpoint of 0.1.0, which names none, any will do.
        """
        known = ("", self.measured_on)
        comparable = [(loss, folder) for loss, folder, own in self._losses() if not self.measured_on or own in known]
        return min(comparable)[::-1] if comparable else None

    def _losses(self) -> Iterator[tuple[float, Path, str]]:
        """The validation loss of each checkpoint that has one, and the fingerprint of its samples."""
        for folder in self._folders():
            with suppress(OSError, *UNREADABLE):
                loss, samples = contents.validation_of(folder)
                if loss is not None:
                    yield loss, folder, samples

    def prune(self) -> None:
        """Removes all but the newest `keep` checkpoints and the best ones, provided that the newest ones verify.

        Only for the run that wrote them: another one's `keep` and validation samples are refused before.
        """
        folders, best = self._folders(), self._best_of_each()
        if len(folders) <= self.keep:
            return
        if any(self.defect(folder) for folder in folders[: self.keep]):
            return
        for folder in folders[self.keep :]:
            if folder not in best:
                with suppress(OSError):  # one checkpoint too many is no reason to stop training
                    shutil.rmtree(_set_aside(folder, "trash"))

    def _best_of_each(self) -> set[Path]:
        """For all samples that losses were measured on, the checkpoint with the lowest: a later start may return to
        them."""
        lowest: dict[str, tuple[float, Path]] = {}
        for loss, folder, samples in self._losses():
            lowest[samples] = min(lowest.get(samples, (loss, folder)), (loss, folder))
        return {folder for _, folder in lowest.values()}

    def _sweep(self) -> None:
        """Removes what a killed process was writing or deleting; the caller must hold the run's lock.

        A whole checkpoint whose place is empty comes back: a kill came between it and the one that was to take its
        place. Nobody else writes among the checkpoints; into the run folder a merge or an export may be writing now.
        """
        for replaced in self.root.glob(".trash-step-*"):
            place = self.root / name_before(replaced)
            if STEP_FOLDER.fullmatch(place.name) and not place.exists() and not contents.defect(replaced)[0]:
                os.rename(replaced, place)
                sync(self.root)
        for leftover in (*self.root.glob(".tmp-*"), *self.root.glob(".trash-*")):
            shutil.rmtree(leftover, ignore_errors=True)
        sweep(self.folder.path)


def free_bytes(folder: Path) -> int:
    """Bytes that an ordinary user can still write on the disk where `folder` is, or will be."""
    while not folder.exists():
        folder = folder.parent
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def _write(path: Path, content: bytes) -> None:
    """Writes a new file; publish() syncs it."""
    with path.open("xb") as file:
        file.write(content)


def _set_aside(folder: Path, kind: str) -> Path:
    """Renames `folder` durably to a name that no checkpoint has, by `kind`: trash, quarantine or superseded."""
    aside = aside_name(folder, kind)
    os.rename(folder, aside)
    sync(folder.parent)
    return aside


def _tells_of_save(row: Mapping[str, object]) -> bool:
    """Whether a row of metrics.jsonl or attempts.jsonl is behind a checkpoint that was written."""
    is_stop = row.get("code") == ExitCode.INTERRUPTED and bool(row.get("last_step"))
    return is_stop or ("perf/save_seconds" in row and not row.get("perf/failed_saves"))

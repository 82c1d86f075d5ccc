"""Checkpoints that are whole or absent: written aside, hashed, renamed, verified; JSON and safetensors only.

run_dir/checkpoints/step-NNNNNNNNNN/ holds adapter_model.safetensors and adapter_config.json (PEFT loads the folder as
it stands), optimizer.safetensors, trainer_state.json and manifest.json with the size and sha256 of each. The newest
checkpoint is the highest step whose manifest verifies; there is no pointer file that could be stale.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from train.run.durable import aside_name, make_folder, publish, sync, write_atomically
from train.run.exits import ExitCode, ExitWith

FORMAT_VERSION = 1
STEP_FOLDER = re.compile(r"step-(\d{10})")
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
OPTIMIZER, STATE, MANIFEST = "optimizer.safetensors", "trainer_state.json", "manifest.json"
OTHER_RUN = "it belongs to another run"
CONTENTS = (ADAPTER, ADAPTER_CONFIG, OPTIMIZER, STATE)
MAX_JSON_BYTES = 64 << 20  # ours have about 1 kB, and a few bytes for each skipped step
DISK_RESERVE = 1.2  # free space wanted before a save, in sizes of what is saved


@dataclass(frozen=True)
class TrainerState:
    """Everything about a moment of training that is not a tensor.

    No generator state: sample order and dropout are functions of seed and step (train/data.py, train/runtime.py).
    """

    step: int  # completed optimizer steps
    metrics_bytes: int  # length of metrics.jsonl at this step
    identity: dict[str, object]  # what must be equal for the continuation to be the same run
    layout: dict[str, object]  # what may differ as long as the global batch is equal
    versions: dict[str, str]
    skipped_steps: list[int] = field(default_factory=list)  # steps so far whose loss or gradient was not finite
    validation_loss: float | None = None  # measured after this step, if it was
    scaler: dict[str, float] = field(default_factory=dict)  # torch's GradScaler.state_dict(): empty but for fp16


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds, verified."""

    path: Path
    adapters: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    state: TrainerState


def adapter_files(adapters: Mapping[str, torch.Tensor], config: Mapping[str, object]) -> dict[str, bytes]:
    """The two files that PEFT loads; raises ExitWith(NON_FINITE) rather than publish a weight that is not a number."""
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in adapters.items()}
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise ExitWith(ExitCode.NON_FINITE, f"{broken[0]} and {len(broken) - 1} more hold non-finite values; not saved")
    return {
        ADAPTER: safetensors.torch.save(tensors, metadata={"format": "pt"}),
        ADAPTER_CONFIG: json.dumps(config, indent=2, sort_keys=True).encode(),
    }


class CheckpointStore:
    """The checkpoints of one run folder, in the hands of the process that writes them."""

    def __init__(self, run_dir: Path, keep: int) -> None:
        self.run_dir = run_dir
        self.root = run_dir / "checkpoints"
        self.keep = keep

    def run_uid(self) -> str:
        """The run's identity, made at its first start; checkpoints of another run are never taken for ours."""
        return self.run_record()["run_uid"]

    def save(self, files: Mapping[str, bytes], optimizer: Mapping[str, torch.Tensor], state: TrainerState) -> Path:
        """Makes the checkpoint of `state.step` durable, verifies it, and only then lets old ones go.

        Raises ExitWith(SAVE_FAILED) when it cannot be written or read back; what stood before still stands.
        """
        target = self.root / f"step-{state.step:010d}"
        contents = {
            **files,
            OPTIMIZER: safetensors.torch.save(dict(optimizer)),
            STATE: json.dumps(asdict(state), indent=2, sort_keys=True).encode(),
        }
        try:
            needed, free = int(sum(map(len, contents.values())) * DISK_RESERVE), free_bytes(self.run_dir)
            if free < needed:
                raise OSError(errno.ENOSPC, f"it needs {needed / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free")
            with publish(target) as folder:
                for name in CONTENTS:
                    _write(folder / name, contents[name])
                _write(folder / MANIFEST, _manifest(contents, state.step, self.run_uid()))
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
                return _read(folder)
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
        newer = [path for path in self._folders() if path.name > f"step-{found.state.step:010d}"]
        if folder.resolve().parent != self.root.resolve() and self._folders():
            reason = f"{self.run_dir} holds a run of its own; choose another --run.dir to go on from {folder}"
            raise ExitWith(ExitCode.BAD_INPUT, reason)
        for path in newer:
            print(f"{path.name} is newer than the chosen checkpoint; kept as {_set_aside(path, 'superseded').name}")
        return found

    def load(self, folder: Path) -> Checkpoint:
        """The content of `folder`, of whichever run; raises ExitWith(NO_VALID_CHECKPOINT) where it is not whole."""
        reason = self.defect(folder)
        if reason not in ("", OTHER_RUN):
            raise ExitWith(ExitCode.NO_VALID_CHECKPOINT, f"checkpoint {folder} is not usable: {reason}")
        return _read(folder)

    def defect(self, folder: Path) -> str:
        """Why `folder` is not a whole checkpoint of this run, or nothing."""
        try:
            return _irregularity(folder) or self._damage(folder)
        except OSError as error:
            return f"it cannot be read: {error}"
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            return f"{MANIFEST} cannot be understood: {error!r}"

    def _damage(self, folder: Path) -> str:
        written = _json_bytes(folder / MANIFEST)
        manifest = json.loads(written)
        claimed = manifest.pop("manifest_sha256")
        if claimed != _sha256(_canonical(manifest)) or written != _canonical({**manifest, "manifest_sha256": claimed}):
            return f"{MANIFEST} is damaged"
        if manifest["format_version"] != FORMAT_VERSION:
            return f"format version {manifest['format_version']}, this program reads {FORMAT_VERSION}"
        if set(manifest["files"]) != set(CONTENTS):
            return f"{MANIFEST} names other files: {', '.join(sorted(set(manifest['files']) ^ set(CONTENTS)))}"
        if STEP_FOLDER.fullmatch(folder.name) and folder.name != f"step-{manifest['step']:010d}":
            return f"it is the checkpoint of step {manifest['step']}, not {folder.name}"
        for name in CONTENTS:
            wanted = manifest["files"][name]
            # sizes first: a file of any length must not be read before it is known to be ours
            if (folder / name).stat().st_size != wanted["bytes"]:
                return f"{name} is damaged"
            content = (folder / name).read_bytes()
            if _sha256(content) != wanted["sha256"]:
                return f"{name} is damaged"
            if reason := _unreadable(folder / name, content):
                return f"{name} cannot be understood: {reason}"
        return "" if manifest["run_uid"] == self.run_uid() else OTHER_RUN

    def run_record(self) -> dict[str, str]:
        """run.json: the run's identity and its W&B id, made when they are first asked for.

        Where it is lost or damaged the identity of the newest checkpoint is taken, so that checkpoints outlive it.
        """
        path = self.run_dir / "run.json"
        with suppress(OSError, ValueError, TypeError, KeyError):
            record = json.loads(path.read_text(encoding="utf-8"))
            if record["run_uid"] and record["wandb_id"]:
                return record
        record = {"run_uid": self._uid_of_checkpoints() or uuid.uuid4().hex, "wandb_id": uuid.uuid4().hex[:8]}
        make_folder(self.run_dir)
        write_atomically(path, json.dumps(record) + "\n")
        return record

    def _uid_of_checkpoints(self) -> str:
        for folder in self._folders():
            with suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
                manifest = json.loads(_json_bytes(folder / MANIFEST))
                if manifest.pop("manifest_sha256") == _sha256(_canonical(manifest)):
                    return manifest["run_uid"]
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
            with suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
                loss = json.loads(_json_bytes(folder / STATE))["validation_loss"]
                if isinstance(loss, float) and math.isfinite(loss):
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
        for parent in (self.root, self.run_dir):
            for leftover in (*parent.glob(".tmp-*"), *parent.glob(".trash-*")):
                shutil.rmtree(leftover, ignore_errors=True)


def free_bytes(folder: Path) -> int:
    """What an ordinary user can still write where `folder` is, or will be."""
    while not folder.exists():
        folder = folder.parent
    status = os.statvfs(folder)
    return status.f_bavail * status.f_frsize


def _json_bytes(path: Path) -> bytes:
    """The content of a file not verified yet; raises ValueError where reading it could block or take all memory."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path.name} is not a file of ours")
    return path.read_bytes()


def _unreadable(file: Path, content: bytes) -> str:
    """Why a file with the right hash is still none of this program's, or nothing."""
    try:
        if file.name == STATE:
            TrainerState(**json.loads(content))
        elif file.name in (ADAPTER, OPTIMIZER):
            with safetensors.safe_open(file, "pt"):  # the header alone: deserialize() would copy all tensors
                pass
    except (safetensors.SafetensorError, ValueError, TypeError, RecursionError) as error:
        return repr(error)
    return ""


def _read(folder: Path) -> Checkpoint:
    """The content of a folder that has been verified."""
    return Checkpoint(
        folder,
        safetensors.torch.load((folder / ADAPTER).read_bytes()),
        safetensors.torch.load((folder / OPTIMIZER).read_bytes()),
        TrainerState(**json.loads((folder / STATE).read_bytes())),
    )


def _irregularity(folder: Path) -> str:
    """What is wrong with the folder's entries, or nothing; nothing in it is read."""
    if not folder.is_dir() or folder.is_symlink():
        return "it is not a folder"
    entries = list(os.scandir(folder))
    names, expected = {entry.name for entry in entries}, {*CONTENTS, MANIFEST}
    if names != expected:
        return f"missing or unexpected files: {', '.join(sorted(names ^ expected))}"
    irregular = [entry.name for entry in entries if not entry.is_file(follow_symlinks=False)]
    return f"{irregular[0]} is not a regular file" if irregular else ""


def _manifest(contents: Mapping[str, bytes], step: int, run_uid: str) -> bytes:
    files = {name: {"bytes": len(contents[name]), "sha256": _sha256(contents[name])} for name in CONTENTS}
    manifest = {"format_version": FORMAT_VERSION, "run_uid": run_uid, "step": step, "files": files}
    return _canonical({**manifest, "manifest_sha256": _sha256(_canonical(manifest))})


def _canonical(manifest: Mapping[str, object]) -> bytes:
    return json.dumps(manifest, sort_keys=True, indent=1).encode()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


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

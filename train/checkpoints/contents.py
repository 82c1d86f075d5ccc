"""What a checkpoint folder holds and how it is verified: JSON and safetensors only, hashed in a manifest.

The folder holds adapter_model.safetensors and adapter_config.json (PEFT loads it as it is), optimizer.safetensors,
trainer_state.json, and manifest.json with the size and sha256 of each.
"""

import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from train.run.exits import ExitCode, ExitWith
from train.run.folder import STEP_FOLDER

FORMAT_VERSION = 1
ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
OPTIMIZER, STATE, MANIFEST = "optimizer.safetensors", "trainer_state.json", "manifest.json"
CONTENTS = (ADAPTER, ADAPTER_CONFIG, OPTIMIZER, STATE)
# what reading JSON of any content, and looking into it, may raise
UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, RecursionError)
MAX_JSON_BYTES = 64 << 20  # ours have about 1 kB, and a few bytes for each skipped step


@dataclass(frozen=True)
class TrainerState:
    """Everything about a moment of training that is not a tensor.

    No generator state: sample order and dropout are functions of seed and step (train/data.py, train/seeds.py).
    """

    step: int  # completed optimizer steps
    metrics_bytes: int  # length of metrics.jsonl at this step
    identity: dict[str, object]  # what a resumed run must have in common with this one
    layout: dict[str, object]  # how the global batch is split, which may change
    versions: dict[str, str]
    skipped_steps: list[int] = field(default_factory=list)  # steps so far whose loss or gradient was not finite
    validation_loss: float | None = None  # measured after this step, if it was
    scaler: dict[str, float] = field(default_factory=dict)  # torch's GradScaler.state_dict(): empty but for fp16
    schedule: list[list[float]] = field(default_factory=list)  # start, rate and end of each decay; empty in 0.1.0
    answers_bytes: int = 0  # length of validation_answers.jsonl
    validation: dict[str, Any] = field(default_factory=dict)  # early_stop.ValidationRecord; empty in 0.1.0
    unlogged: dict[str, Any] = field(default_factory=dict)  # this step's metrics, if its validation was cut short


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint folder holds, verified."""

    path: Path
    adapters: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    state: TrainerState


def step_folder(step: int) -> str:
    """The name of the folder that holds the checkpoint of `step`."""
    return f"step-{step:010d}"


def step_of(folder: Path) -> int:
    """The step in the name of a checkpoint's folder; raises ValueError for another name."""
    found = STEP_FOLDER.fullmatch(folder.name)
    if found is None:
        raise ValueError(f"{folder} is no checkpoint's name")
    return int(found[1])


def adapter_files(adapters: Mapping[str, torch.Tensor], config: Mapping[str, object]) -> dict[str, bytes]:
    """The two files that PEFT loads; raises ExitWith(NON_FINITE) if a weight is not a finite number."""
    tensors = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in adapters.items()}
    broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise ExitWith(ExitCode.NON_FINITE, f"{broken[0]} and {len(broken) - 1} more hold non-finite values; not saved")
    return {
        ADAPTER: safetensors.torch.save(tensors, metadata={"format": "pt"}),
        ADAPTER_CONFIG: json.dumps(config, indent=2, sort_keys=True).encode(),
    }


def defect(folder: Path) -> tuple[str, str]:
    """(why `folder` is not a whole checkpoint, or nothing; the id of the run that wrote it, where it is whole)."""
    try:
        reason = _irregularity(folder)
        return (reason, "") if reason else _damage(folder)
    except OSError as error:
        return f"it cannot be read: {error}", ""
    except UNREADABLE as error:
        return f"{MANIFEST} cannot be understood: {error!r}", ""


def run_uid_of(folder: Path) -> str:
    """The id of the run that a manifest names, if the manifest is undamaged; raises OSError or one of UNREADABLE."""
    manifest = json.loads(_json_bytes(folder / MANIFEST))
    return manifest["run_uid"] if manifest.pop("manifest_sha256") == _sha256(_canonical(manifest)) else ""


def validation_of(folder: Path) -> tuple[float | None, str]:
    """The finite loss stored in a checkpoint not verified yet, and the fingerprint of the samples, empty in 0.1.0.

    Raises OSError or one of UNREADABLE.
    """
    state = json.loads(_json_bytes(folder / STATE))
    loss, own = state["validation_loss"], state.get("validation", {}).get("measured_on", "")
    return loss if isinstance(loss, float) and math.isfinite(loss) else None, own


def read(folder: Path) -> Checkpoint:
    """The content of a folder that has been verified."""
    return Checkpoint(
        folder,
        safetensors.torch.load((folder / ADAPTER).read_bytes()),
        safetensors.torch.load((folder / OPTIMIZER).read_bytes()),
        TrainerState(**json.loads((folder / STATE).read_bytes())),
    )


def manifest_of(contents: Mapping[str, bytes], step: int, run_uid: str) -> bytes:
    """manifest.json of a checkpoint with these files, with a hash of its own."""
    files = {name: {"bytes": len(contents[name]), "sha256": _sha256(contents[name])} for name in CONTENTS}
    manifest = {"format_version": FORMAT_VERSION, "run_uid": run_uid, "step": step, "files": files}
    return _canonical({**manifest, "manifest_sha256": _sha256(_canonical(manifest))})


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


def _damage(folder: Path) -> tuple[str, str]:
    """(what differs from the manifest, or nothing; the id of the run that the manifest names)."""
    written = _json_bytes(folder / MANIFEST)
    manifest = json.loads(written)
    claimed = manifest.pop("manifest_sha256")
    if claimed != _sha256(_canonical(manifest)) or written != _canonical({**manifest, "manifest_sha256": claimed}):
        return f"{MANIFEST} is damaged", ""
    if manifest["format_version"] != FORMAT_VERSION:
        return f"format version {manifest['format_version']}, this program reads {FORMAT_VERSION}", ""
    if set(manifest["files"]) != set(CONTENTS):
        return f"{MANIFEST} names other files: {', '.join(sorted(set(manifest['files']) ^ set(CONTENTS)))}", ""
    if STEP_FOLDER.fullmatch(folder.name) and folder.name != step_folder(manifest["step"]):
        return f"it is the checkpoint of step {manifest['step']}, not {folder.name}", ""
    for name in CONTENTS:
        wanted = manifest["files"][name]
        # sizes first: a file of unknown length must not be read
        if (folder / name).stat().st_size != wanted["bytes"]:
            return f"{name} is damaged", ""
        content = (folder / name).read_bytes()
        if _sha256(content) != wanted["sha256"]:
            return f"{name} is damaged", ""
        if reason := _unreadable(folder / name, content):
            return f"{name} cannot be understood: {reason}", ""
    return "", manifest["run_uid"]


def _unreadable(file: Path, content: bytes) -> str:
    """Why a file with the right hash still cannot be read as what it should be, or nothing."""
    try:
        if file.name == STATE:
            TrainerState(**json.loads(content))
        elif file.name in (ADAPTER, OPTIMIZER):
            with safetensors.safe_open(file, "pt"):  # the header alone: deserialize() would copy all tensors
                pass
    except (safetensors.SafetensorError, ValueError, TypeError, RecursionError) as error:
        return repr(error)
    return ""


def _json_bytes(path: Path) -> bytes:
    """The content of an unverified file; raises ValueError if reading it could block or exhaust memory."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode) or status.st_size > MAX_JSON_BYTES:
        raise ValueError(f"{path.name} is not a file of ours")
    return path.read_bytes()


def _canonical(manifest: Mapping[str, object]) -> bytes:
    return json.dumps(manifest, sort_keys=True, indent=1).encode()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()

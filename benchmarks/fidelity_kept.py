"""fp32's traces in a folder, for further calls of benchmarks.fidelity: each with all that it was made with."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file

from benchmarks.fidelity_runs import Adapters, Setting
from benchmarks.fidelity_trace import Trace

MADE_WITH, SECONDS, START = "made_with", "seconds", "start."  # in a file's metadata, and before the names of adapters


@dataclass(frozen=True)
class Kept:
    """What further calls need of a run."""

    trace: Trace
    start: Adapters  # where it began
    seconds: float


def keep(folder: Path, made_with: Mapping[str, Any], setting: Setting, of: Kept) -> None:
    """Writes a setting's run, whole or not at all; `made_with` is whatever decides it beside the setting."""
    folder.mkdir(parents=True, exist_ok=True)
    path = path_of(folder, setting)
    tensors = vars(of.trace) | {f"{START}{name}": tensor for name, tensor in of.start.items()}
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    save_file(tensors, temporary, {MADE_WITH: told(made_with, setting), SECONDS: repr(of.seconds)})
    temporary.replace(path)


def kept(folder: Path, made_with: Mapping[str, Any], setting: Setting) -> Kept | None:
    """A setting's run; None where there is none, or one that was made with something else, which is said."""
    path = path_of(folder, setting)
    if not path.exists():
        return None
    with safe_open(path, "pt") as file:
        about = file.metadata()
        if about[MADE_WITH] != told(made_with, setting):
            known, wanted = json.loads(about[MADE_WITH]), json.loads(told(made_with, setting))
            other = ", ".join(name for name in wanted if wanted[name] != known.get(name))
            print(f"{path} was made with another {other}: made anew", flush=True)
            return None
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
    start = {name.removeprefix(START): tensors.pop(name) for name in [*tensors] if name.startswith(START)}
    return Kept(Trace(**tensors), start, float(about[SECONDS]))


def path_of(folder: Path, setting: Setting) -> Path:
    """A setting's file."""
    return folder / f"fp32-{setting.base}-{setting.rate!r}-{setting.seed}.safetensors"


def told(made_with: Mapping[str, Any], setting: Setting) -> str:
    """All that a trace depends on."""
    return json.dumps({**made_with, **asdict(setting)}, sort_keys=True)

"""The adapters of a finished run as what they add to the weights of the base."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from train.checkpoints.contents import ADAPTER, ADAPTER_CONFIG
from train.run.exits import ExitCode, ExitWith
from train.run.folder import read_object

PREFIX = "base_model.model."  # which PEFT puts before the names of the base's modules


@dataclass(frozen=True)
class Delta:
    """What one adapter adds to its layer's weight."""

    a: torch.Tensor  # fp32 [r, K]
    b: torch.Tensor  # fp32 [N, r]
    scale: float

    def on(self, device: torch.device) -> torch.Tensor:
        """scale B A in fp32, [N, K]."""
        return self.scale * (self.b.to(device) @ self.a.to(device))


def read_deltas(folder: Path) -> dict[str, Delta]:
    """The adapters of a PEFT folder by the name of the module of the base that each belongs to.

    Raises ExitWith(BAD_INPUT) where the folder holds anything else, which a merge would lose.
    """
    settings = read_object(folder / ADAPTER_CONFIG)
    try:
        tensors = safetensors.torch.load_file(folder / ADAPTER)
        rank, alpha = int(settings["r"]), float(settings["lora_alpha"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ExitWith(ExitCode.BAD_INPUT, f"{folder}: the adapter cannot be read: {error}") from None
    scale = alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank
    deltas: dict[str, Delta] = {}
    for name in sorted(tensors):
        module, is_a, _ = name.removeprefix(PREFIX).partition(".lora_A.weight")
        if is_a:
            b = tensors.get(f"{PREFIX}{module}.lora_B.weight")
            if b is None:
                raise ExitWith(ExitCode.BAD_INPUT, f"{folder}: {name} has no lora_B")
            deltas[module] = Delta(tensors[name].float(), b.float(), scale)
    merged = {f"{PREFIX}{module}.lora_{half}.weight" for module in deltas for half in "AB"}
    others = sorted(tensors.keys() - merged) + _other_kinds(settings)
    if others:
        reason = f"{', '.join(others[:3])} would be lost: only LoRA on linear layers is merged"
        raise ExitWith(ExitCode.BAD_INPUT, f"{folder}: {reason}")
    return deltas


def _other_kinds(settings: dict[str, Any]) -> list[str]:
    """Settings of PEFT under which an adapter is not scale B A."""
    return [name for name in ("use_dora", "rank_pattern", "alpha_pattern", "lora_bias") if settings.get(name)]

"""What a finished run has trained, as what it changes in the base: sums to weights, rows, and whole layers."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from train.checkpoints.contents import ADAPTER, ADAPTER_CONFIG
from train.models.text_part import PEFT_PREFIX, Names
from train.run.exits import ExitCode, ExitWith
from train.run.folder import read_object

ROWS = ".token_adapter.trainable_tokens_delta"


@dataclass(frozen=True)
class Delta:
    """What one adapter adds to its layer's weight."""

    a: torch.Tensor  # fp32 [r, K]
    b: torch.Tensor  # fp32 [N, r]
    scale: float

    def on(self, device: torch.device) -> torch.Tensor:
        """scale B A in fp32, [N, K]."""
        return self.scale * (self.b.to(device) @ self.a.to(device))


@dataclass(frozen=True)
class ExpertDelta:
    """What adapters add to one linear layer of each of E experts, as PEFT stores them.

    The rows of A are the ranks of each expert in turn, the columns of B each rank of all experts in turn.
    """

    a: torch.Tensor  # fp32 [E r, K]
    b: torch.Tensor  # fp32 [N, r E]
    settings: dict[str, Any]  # of adapter_config.json

    @property
    def shape(self) -> tuple[int, int]:
        """N and K of the layer."""
        return self.b.shape[0], self.a.shape[1]

    def of(self, expert: int, num_experts: int, parameter: str, device: torch.device) -> torch.Tensor:
        """scale B A of one expert in fp32, [N, K]."""
        rank = self.a.shape[0] // num_experts
        patterns = self.settings.get("alpha_pattern") or {}
        found = [value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", parameter)]
        scale = _scale(self.settings, float(found[0] if found else self.settings["lora_alpha"]), rank)
        a = self.a.view(num_experts, rank, -1)[expert].to(device)
        return scale * (self.b.view(-1, rank, num_experts)[:, :, expert].to(device) @ a)


@dataclass(frozen=True)
class Rows:
    """Trained rows of an embedding or a head."""

    ids: list[int]
    values: torch.Tensor  # fp32 [len(ids), H]

    def put_into(self, weight: torch.Tensor, size: int) -> torch.Tensor:
        """The weight, [V, H], with at least `size` rows and these in their places."""
        more = weight.float().mean(0, keepdim=True).to(weight.dtype).expand(max(0, size - len(weight)), -1)
        whole = torch.cat([weight, more])
        whole[self.ids] = self.values.to(weight)
        return whole


@dataclass(frozen=True)
class Trained:
    """Everything that was trained, by the names of the base's parameters."""

    deltas: dict[str, Delta]
    rows: dict[str, Rows]
    whole: dict[str, torch.Tensor]
    experts: dict[str, list[ExpertDelta]]  # by the names of modules of experts: of some of their parameters
    vocabulary: int  # rows that embedding and head need; 0: as many as they have

    @property
    def names(self) -> set[str]:
        """Of all parameters that it changes."""
        return {*self.deltas, *self.rows, *self.whole}

    def shared(self, base: torch.nn.Module) -> str:
        """Which adapted weight several layers share, as Zamba's do, with adapters of their own; empty for none."""
        owners: dict[int, list[str]] = {}
        for name, parameter in base.named_parameters(remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(name)
        groups = [names for names in owners.values() if len(names) > 1 and not self.deltas.keys().isdisjoint(names)]
        return f"{groups[0][0]} is one weight of {len(groups[0])} layers with adapters of their own" if groups else ""

    def misfits(self, shapes: Mapping[str, Sequence[int]]) -> list[str]:
        """Modules of experts with an adapter that fits none of their parameters, by the shapes of all parameters."""
        fitting: dict[str, set[tuple[int, int]]] = {}
        for name, shape in shapes.items():
            if len(shape) == 3:
                fitting.setdefault(name.rpartition(".")[0], set()).add((shape[1], shape[2]))
        return [
            module
            for module, deltas in self.experts.items()
            if any(delta.shape not in fitting.get(module, ()) for delta in deltas)
        ]

    def of_expert(self, parameter: str, shape: Sequence[int], expert: int, device: torch.device) -> torch.Tensor | None:
        """What is added to one expert's part [N, K] of a parameter [E, N, K], fp32; None where it has no adapter."""
        for delta in self.experts.get(parameter.rpartition(".")[0], []):  # PEFT does not say which parameter it is of
            if delta.shape == tuple(shape[1:]):
                return delta.of(expert, shape[0], parameter, device)
        return None


def read_trained(folder: Path, vocabulary: int, names: Names) -> Trained:
    """What a PEFT folder holds, by the names of the class that was trained.

    Raises ExitWith(BAD_INPUT) where it is more than is known here, which would be lost.
    """
    settings = read_object(folder / ADAPTER_CONFIG)
    try:
        tensors = safetensors.torch.load_file(folder / ADAPTER)
        rank, alpha = int(settings["r"]), float(settings["lora_alpha"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ExitWith(ExitCode.BAD_INPUT, f"{folder}: the adapter cannot be read: {error}") from None
    scale = _scale(settings, alpha, rank)
    trained, lost = Trained({}, {}, {}, {}, vocabulary), _other_kinds(settings)
    tensors = {names.text(name): tensor for name, tensor in tensors.items()}
    layers = [names.text(layer) for layer in settings.get("modules_to_save") or []]
    halves = {name.removeprefix(PEFT_PREFIX) for name in tensors}
    for name, tensor in tensors.items():
        known = name.removeprefix(PEFT_PREFIX)
        module, is_a, _ = known.partition(".lora_A.weight")
        other = tensors.get(f"{PEFT_PREFIX}{module}.lora_B.weight")
        experts = module.replace(".base_layer", "") if settings.get("target_parameters") else ""
        if is_a and other is not None and experts.endswith(".experts"):
            trained.experts.setdefault(experts, []).append(ExpertDelta(tensor.float(), other.float(), settings))
        elif is_a and other is not None:
            trained.deltas[f"{module}.weight"] = Delta(tensor.float(), other.float(), scale)
        elif known.endswith(ROWS):
            layer = known.removesuffix(ROWS)
            trained.rows[f"{layer}.weight"] = Rows(_ids(settings, names.served(layer)), tensor.float())
        elif known.removesuffix(".weight") in layers:
            trained.whole[known] = tensor.float()
        elif not (known.endswith(".lora_B.weight") and known.replace(".lora_B.", ".lora_A.") in halves):
            lost.append(name)
    if lost:
        reason = f"{', '.join(sorted(lost)[:3])} would be lost: LoRA on linear layers, rows and whole layers are merged"
        raise ExitWith(ExitCode.BAD_INPUT, f"{folder}: {reason}")
    return trained


def _scale(settings: dict[str, Any], alpha: float, rank: int) -> float:
    """What B A is multiplied by."""
    return alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank


def _ids(settings: dict[str, Any], layer: str) -> list[int]:
    """The trained rows of a layer, as adapter_config.json has them: for each layer, or once."""
    found: Any = settings.get("trainable_token_indices")
    return list(found[layer] if isinstance(found, dict) else found)


def _other_kinds(settings: dict[str, Any]) -> list[str]:
    """Settings of PEFT under which an adapter is not scale B A."""
    known = ("rank_pattern", "alpha_pattern") if settings.get("target_parameters") else ()  # of experts' parameters
    kinds = ("use_dora", "rank_pattern", "alpha_pattern", "lora_bias")
    return [name for name in kinds if settings.get(name) and name not in known]

"""What benchmarks.fidelity keeps of a run, and how far two of them are apart; peers' processes write it as well."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

MEASURES = {
    "loss_distance": "distance of each step's loss from fp32's, each run along its own way",
    "loss_excess": "how much higher the loss is than fp32's, mean over steps: rounding alone goes either way",
    "update_distance": "distance of what the adapters have moved after each step from fp32's, over its norm",
    "first_gradient_cosine": "of the first step's gradient and fp32's, at the same adapters",
    "last_gradient_cosine": "the same of the last step's rows, at the adapters that fp32 has before that step",
    "last_gradient_distance": "of those two gradients, over the norm of fp32's",
    "last_loss_distance": "of the losses there",
}


@dataclass(frozen=True)
class Trace:
    """A run of S steps on the host; adapters of N elements are one fp32 vector, in the order of their names."""

    losses: torch.Tensor  # [S + 1], fp64: of each step, and of the last one's rows at fp32's adapters before it
    adapters: torch.Tensor  # [S + 1, N]: before the first step and behind each
    gradients: torch.Tensor  # [2, N]: of the first step, and at fp32's adapters as above

    def save(self, path: Path) -> None:
        """As one safetensors file."""
        save_file(vars(self), path)

    @classmethod
    def load(cls, path: Path) -> "Trace":
        """What `save` wrote."""
        return cls(**load_file(path))


class Recorder:
    """Fills the Trace of a run of S steps as it goes on; every copy of the adapters is written where it stays."""

    def __init__(self, parameters: Mapping[str, torch.nn.Parameter], num_steps: int) -> None:
        self.parameters = {name: parameters[name] for name in sorted(parameters)}
        self.losses: list[float] = []
        self.adapters = torch.empty(num_steps + 1, sum(each.numel() for each in parameters.values()))
        self.num_noted = 0
        self.gradients: list[torch.Tensor] = []

    def note_adapters(self) -> None:
        """Adds a copy of them."""
        self.adapters[self.num_noted] = flat(self.parameters)
        self.num_noted += 1

    def note_gradient(self) -> None:
        """Adds a copy of it; zeros where a parameter has none."""
        grads = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in self.parameters.items()}
        self.gradients.append(flat(grads).cpu())

    def trace(self) -> Trace:
        """All that was noted."""
        assert self.num_noted == len(self.adapters)
        return Trace(torch.tensor(self.losses, dtype=torch.float64), self.adapters, torch.stack(self.gradients))


def flat(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """All of them as one fp32 vector on their device, in the order of their names.

    So that one copy takes it to the host: several hundred small ones would wait for the GPU each.
    """
    return torch.cat([tensors[name].detach().float().flatten() for name in sorted(tensors)])


def unflattened(vector: torch.Tensor, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors that `flat` made the vector of, in the shapes of `like`."""
    parts = vector.split([like[name].numel() for name in sorted(like)])
    return {name: part.view(like[name].shape).clone() for name, part in zip(sorted(like), parts, strict=True)}


def put_into(parameters: Mapping[str, torch.nn.Parameter], tensors: Mapping[str, torch.Tensor]) -> None:
    """Copies tensors of the same names into the parameters, whatever their type; raises ValueError for others."""
    if parameters.keys() != tensors.keys():
        different = sorted(parameters.keys() ^ tensors.keys())
        raise ValueError(f"{len(different)} adapters are only in one of the two systems, such as {different[0]}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def distances(own: Trace, wanted: Trace) -> dict[str, Any]:
    """MEASURES of a run against fp32's: lists by step, and numbers."""
    higher = own.losses - wanted.losses
    apart = higher.abs().tolist()
    # step by step: all steps' updates would be as large as both traces
    updates = (
        (mine - own.adapters[0], theirs - wanted.adapters[0])
        for mine, theirs in zip(own.adapters[1:], wanted.adapters[1:], strict=True)
    )
    (first, last), (wanted_first, wanted_last) = own.gradients, wanted.gradients
    return {
        "loss_distance": rounded(apart[:-1]),
        "loss_excess": float(higher[:-1].mean()),
        "update_distance": rounded([relative(*each) for each in updates]),
        "first_gradient_cosine": cosine(first, wanted_first),
        "last_gradient_cosine": cosine(last, wanted_last),
        "last_gradient_distance": relative(last, wanted_last),
        "last_loss_distance": apart[-1],
    }


def rounded(values: list[float]) -> list[float]:
    """To five digits, for the file."""
    return [float(f"{value:.5g}") for value in values]


def relative(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """The distance of `found` from `wanted` over the norm of `wanted`."""
    return float((found - wanted).norm() / wanted.norm())


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    """Of the angle between two vectors, in fp64: fp32 would tell 0.9999999 from 1 no more."""
    return float(torch.nn.functional.cosine_similarity(one.double(), other.double(), dim=0))

"""What is told of a base that was loaded."""

from dataclasses import dataclass
from typing import Any

import torch

from train.models.held_weights import HeldWeights
from train.models.hub import BasePlace
from train.models.targets import Targets
from train.models.text_part import Names


@dataclass(frozen=True)
class BaseFacts:
    """What is told of the base that was loaded."""

    place: BasePlace
    held: HeldWeights
    targets: Targets
    notes: list[str]  # on its files
    names: Names

    def identity(self) -> dict[str, Any]:
        """What is delivered beside an adapter: the base's name, its commit or none, how it was held, and of a
        multimodal one the class that serves it."""
        held = ", ".join(self.held.quantized) or self.held.type_of_others
        served = {"served_as": self.names.served_as} if self.names.served_as else {}
        return {"name": self.place.name, "commit": self.place.commit, "held": held, **served}


def own_dropout(base: torch.nn.Module) -> list[str]:
    """Notes on the dropout that the base brings with it, and on routers' noise, which act while it is trained."""
    shape: Any = base.config
    text = shape.get_text_config(decoder=True)
    rates = {f"{module.p}" for module in base.modules() if isinstance(module, torch.nn.Dropout) and module.p > 0}
    if rate := getattr(text, "attention_dropout", None):
        rates.add(f"attention_dropout {rate}")
    notes = [f"it has dropout of its own, which acts while training: {', '.join(sorted(rates))}"] if rates else []
    noises = {name: getattr(text, name, None) for name in ("router_jitter_noise", "input_jitter_noise")}
    if told := ", ".join(f"{name} {noise}" for name, noise in noises.items() if noise):
        notes.append(f"its routers have noise of their own, which acts while training: {told}")
    return notes

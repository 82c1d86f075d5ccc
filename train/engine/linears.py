"""Linear layers of a base, and their adapters, as the engine sees transformers', PEFT's and bitsandbytes' modules."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch

ADAPTER = "default"  # PEFT's name of the one adapter that is trained


class Linear(Protocol):
    """A linear layer: one of the base, quantised or not, or half of an adapter."""

    weight: torch.nn.Parameter  # [N, K], or bitsandbytes' packed bytes
    bias: torch.Tensor | None  # [N]
    in_features: int
    out_features: int


class ExpertLinear:
    """The same linear layer of all E experts of a mixture: one parameter of three dimensions, or its packed bytes."""

    def __init__(self, experts: torch.nn.Module, name: str) -> None:
        self.experts, self.name = experts, name

    @property
    def weight(self) -> torch.nn.Parameter:
        """[E, N, K], or [E, K, N] where they are transposed, or bitsandbytes' packed bytes of [E, N, K]."""
        return getattr(self.experts, self.name)

    @weight.setter
    def weight(self, value: torch.nn.Parameter) -> None:
        setattr(self.experts, self.name, value)

    @property
    def shape(self) -> tuple[int, int, int]:
        """E, N and K."""
        state: Any = getattr(self.weight, "quant_state", None)
        num_experts, num_outputs, num_inputs = self.turned(self.weight).shape if state is None else state.shape
        return num_experts, num_outputs, num_inputs

    @property
    def bias(self) -> torch.Tensor | None:
        """[E, N]."""
        return getattr(self.experts, f"{self.name}_bias", None)

    @property
    def is_transposed(self) -> bool:
        """Whether transformers' module computes with [E, K, N]."""
        return bool(getattr(self.experts, "is_transposed", False))

    def turned(self, values: torch.Tensor) -> torch.Tensor:
        """Values [E, N, K] as transformers' module computes with them, or its values as [E, N, K]."""
        return values.transpose(1, 2) if self.is_transposed else values

    @property
    def in_features(self) -> int:
        """K."""
        return self.shape[2]

    @property
    def out_features(self) -> int:
        """E N: those of all experts."""
        return self.shape[0] * self.shape[1]


def innermost(experts: Any) -> torch.nn.Module:
    """A mixture's experts without the wrappers that PEFT puts around them, one a parameter."""
    while hasattr(experts, "lora_A"):
        experts = experts.base_layer
    return experts


class Router(Protocol):
    """Chooses each token's experts: (logits, weights [T, k], experts [T, k]) of hidden states [T, H]."""

    def __call__(self, hidden_states: torch.Tensor, /) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As transformers' routers."""
        ...


class AdaptedLinear(Protocol):
    """PEFT's layer around a frozen one; adapters by name."""

    base_layer: Linear
    lora_A: Mapping[str, Linear]
    lora_B: Mapping[str, Linear]
    lora_dropout: Mapping[str, torch.nn.Module]
    scaling: Mapping[str, float]


@dataclass(frozen=True)
class Adapter:
    """One linear layer's LoRA adapter, in fp32."""

    a: torch.nn.Parameter  # [r, K]
    b: torch.nn.Parameter  # [N, r]
    scale: float
    dropout: float

    @property
    def rank(self) -> int:
        """r."""
        return self.a.shape[0]


@dataclass(frozen=True)
class Projection:
    """A linear layer of the base with its adapter, if it has one."""

    base: Linear
    adapter: Adapter | None

    @classmethod
    def of(cls, module: torch.nn.Module) -> "Projection":
        """Reads PEFT's layer, or a plain one."""
        if not hasattr(module, "lora_A"):
            return cls(cast(Linear, module), None)
        adapted = cast(AdaptedLinear, module)
        dropout = getattr(adapted.lora_dropout[ADAPTER], "p", 0.0)  # PEFT puts an Identity where there is none
        a, b = adapted.lora_A[ADAPTER].weight, adapted.lora_B[ADAPTER].weight
        return cls(adapted.base_layer, Adapter(a, b, adapted.scaling[ADAPTER], dropout))

    @classmethod
    def of_experts(cls, module: Any, name: str) -> "Projection":
        """Reads one parameter of a mixture's experts, around which PEFT's wrappers may be, one a parameter."""
        adapter, base = None, cast(Linear, ExpertLinear(innermost(module), name))
        while hasattr(module, "lora_A"):
            if module.parameter_name == name:
                a, b = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight  # [r E, K], [N, r E]
                adapter = Adapter(a, b, module.scaling[ADAPTER], 0.0)
            module = module.base_layer
        return cls(base, adapter)

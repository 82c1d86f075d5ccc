"""The optimizer, and its state by parameter name."""

import importlib
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from bitsandbytes.optim.optimizer import Optimizer2State, Optimizer8bit

from train.config import OptimConfig

BLOCK = 256  # elements that share a scale of bitsandbytes' 8-bit state
LARGEST = 2**31 - BLOCK  # elements of a flat parameter of several: bitsandbytes counts them in 32 bits
MIN_8BIT_SIZE = 4096  # elements: bitsandbytes keeps the state of smaller tensors in fp32
RATE_FACTOR = "rate_factor"  # of a group of parameters: by what its learning rate is multiplied


@dataclass(frozen=True)
class OptimizerKind:
    """One value of optim.name."""

    build: Callable[..., torch.optim.Optimizer]
    in_triton: Callable[..., torch.optim.Optimizer]  # where the GPU has it
    is_8bit: bool  # bitsandbytes' blockwise 8-bit state
    is_paged: bool = False  # its state moves to host memory when the GPU is full


def _torch_adamw(groups: list[dict[str, Any]], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(groups, fused=groups[0]["params"][0].is_cuda, lr=lr, weight_decay=weight_decay)


class _InTriton(Optimizer2State):
    """bitsandbytes' 8-bit AdamW on a GPU, whose own kernel updates its state at an eighth of what memory allows.

    Nor does it wait for each parameter's update (Optimizer8bit.step does), so whoever reads paged state waits.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Updates every parameter from its gradient."""
        assert closure is None
        for group_index, group in enumerate(self.param_groups):
            for index, parameter in enumerate(group["params"]):
                if not self.state[parameter]:
                    self.init_state(group, parameter, group_index, index)
                self.prefetch_state(parameter)
                self.update_step(group, parameter, group_index, index)

    @torch.no_grad()
    def update_step(self, group: dict[str, Any], p: torch.nn.Parameter, gindex: int, pindex: int) -> None:
        """An update of one parameter; those too small for 8-bit state are left to bitsandbytes."""
        state = self.state[p]
        if state["state1"].dtype != torch.uint8:
            super().update_step(group, p, gindex, pindex)
            return
        state["step"] += 1
        kernels = importlib.import_module("train.optim_kernels")
        kernels.adamw(p, p.grad, state, group)


class AdamW8bit(_InTriton, bnb.optim.AdamW8bit):
    """Updated in Triton."""


class PagedAdamW8bit(_InTriton, bnb.optim.PagedAdamW8bit):
    """Updated in Triton."""


OPTIMIZERS = {
    "paged_adamw_8bit": OptimizerKind(bnb.optim.PagedAdamW8bit, PagedAdamW8bit, is_8bit=True, is_paged=True),
    "adamw_8bit": OptimizerKind(bnb.optim.AdamW8bit, AdamW8bit, is_8bit=True),
    "adamw": OptimizerKind(_torch_adamw, _torch_adamw, is_8bit=False),
}
NamedParameters = Mapping[str, torch.nn.Parameter]


@dataclass(frozen=True)
class Place:
    """Where a parameter lies in the flat ones that the optimizer updates."""

    leaf: int
    start: int
    stop: int


class FlatParameters:
    """The adapters concatenated in one fp32 parameter, so that an update is one kernel and a reduction one call.

    With LoRA+ there are two, because B has another learning rate than A.

    The 448 adapter matrices of an 8B model cost 25 to 90 ms of launches a step, as one 0.5 ms. The named parameters
    become views, their gradients too. Each begins at a multiple of BLOCK elements, where bitsandbytes begins a block of
    its 8-bit state, and those too small for 8-bit state stay alone: so the update is the same, bit for bit.
    """

    def __init__(self, named: NamedParameters, lora_plus_ratio: float = 1.0) -> None:
        self.named = dict(named)
        self.leaves: list[torch.nn.Parameter] = []
        self.rate_factors: list[float] = []  # of each leaf's learning rate
        self.places: dict[str, Place] = {}
        factors = {name: rate_factor(name, parameter, lora_plus_ratio) for name, parameter in named.items()}
        for factor in dict.fromkeys(factors.values()):
            self._add_flat({name: parameter for name, parameter in named.items() if factors[name] == factor}, factor)
        for name, parameter in named.items():
            if name in self.places:
                self._move(parameter, self.places[name])
            else:
                self.places[name] = Place(len(self.leaves), 0, parameter.numel())
                self.leaves.append(parameter)
                self.rate_factors.append(factors[name])
                parameter.grad = torch.zeros_like(parameter)

    def _add_flat(self, named: NamedParameters, factor: float) -> None:
        """Leaves, one unless it is too large, with room for those of the parameters that have 8-bit state."""
        sizes: list[int] = []
        for name, parameter in named.items():
            if parameter.numel() >= MIN_8BIT_SIZE:
                if not sizes or sizes[-1] + parameter.numel() > LARGEST:
                    sizes.append(0)
                start = sizes[-1]
                self.places[name] = Place(len(self.leaves) + len(sizes) - 1, start, start + parameter.numel())
                sizes[-1] += -(-parameter.numel() // BLOCK) * BLOCK
        like = next(iter(named.values()))
        for size in sizes:
            leaf = torch.nn.Parameter(torch.zeros(size, dtype=like.dtype, device=like.device))
            leaf.grad = torch.zeros_like(leaf)
            self.leaves.append(leaf)
            self.rate_factors.append(factor)

    def _move(self, parameter: torch.nn.Parameter, place: Place) -> None:
        leaf = self.leaves[place.leaf]
        assert leaf.grad is not None
        view = leaf.data[place.start : place.stop].view(parameter.shape)
        view.copy_(parameter.data)
        parameter.data = view
        parameter.grad = leaf.grad[place.start : place.stop].view(parameter.shape)

    def leaf(self, name: str) -> torch.nn.Parameter:
        """The flat parameter that `name` is a part of, or itself."""
        return self.leaves[self.places[name].leaf]

    def zero_grad(self) -> None:
        """Gradients become zeros where they are: they stay views."""
        for leaf in self.leaves:
            assert leaf.grad is not None
            leaf.grad.zero_()


def rate_factor(name: str, parameter: torch.nn.Parameter, lora_plus_ratio: float) -> float:
    """By what a parameter's learning rate is multiplied: LoRA+'s ratio for what PEFT's create_loraplus_optimizer counts
    as B."""
    return lora_plus_ratio if "lora_B" in name or parameter.dim() == 1 else 1.0


def build_optimizer(flat: FlatParameters, config: OptimConfig, has_triton: bool = False) -> torch.optim.Optimizer:
    """AdamW over the flat parameters, a group for each factor of the learning rate, which is set before every step.

    `has_triton`: whether they are on a GPU that runs Triton's kernels.
    """
    # without a GPU there is nothing to page from; bitsandbytes says so once for each run
    warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for leaf, factor in zip(flat.leaves, flat.rate_factors, strict=True):
        groups.setdefault(factor, []).append(leaf)
    described = [{"params": leaves, RATE_FACTOR: factor} for factor, leaves in groups.items()]
    kind = OPTIMIZERS[config.name]
    return (kind.in_triton if has_triton else kind.build)(described, lr=config.lr, weight_decay=config.weight_decay)


def build_scaler(dtype: str, device: torch.device) -> torch.amp.GradScaler:
    """The loss scaler of fp16, whose small gradients would be rounded to zero; disabled for other types."""
    return torch.amp.GradScaler(device.type, enabled=dtype == "fp16")


def load_scaler_state(scaler: torch.amp.GradScaler, state: Mapping[str, float]) -> None:
    """Restores a saved loss scale; raises ValueError where `state` is not this scaler's (it is empty but for fp16)."""
    if set(state) != set(scaler.state_dict()):
        raise ValueError(f"the loss scaler's state is {dict(state)}")
    scaler.load_state_dict(dict(state))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of the next update: `rate`, times its factor in each group."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group[RATE_FACTOR]


def optimizer_state(optimizer: torch.optim.Optimizer, flat: FlatParameters) -> dict[str, torch.Tensor]:
    """The optimizer's tensors on the CPU, named `parameter/key`, without bitsandbytes' constant quantisation maps."""
    state = {}
    if any(leaf.is_cuda for leaf in flat.leaves):
        torch.cuda.synchronize()  # an update may still write paged state, which copies do not wait for
    for name, parameter in flat.named.items():
        for key, value in _parts(optimizer.state[flat.leaf(name)], flat.places[name], parameter.shape).items():
            # step counts are ints in bitsandbytes and tensors in torch; paged memory must be copied, not viewed
            state[f"{name}/{key}"] = torch.as_tensor(value).detach().to("cpu", copy=True).contiguous()
    return state


def _parts(state: Mapping, place: Place, shape: torch.Size) -> dict:
    """One parameter's views of a leaf's state: an entry an element, absmax an entry a block, the step count whole."""
    parts = {}
    for key, value in state.items():
        if key.startswith("absmax"):
            parts[key] = value[place.start // BLOCK : -(-place.stop // BLOCK)]
        elif key == "step":
            parts[key] = value
        elif not key.startswith("qmap"):
            parts[key] = value.flatten()[place.start : place.stop].view(shape)
    return parts


def state_bytes(parameters: Iterable[torch.nn.Parameter], config: OptimConfig) -> int:
    """Bytes of the tensors that optimizer_state will return after the first step.

    bitsandbytes keeps tensors of fewer than MIN_8BIT_SIZE elements in fp32, others in two bytes an element and two fp32
    scales a BLOCK (Optimizer2State.init_state).
    """
    sizes = [parameter.numel() for parameter in parameters]
    if not OPTIMIZERS[config.name].is_8bit:
        return sum(8 * size + 4 for size in sizes)
    return sum(8 + (8 * size if size < MIN_8BIT_SIZE else 2 * size + 8 * math.ceil(size / BLOCK)) for size in sizes)


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, flat: FlatParameters, state: Mapping[str, torch.Tensor]
) -> None:
    """Puts `state` back bit for bit, into buffers that the optimizer itself makes, so that paged ones are paged again.

    bitsandbytes' own load_state_dict would replace paged buffers by resident ones and take hyperparameters from the
    checkpoint. Raises ValueError where names or shapes differ from what this optimizer keeps. There is none, and the
    optimizer begins, where every step before was skipped.
    """
    if not state:
        return
    for group_index, group in enumerate(optimizer.param_groups):
        for index, leaf in enumerate(group["params"]):
            _make_state(optimizer, leaf, group_index, index)
    expected: set[str] = set()
    for name, parameter in flat.named.items():
        leaf_state = optimizer.state[flat.leaf(name)]
        for key, part in _parts(leaf_state, flat.places[name], parameter.shape).items():
            full_name = f"{name}/{key}"
            expected.add(full_name)
            if full_name not in state:
                raise ValueError(f"the optimizer state has no {full_name}")
            saved = state[full_name]
            if not isinstance(part, torch.Tensor):
                leaf_state[key] = int(saved.item())
            elif part.shape != saved.shape or part.dtype != saved.dtype:
                raise ValueError(
                    f"{full_name} is {saved.dtype} {list(saved.shape)} in the checkpoint, "
                    f"{part.dtype} {list(part.shape)} in this run"
                )
            else:
                part.copy_(saved)
    unknown = sorted(set(state) - expected)
    if unknown:
        raise ValueError(f"the optimizer state has unknown entries: {', '.join(unknown[:3])}")


def _make_state(optimizer: torch.optim.Optimizer, leaf: torch.nn.Parameter, group_index: int, index: int) -> None:
    """The state that the optimizer starts `leaf` with, installed in the optimizer."""
    if isinstance(optimizer, Optimizer8bit):
        optimizer.init_state(optimizer.param_groups[group_index], leaf, group_index, index)
    else:
        optimizer.state[leaf] = {
            "step": torch.tensor(0.0, device=leaf.device if leaf.is_cuda else None),
            "exp_avg": torch.zeros_like(leaf),
            "exp_avg_sq": torch.zeros_like(leaf),
        }

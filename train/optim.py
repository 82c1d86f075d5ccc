"""The optimizer, its state by parameter name, and the learning rate as a pure function of the step."""

import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import bitsandbytes as bnb
import torch
from bitsandbytes.optim.optimizer import Optimizer8bit

from train.config import OptimConfig

NamedParameters = Mapping[str, torch.nn.Parameter]


def learning_rate(step: int, total_steps: int, config: OptimConfig) -> float:
    """The rate of optimizer step `step`, counted from 0: linear warmup to `lr`, then the schedule's decay towards 0."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup) / max(1, total_steps - config.warmup)
    if config.schedule == "linear":
        return config.lr * (1 - progress)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True)
class Place:
    """Where a parameter lies in the flat one that the optimizer sees."""

    leaf: int
    start: int
    stop: int


class FlatParameters:
    """The adapters behind one another in one fp32 parameter, so that a step is one kernel and one reduction.

    448 adapters of an 8B model cost an optimizer step 25 to 90 ms of launches, and 0.5 ms as one. The named parameters
    become views, their gradients too. Each begins at a multiple of BLOCK elements, where bitsandbytes begins a block of
    its 8-bit state, and those too small for 8-bit state stay alone: so the update is the same, bit for bit.
    """

    BLOCK = 256
    SMALLEST = 4096  # bitsandbytes' min_8bit_size: below it state is fp32

    def __init__(self, named: NamedParameters) -> None:
        self.named = dict(named)
        self.leaves: list[torch.nn.Parameter] = []
        self.places: dict[str, Place] = {}
        size = 0
        for name, parameter in named.items():
            if parameter.numel() >= self.SMALLEST:
                self.places[name] = Place(0, size, size + parameter.numel())
                size += -(-parameter.numel() // self.BLOCK) * self.BLOCK
        if size:
            first = next(iter(named.values()))
            self.leaves.append(torch.nn.Parameter(torch.zeros(size, dtype=first.dtype, device=first.device)))
            self.leaves[0].grad = torch.zeros_like(self.leaves[0])
        for name, parameter in named.items():
            if name in self.places:
                self._move(parameter, self.places[name])
            else:
                self.places[name] = Place(len(self.leaves), 0, parameter.numel())
                self.leaves.append(parameter)
                parameter.grad = torch.zeros_like(parameter)

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


def build_optimizer(flat: FlatParameters, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW over the flat parameters; the rate is set before every step."""
    options = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.name == "paged_adamw_8bit":
        # without a GPU there is nothing to page from; bitsandbytes says so once for each run
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
        return bnb.optim.PagedAdamW8bit(flat.leaves, **options)
    if config.name == "adamw_8bit":
        return bnb.optim.AdamW8bit(flat.leaves, **options)
    return torch.optim.AdamW(flat.leaves, fused=flat.leaves[0].is_cuda, **options)


def build_scaler(dtype: str, device: torch.device) -> torch.amp.GradScaler:
    """The loss scale of fp16, whose gradients would be rounded to zero without one; for other types it does nothing."""
    return torch.amp.GradScaler(device.type, enabled=dtype == "fp16")


def load_scaler_state(scaler: torch.amp.GradScaler, state: Mapping[str, float]) -> None:
    """Goes on with a saved scale; raises ValueError where `state` is not this scaler's (it is empty without fp16)."""
    if set(state) != set(scaler.state_dict()):
        raise ValueError(f"the loss scaler's state is {dict(state)}")
    scaler.load_state_dict(dict(state))


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Makes `rate` the one that the next step uses."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def optimizer_state(optimizer: torch.optim.Optimizer, flat: FlatParameters) -> dict[str, torch.Tensor]:
    """The optimizer's tensors on the CPU as `name/key`, without bitsandbytes' constant quantisation maps."""
    state = {}
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
            parts[key] = value[place.start // FlatParameters.BLOCK : -(-place.stop // FlatParameters.BLOCK)]
        elif key == "step":
            parts[key] = value
        elif not key.startswith("qmap"):
            parts[key] = value.flatten()[place.start : place.stop].view(shape)
    return parts


def state_bytes(parameters: Iterable[torch.nn.Parameter], config: OptimConfig) -> int:
    """Bytes of the tensors that optimizer_state will return after the first step.

    bitsandbytes keeps matrices of fewer than 4,096 elements in fp32, others in two bytes an element and two fp32 scales
    a block of 256 (Optimizer2State.init_state).
    """
    total = 0
    for parameter in parameters:
        size = parameter.numel()
        if config.name == "adamw":
            total += 8 * size + 4
        else:
            total += 8 + (8 * size if size < 4096 else 2 * size + 8 * math.ceil(size / 256))
    return total


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, flat: FlatParameters, state: Mapping[str, torch.Tensor]
) -> None:
    """Puts `state` back bit for bit, into buffers that the optimizer itself makes, so that paged ones are paged again.

    bitsandbytes' own load_state_dict would replace paged buffers by resident ones and take hyperparameters from the
    checkpoint. Raises ValueError where names or shapes differ from what this optimizer keeps.
    """
    for index, leaf in enumerate(flat.leaves):
        _make_state(optimizer, leaf, index)
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


def _make_state(optimizer: torch.optim.Optimizer, leaf: torch.nn.Parameter, index: int) -> None:
    """The state that the optimizer starts `leaf` with, installed in the optimizer; all are in one group."""
    if isinstance(optimizer, Optimizer8bit):
        optimizer.init_state(optimizer.param_groups[0], leaf, 0, index)
    else:
        optimizer.state[leaf] = {
            "step": torch.tensor(0.0, device=leaf.device if leaf.is_cuda else None),
            "exp_avg": torch.zeros_like(leaf),
            "exp_avg_sq": torch.zeros_like(leaf),
        }

"""The optimizer, its state by parameter name, and the learning rate as a pure function of the step."""

import math
import warnings
from collections.abc import Mapping

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


def build_optimizer(parameters: NamedParameters, config: OptimConfig) -> torch.optim.Optimizer:
    """AdamW over `parameters`; the rate is set before every step."""
    options = {"lr": config.lr, "weight_decay": config.weight_decay}
    values = list(parameters.values())
    if config.name == "paged_adamw_8bit":
        # without a GPU there is nothing to page from; bitsandbytes says so once for each run
        warnings.filterwarnings("ignore", message="Paged optimizers are not supported on CPU")
        return bnb.optim.PagedAdamW8bit(values, **options)
    if config.name == "adamw_8bit":
        return bnb.optim.AdamW8bit(values, **options)
    return torch.optim.AdamW(values, **options)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Makes `rate` the one that the next step uses."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def optimizer_state(optimizer: torch.optim.Optimizer, parameters: NamedParameters) -> dict[str, torch.Tensor]:
    """The optimizer's tensors on the CPU as `name/key`, without bitsandbytes' constant quantisation maps."""
    state = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state[parameter].items():
            if not key.startswith("qmap"):
                # step counts are ints in bitsandbytes and tensors in torch; paged memory must be copied, not viewed
                state[f"{name}/{key}"] = torch.as_tensor(value).detach().to("cpu", copy=True).contiguous()
    return state


def state_bytes(parameters: NamedParameters, config: OptimConfig) -> int:
    """Bytes of the tensors that optimizer_state will return after the first step.

    bitsandbytes keeps matrices of fewer than 4,096 elements in fp32, others in two bytes an element and two fp32 scales
    a block of 256 (Optimizer2State.init_state).
    """
    total = 0
    for parameter in parameters.values():
        size = parameter.numel()
        if config.name == "adamw":
            total += 8 * size + 4
        else:
            total += 8 + (8 * size if size < 4096 else 2 * size + 8 * math.ceil(size / 256))
    return total


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: NamedParameters, state: Mapping[str, torch.Tensor]
) -> None:
    """Puts `state` back bit for bit, into buffers that the optimizer itself makes, so that paged ones are paged again.

    bitsandbytes' own load_state_dict would replace paged buffers by resident ones and take hyperparameters from the
    checkpoint. Raises ValueError where names or shapes differ from what this optimizer keeps.
    """
    expected: set[str] = set()
    for index, (name, parameter) in enumerate(parameters.items()):
        buffers = _fresh_state(optimizer, parameter, index)
        for key, buffer in buffers.items():
            if key.startswith("qmap"):
                continue
            full_name = f"{name}/{key}"
            expected.add(full_name)
            if full_name not in state:
                raise ValueError(f"the optimizer state has no {full_name}")
            saved = state[full_name]
            if not isinstance(buffer, torch.Tensor):
                buffers[key] = int(saved.item())
            elif buffer.shape != saved.shape or buffer.dtype != saved.dtype:
                raise ValueError(
                    f"{full_name} is {saved.dtype} {list(saved.shape)} in the checkpoint, "
                    f"{buffer.dtype} {list(buffer.shape)} in this run"
                )
            else:
                buffer.copy_(saved)
    unknown = sorted(set(state) - expected)
    if unknown:
        raise ValueError(f"the optimizer state has unknown entries: {', '.join(unknown[:3])}")


def _fresh_state(optimizer: torch.optim.Optimizer, parameter: torch.nn.Parameter, index: int) -> dict:
    """The state that the optimizer starts `parameter` with, installed in the optimizer; all are in one group."""
    if isinstance(optimizer, Optimizer8bit):
        optimizer.init_state(optimizer.param_groups[0], parameter, 0, index)
    else:
        optimizer.state[parameter] = {
            "step": torch.tensor(0.0),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
    return optimizer.state[parameter]

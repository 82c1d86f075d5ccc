"""Numbers about a run; the only place where a value is fetched from the device."""

import time
from typing import Any

import torch

from train.models.experts import expert_linears


def to_host(*scalars: torch.Tensor) -> list[float]:
    """The values of device scalars, in one transfer."""
    return torch.stack([scalar.detach().double() for scalar in scalars]).tolist()


def num_chosen_experts(shape: Any) -> int:
    """Experts of a mixture that a token goes through; 0 where there is none."""
    return getattr(shape, "num_experts_per_tok", None) or 0


def num_matmul_weights(model: torch.nn.Module, num_chosen: int = 0) -> int:
    """Weights of the base's linear layers, the head among them: no adapters, no trained copies, no embedding.

    Of a mixture's experts the `num_chosen` that a token goes through.
    """
    experts = [linear.shape for _, linear in expert_linears(model)]
    active = sum(num_chosen * num_outputs * num_inputs for _, num_outputs, num_inputs in experts)
    return active + sum(
        module.in_features * module.out_features
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "lora_" not in name and "modules_to_save" not in name
    )


def flops_per_token(num_weights: int, shape: Any, mean_length: float, are_trained: bool = False) -> float:
    """FLOPs that training one token costs when the base is frozen: forward and input gradient, nothing recomputed.

    2 a weight in the forward and in the backward pass, and 2 where it is trained, plus causal attention's two products
    (2 x hidden x length forward in a layer, 2.5 times that backward).
    """
    return (6 if are_trained else 4) * num_weights + 3.5 * shape.num_hidden_layers * 2 * shape.hidden_size * mean_length


def mfu(flops: float, seconds: float, peak_flops: float, num_processes: int) -> float:
    """Model FLOPs utilisation: the share of what all GPUs, one a process, could compute by their datasheet."""
    return flops / seconds / peak_flops / num_processes


class Pace:
    """Keeps the host at most one micro-batch ahead of the device: what is queued can no longer be stopped."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.queued: list[torch.cuda.Event] = []  # the ends of micro-batches that the device has not reached, or one

    def mark(self) -> None:
        """Called when a micro-batch is queued; waits for the one before it."""
        if self.device.type == "cuda":
            self.queued.append(torch.cuda.Event())
            self.queued[-1].record()
            if len(self.queued) > 1:
                self.queued.pop(0).synchronize()


class Stopwatch:
    """Seconds between two looks, and the allocator's peaks since the process started."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.restart()

    def restart(self) -> None:
        """Leaves out what happened since the last look, such as saving."""
        self.since = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last look or restart."""
        now = time.perf_counter()
        seconds, self.since = now - self.since, now
        return seconds

    def peak_gib(self) -> dict[str, float]:
        """Largest allocated and reserved GPU memory so far; nothing on a CPU."""
        if self.device.type != "cuda":
            return {}
        return {
            "memory/peak_allocated_gib": round(torch.cuda.max_memory_allocated(self.device) / 2**30, 3),
            "memory/peak_reserved_gib": round(torch.cuda.max_memory_reserved(self.device) / 2**30, 3),
        }

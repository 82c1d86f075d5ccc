"""Numbers about a run; the only place where a value is fetched from the device."""

import time
from typing import Any

import torch

# Dense bf16 TFLOP/s by datasheet, found by a part of the device's name.
PEAK_TFLOPS = {
    "H200": 989,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "RTX 4090": 165,
    "RTX 3090": 71,
    "A10": 125,
}


def read(*scalars: torch.Tensor) -> list[float]:
    """The values of device scalars, in one transfer."""
    return torch.stack([scalar.detach().double() for scalar in scalars]).tolist()


def flops_per_token(model: torch.nn.Module, shape: Any, mean_length: float) -> float:
    """FLOPs that training one token costs when the base is frozen: forward and input gradient, nothing recomputed.

    2 a weight in each of the two passes through every linear layer of the base, the head among them, plus causal
    attention's two products (2 x hidden x length forward in a layer, 2.5 times that backward). Adapters are left out.
    """
    linear = sum(
        module.in_features * module.out_features
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "lora_" not in name
    )
    return 4 * linear + 3.5 * shape.num_hidden_layers * 2 * shape.hidden_size * mean_length


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bf16 FLOP/s where its datasheet is known here, else None."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for part, tflops in PEAK_TFLOPS.items() if part in name), None)


class Stopwatch:
    """Seconds and peak memory between two looks; peaks are the allocator's, as the process sees them."""

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

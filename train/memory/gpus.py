"""GPUs as the plan sees them: how fast they compute, read their memory and are read from the host."""

import math
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from train.run import devices

CONTEXT_BYTES = int(0.45 * 2**30)  # of a card's memory are CUDA's own: 0.3 to 0.5 GiB


@dataclass(frozen=True)
class Gpu:
    """Rates are what long runs sustain, not the datasheet's."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]
    flops: float  # a second, of products in 16 bits, or in the type that `computing` was told
    fp32_flops: float
    bandwidth: float  # bytes a second, read and written
    bus: float  # bytes a second from page-locked host memory, each way
    has_graphs: bool = False  # passes may be recorded
    host_bytes: int = 2**62  # that may be page-locked

    @property
    def usable_bytes(self) -> int:
        """What a program can allocate where nothing else runs."""
        return self.memory_bytes - CONTEXT_BYTES

    def computing(self, is_fp32: bool, is_deterministic: bool) -> "Gpu":
        """The card as a run uses it: its rate in that type, and whether passes are recorded.

        A run that is resumed launches its first pass where the other replays: no graphs for who wants the same bits.
        """
        has_graphs = self.capability >= devices.FLASH and not is_fp32 and not is_deterministic
        return replace(self, flops=self.fp32_flops if is_fp32 else self.flops, has_graphs=has_graphs)


def _card(name: str, gib: float, capability: tuple[int, int], rates: tuple[float, float, float, float]) -> Gpu:
    tflops, fp32_tflops, bandwidth, bus = rates
    return Gpu(name, int(gib * 2**30), capability, tflops * 1e12, fp32_tflops * 1e12, bandwidth * 1e9, bus * 1e9)


# GiB, compute capability; TFLOP/s in 16 bits and in fp32, GB/s of memory, GB/s of the bus. H200 and H100 are measured
# in 16 bits (docs/LOG.md), others the datasheet's dense rate for sums in fp32, times 0.7, and 0.85 of its bandwidth.
KNOWN = [
    _card("H200", 140.0, (9, 0), (735, 47, 4300, 54)),
    _card("H100", 79.2, (9, 0), (725, 47, 3000, 54)),
    _card("A100-80", 79.2, (8, 0), (218, 13.6, 1730, 24)),
    _card("A100-40", 39.4, (8, 0), (218, 13.6, 1320, 24)),
    _card("L40S", 44.4, (8, 9), (250, 64, 730, 24)),
    _card("L4", 22.0, (8, 9), (60, 21, 255, 24)),
    _card("A10", 22.0, (8, 6), (87, 22, 510, 24)),
    _card("RTX-4090", 23.6, (8, 9), (115, 58, 857, 24)),
    _card("RTX-3090", 23.6, (8, 6), (50, 25, 795, 24)),
    _card("RTX-3060", 11.8, (8, 6), (18, 9, 306, 24)),
    _card("RTX-3050-4GB", 3.8, (8, 6), (12, 4, 163, 12)),
    _card("T4", 14.6, (7, 5), (25, 5.7, 272, 12)),
    _card("GTX-1650", 3.8, (7, 5), (4, 2, 109, 12)),
    _card("GTX-1050-Ti", 3.9, (6, 1), (1.5, 1.5, 95, 12)),
]


def known_gpu(name: str) -> Gpu | None:
    """The card of this name, however it is written (`a100-80`, `NVIDIA A100-SXM4-80GB`); None for others.

    Parts of a card, and those of laptops, are others.
    """
    words = name.upper().replace("-", " ").replace("_", " ").split()
    if {"MIG", "LAPTOP", "MAX", "MOBILE"} & set(words):
        return None
    for card in KNOWN:
        parts = card.name.upper().split("-")
        if all(any(part == word or (part.isdigit() and word == f"{part}GB") for word in words) for part in parts):
            return card
    return None


def detect_gpu(device: torch.device, dtype: torch.dtype) -> Gpu:
    """The GPU of this process, measured for some 50 ms where it is none of the known ones."""
    properties = torch.cuda.get_device_properties(device)
    capability = devices.capability(device)
    total = properties.total_memory
    card = known_gpu(properties.name)
    if card is None:
        product, memory, bus = _rates(device, dtype)
        card = Gpu(properties.name, total, capability, product, product, memory, bus)
    card = replace(card, memory_bytes=total, capability=capability, host_bytes=free_host_bytes())
    return card.computing(dtype == torch.float32, torch.are_deterministic_algorithms_enabled())


def cpu_rates() -> Gpu:
    """A CPU: nothing is capped and nothing recorded, so its rates decide nothing."""
    return Gpu("CPU", 0, (0, 0), 1e11, 1e11, 1e10, 1e10)


def free_host_bytes() -> int:
    """Host memory that this process may still take, less a tenth: its share of the machine's, or of its container's."""
    free = []
    with suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")))
    with suppress(OSError, ValueError):  # cgroup 2; "max" where there is no limit
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        free.append(limit - used)
    return int(0.9 * min(free)) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if free else 2**62


def _rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float, float]:
    """(FLOP/s, bytes/s of memory, bytes/s of the bus): the best of five of each, and 0.85 of it."""
    a = torch.randn(2048, 2048, device=device).to(dtype)
    host = torch.empty(2**25, dtype=torch.uint8, pin_memory=True)
    near, far = (torch.empty(2**25, dtype=torch.uint8, device=device) for _ in "ab")
    product = _best(lambda: torch.mm(a, a))
    moved = _best(lambda: far.copy_(near))
    fetched = _best(lambda: near.copy_(host, non_blocking=True))
    return 0.85 * 2 * 2048**3 / product, 0.85 * 2 * 2**25 / moved, 0.85 * 2**25 / fetched


def _best(action: Callable[[], torch.Tensor]) -> float:
    best = math.inf
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        action()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best

"""The GPUs that we know, the only table of them, and what the plan and MFU need: memory, capability, rates."""

import math
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from data_tools.spelling import nearest
from train.run import devices

CONTEXT_BYTES = int(0.45 * 2**30)  # bytes of GPU memory that CUDA's context takes: 0.3 to 0.5 GiB
LINK = 250e9  # bytes/s over NVLink from one GPU to another; the plan needs a hundredth of it
# Bytes/s that all GPUs of a machine read from its memory together, each over a bus of its own. An estimate: eight
# channels of DDR4-3200, as a socket has, do 205 by datasheet, of DDR5-4800 307; two sockets more, from either's memory
HOST_BANDWIDTH = 200e9
NVLINK = ("B200", "H200", "H100", "A100-80", "A100-40")  # of the table's, as machines with several have them
BLACKWELL = (10, 0)
VARIANTS = {"TI", "SUPER", "D"}  # words of cards that compute otherwise than those named without
BRIDGED = ("RTX-3090",)  # of GeForce cards, those that an NVLink bridge may join
MEASURED_SHARE = 0.85  # of the best of five short measurements, as what a long run sustains


@dataclass(frozen=True)
class Gpu:
    """A GPU as a run uses it. Rates are what long runs sustain; only `peak_flops` is the datasheet's."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]  # CUDA compute capability
    flops: float  # FLOP/s of matrix products in 16 bits, or in the type that `computing` was given
    fp32_flops: float  # FLOP/s of matrix products in fp32
    bandwidth: float  # bytes/s of GPU memory, reads and writes together
    bus: float  # bytes/s between pinned host memory and the GPU, in each direction
    peak_flops: float | None = None  # dense FLOP/s by datasheet, which MFU is a share of; None: unknown
    has_nvlink: bool = False  # to the other GPUs of its machine
    has_graphs: bool = False  # training passes may run as CUDA graphs
    launch_time: float = 1.0  # that its host takes to launch a kernel, in that of the host that was measured
    max_host_bytes: int = 2**62  # host memory that may be pinned, by all processes of the machine

    @property
    def link(self) -> float:
        """Bytes/s that it reads from other GPUs' memory."""
        return LINK if self.has_nvlink else self.bus

    @property
    def no_peers(self) -> str:
        """Why GPUs of this name cannot read each other's memory, as far as is known; empty where they may.

        From the RTX 30 on GeForce drivers offer it over NVLink alone (accelerate's check_cuda_p2p_ib_support, NVIDIA's
        nccl#1127 and #1637); patched drivers and other cards are not judged, cudaDeviceCanAccessPeer knows.
        """
        if not re.match(r"RTX-[345]0\d\d", self.name):
            return ""
        if self.name in BRIDGED:
            return f"GeForce drivers let {self.name} cards read each other's memory over an NVLink bridge alone"
        return f"GeForce drivers give {self.name} cards no access to each other's memory"

    @property
    def is_untried(self) -> bool:
        """Whether nothing of this project ever ran on a GPU of its generation."""
        return self.capability >= BLACKWELL

    @property
    def usable_bytes(self) -> int:
        """GPU memory that a process can allocate where nothing else runs."""
        return self.memory_bytes - CONTEXT_BYTES

    def computing(self, is_fp32: bool, is_deterministic: bool) -> "Gpu":
        """The GPU as a run of this type uses it: its rate of products, and whether it uses graphs.

        A deterministic run uses none: a resumed run executes its first micro-batch eagerly where the uninterrupted one
        replays a graph, and the two may round differently.
        """
        has_graphs = self.capability >= devices.FLASH and not is_fp32 and not is_deterministic
        return replace(self, flops=self.fp32_flops if is_fp32 else self.flops, has_graphs=has_graphs)


def _gpu(
    name: str, gib: float, capability: tuple[int, int], peak_tflops: float, rates: tuple[float, float, float, float]
) -> Gpu:
    tflops, fp32_tflops, bandwidth, bus = rates
    return Gpu(
        name=name,
        memory_bytes=int(gib * 2**30),
        capability=capability,
        flops=tflops * 1e12,
        fp32_flops=fp32_tflops * 1e12,
        bandwidth=bandwidth * 1e9,
        bus=bus * 1e9,
        peak_flops=peak_tflops * 1e12,
        has_nvlink=name in NVLINK,
    )


# Columns: memory in GiB; compute capability; the datasheet's dense TFLOP/s with sums in fp32, in bf16, or in fp16 where
# there is no bf16, or in fp32 where fp16 is slow; then what long runs sustain: TFLOP/s in 16 bits and in fp32, GB/s of
# memory, GB/s of the bus. H200's and H100's 16-bit rates are measured (docs/LOG.md); others are 0.7 of the datasheet's
# products and 0.85 of its bandwidth. Less of the products where the power does not allow the datasheet's clock: 0.4 to
# 0.5 on L4 and T4 (some 70 W), 0.52 on A10 (150 W: its base clock is 885 MHz, and 125 TFLOP/s are those of 1,695).
# GeForce cards add in fp32 at half the rate of their datasheets' first figure (RTX 3090: 71, not 142), A10 and L40S do
# not. Sources: NVIDIA's datasheets of H100 (PCIe: 756 TFLOP/s, 51 in fp32, 2,000 GB/s, 350 W; SXM: 989, 67, 3,350),
# A100 (2,039 and 1,555 GB/s), A10 (600), L4 (300), L40S (864), T4 (320), and the GA102 and AD102 architecture papers
# (RTX 3090: 936 GB/s, RTX 3080: 59.5 and 760, RTX 4090: 165 and 1,008, RTX 4080: 97.5 and 717, RTX 4070 Ti: 80 and
# 504), RTX A6000 (155 and 768), V100 (of its SXM2 card; 900), Blackwell's (RTX 5090: 209.5 and 1,792, RTX 5080: 112.6
# and 960; DGX B200: 8 times 2,250, 75 in fp32, 8,000). Nothing ran on Blackwell. The bus is PCIe 5, 4 or 3 with 16
# lanes (RTX 3050: 8), less a sixth to a quarter. A name that holds another's words comes before it.
KNOWN_GPUS = [
    _gpu("B200", 178.0, (10, 0), 2250, (1575, 52, 6800, 54)),
    _gpu("H200", 140.0, (9, 0), 989, (715, 47, 4300, 54)),
    _gpu("H100-PCIe", 79.2, (9, 0), 756, (529, 36, 1700, 54)),
    _gpu("H100", 79.2, (9, 0), 989, (745, 47, 3000, 54)),
    _gpu("A100-80", 79.2, (8, 0), 312, (218, 13.6, 1730, 24)),
    _gpu("A100-40", 39.4, (8, 0), 312, (218, 13.6, 1320, 24)),
    _gpu("L40S", 44.4, (8, 9), 362, (250, 64, 730, 24)),
    _gpu("L4", 22.0, (8, 9), 121, (60, 21, 255, 24)),
    _gpu("A10", 22.0, (8, 6), 125, (65, 16, 510, 24)),
    _gpu("RTX-A6000", 47.4, (8, 6), 155, (108, 27, 653, 24)),
    _gpu("RTX-5090", 31.4, (12, 0), 209.5, (147, 73, 1523, 54)),
    _gpu("RTX-5080", 15.5, (12, 0), 112.6, (79, 39, 816, 54)),
    _gpu("RTX-4090", 23.6, (8, 9), 165, (115, 58, 857, 24)),
    _gpu("RTX-4080", 15.7, (8, 9), 97.5, (68, 34, 609, 24)),
    _gpu("RTX-4070-Ti", 11.7, (8, 9), 80, (56, 28, 428, 24)),
    _gpu("RTX-3090", 23.6, (8, 6), 71, (50, 25, 795, 24)),
    _gpu("RTX-3080", 9.7, (8, 6), 59.5, (42, 21, 646, 24)),
    _gpu("RTX-3060", 11.8, (8, 6), 25.5, (18, 9, 306, 24)),
    _gpu("RTX-3050-4GB", 3.8, (8, 6), 17, (12, 4, 163, 12)),  # its peak is estimated from the sustained rate
    _gpu("V100-32", 31.7, (7, 0), 125, (88, 11, 765, 12)),
    _gpu("V100-16", 15.7, (7, 0), 125, (88, 11, 765, 12)),
    _gpu("T4", 14.6, (7, 5), 65, (25, 5.7, 272, 12)),
    _gpu("GTX-1650", 3.8, (7, 5), 6, (4, 2, 109, 12)),
    _gpu("GTX-1050-Ti", 3.9, (6, 1), 2.1, (1.5, 1.5, 95, 12)),
]


def known_gpu(name: str) -> Gpu | None:
    """The GPU of this name, as people write it (`a100-80`) or the driver does (`NVIDIA A100-SXM4-80GB`), or None.

    MIG slices of a GPU and laptop GPUs are not known: they are slower than their names say. Nor is a card's variant.
    """
    words = name.upper().replace("-", " ").replace("_", " ").split()
    if {"MIG", "LAPTOP", "MAX", "MOBILE"} & set(words):
        return None
    for gpu in KNOWN_GPUS:
        parts = gpu.name.upper().split("-")
        if VARIANTS & set(words) <= set(parts) and all(
            any(part == word or (part.isdigit() and word == f"{part}GB") for word in words) for part in parts
        ):
            return gpu
    return None


def named_gpu(text: str) -> Gpu | None:
    """The GPU that a person means, whatever the case and punctuation: `rtx4090`, `RTX 4090` and `4090` are one."""
    found = known_gpu(text)
    typed = _squashed(text)
    return found or next((gpu for gpu in KNOWN_GPUS if typed in _spellings(gpu)), None)


def gpus_like(text: str) -> list[Gpu]:
    """The GPUs that a name which is none may have meant: those that it begins, or else the one most like it."""
    typed = _squashed(text)
    begun = [gpu for gpu in KNOWN_GPUS if typed and any(name.startswith(typed) for name in _spellings(gpu))]
    near = "" if begun else nearest(typed, [name for gpu in KNOWN_GPUS for name in _spellings(gpu)], cutoff=0.9)
    return begun or [gpu for gpu in KNOWN_GPUS if near in _spellings(gpu)]


def gpus_of_size(num_bytes: int) -> list[Gpu]:
    """The GPUs that are sold with this memory, of which up to a tenth is missing in what they have."""
    return [gpu for gpu in KNOWN_GPUS if 0.9 * num_bytes <= gpu.memory_bytes <= num_bytes]


def _squashed(text: str) -> str:
    return re.sub(r"nvidia|geforce|tesla|[^a-z0-9]", "", text.lower())


def _spellings(gpu: Gpu) -> set[str]:
    """A GPU's name without punctuation, with and without its series, and with the unit of its size."""
    name = _squashed(gpu.name)
    sizes = {name, f"{name}gb", f"{name}gib"} if re.search(r"-\d+$", gpu.name) else {name}
    return sizes | {each.removeprefix("rtx").removeprefix("gtx") for each in sizes}


def peak_flops(device: torch.device) -> float | None:
    """The device's dense FLOP/s by datasheet, which MFU is a share of; None for a CPU and for unknown GPUs."""
    gpu = known_gpu(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return gpu.peak_flops if gpu else None


def detect_gpu(device: torch.device, dtype: torch.dtype) -> Gpu:
    """The GPU of this process, as a run of this type uses it; one that is not known is measured for some 50 ms."""
    properties = torch.cuda.get_device_properties(device)
    capability = devices.capability(device)
    total = properties.total_memory
    gpu = known_gpu(properties.name)
    if gpu is None:
        products, bandwidth, bus = _measured_rates(device, dtype)
        gpu = Gpu(properties.name, total, capability, products, products, bandwidth, bus)
    gpu = replace(gpu, memory_bytes=total, capability=capability, max_host_bytes=machine_host_bytes())
    return gpu.computing(dtype == torch.float32, torch.are_deterministic_algorithms_enabled())


def cpu_rates() -> Gpu:
    """A CPU in place of a GPU: it has no memory limit and no graphs, so its rates decide nothing."""
    return Gpu("CPU", 0, (0, 0), 1e11, 1e11, 1e10, 1e10)


def free_host_bytes() -> int:
    """Host memory that this process may take: local processes have equal shares of the machine's."""
    return machine_host_bytes() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def machine_host_bytes() -> int:
    """Host memory that all processes of this machine may take: 0.9 of what is free on it, or in its container.

    Unlimited where neither can be read.
    """
    free = []
    with suppress(OSError, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")))
    with suppress(OSError, ValueError):  # cgroup 2; "max" where there is no limit
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        free.append(limit - used)
    return int(0.9 * min(free)) if free else 2**62


def _measured_rates(device: torch.device, dtype: torch.dtype) -> tuple[float, float, float]:
    """(FLOP/s, bytes/s of memory, bytes/s of the bus), each MEASURED_SHARE of the best of five tries."""
    a = torch.randn(2048, 2048, device=device).to(dtype)
    host = torch.empty(2**25, dtype=torch.uint8, pin_memory=True)
    near, far = (torch.empty(2**25, dtype=torch.uint8, device=device) for _ in "ab")
    product = _best_seconds(lambda: torch.mm(a, a))
    moved = _best_seconds(lambda: far.copy_(near))
    fetched = _best_seconds(lambda: near.copy_(host, non_blocking=True))
    return (
        MEASURED_SHARE * 2 * 2048**3 / product,
        MEASURED_SHARE * 2 * 2**25 / moved,
        MEASURED_SHARE * 2**25 / fetched,
    )


def _best_seconds(action: Callable[[], torch.Tensor]) -> float:
    best = math.inf
    for _ in range(5):
        torch.cuda.synchronize()
        start = time.perf_counter()
        action()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best

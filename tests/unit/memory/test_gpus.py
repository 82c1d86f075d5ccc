"""One table of GPUs: every real device name finds its row, and no other does; how much host memory may be pinned."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from train.memory import gpus
from train.memory.gpus import KNOWN_GPUS, detect_gpu, gpus_like, gpus_of_size, known_gpu, named_gpu, peak_flops
from train.run.devices import compute_type_at

MIB = 2**20
# As the driver has them, and as people write them; and the peak by datasheet, TFLOP/s
NAMES = {
    "NVIDIA H200": ("H200", 989),
    "NVIDIA H100 80GB HBM3": ("H100", 989),
    "NVIDIA H100 PCIe": ("H100-PCIe", 756),
    "h100": ("H100", 989),
    "NVIDIA A100-SXM4-80GB": ("A100-80", 312),
    "NVIDIA A100 80GB PCIe": ("A100-80", 312),
    "NVIDIA A100-PCIE-40GB": ("A100-40", 312),
    "NVIDIA A100-SXM4-40GB": ("A100-40", 312),
    "a100-40": ("A100-40", 312),
    "NVIDIA L40S": ("L40S", 362),
    "NVIDIA L4": ("L4", 121),
    "NVIDIA A10": ("A10", 125),
    "NVIDIA B200": ("B200", 2250),
    "NVIDIA RTX A6000": ("RTX-A6000", 155),
    "NVIDIA GeForce RTX 5090": ("RTX-5090", 209.5),
    "NVIDIA GeForce RTX 5080": ("RTX-5080", 112.6),
    "NVIDIA GeForce RTX 4080": ("RTX-4080", 97.5),
    "NVIDIA GeForce RTX 4070 Ti": ("RTX-4070-Ti", 80),
    "NVIDIA GeForce RTX 3080": ("RTX-3080", 59.5),
    "Tesla V100-SXM2-16GB": ("V100-16", 125),
    "Tesla V100-PCIE-32GB": ("V100-32", 125),
    "NVIDIA GeForce RTX 4090": ("RTX-4090", 165),
    "NVIDIA GeForce RTX 3090": ("RTX-3090", 71),
    "NVIDIA GeForce RTX 3060": ("RTX-3060", 25.5),
    "rtx-3050-4gb": ("RTX-3050-4GB", 17),
    "Tesla T4": ("T4", 65),
    "NVIDIA GeForce GTX 1650": ("GTX-1650", 6),
    "NVIDIA GeForce GTX 1050 Ti": ("GTX-1050-Ti", 2.1),
    "gtx-1050-ti": ("GTX-1050-Ti", 2.1),
}
UNKNOWN = (
    "NVIDIA L40",
    "NVIDIA A10G",
    "NVIDIA A100",  # of which size is not said
    "NVIDIA GeForce RTX 3050 Laptop GPU",
    "NVIDIA GeForce RTX 4090 Laptop GPU",
    "NVIDIA GeForce GTX 1650 with Max-Q Design",
    "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
    "NVIDIA H100 80GB HBM3 MIG 3g.40gb",
    "Tesla V100",  # of which size is not said
    "NVIDIA GeForce RTX 3060 Ti",
    "NVIDIA GeForce RTX 4070 Ti SUPER",
    "NVIDIA GeForce RTX 4080 SUPER",
    "NVIDIA GeForce RTX 4090 D",
    "NVIDIA RTX 6000 Ada Generation",
    "4GiB",
)


def test_gpus_are_known_by_their_names() -> None:
    """As the driver has them, and as people write them; others are not guessed."""
    for written, (name, peak) in NAMES.items():
        gpu = known_gpu(written)
        assert gpu is not None, written
        assert (gpu.name, gpu.peak_flops) == (name, peak * 1e12), written
    assert {name for name, _ in NAMES.values()} == {gpu.name for gpu in KNOWN_GPUS}
    for written in UNKNOWN:
        assert known_gpu(written) is None, written
    assert len({gpu.name for gpu in KNOWN_GPUS}) == len(KNOWN_GPUS)


# what people type -> the GPU, or those that are suggested
TYPED = {
    "rtx4090": "RTX-4090",
    "RTX 4090": "RTX-4090",
    "4090": "RTX-4090",
    "geforce_rtx_3090": "RTX-3090",
    "A100 80GB": "A100-80",
    "a100_80gb": "A100-80",
    "a10080": "A100-80",
    "h100pcie": "H100-PCIe",
    "H100 SXM": "H100",
    "1050ti": "GTX-1050-Ti",
    "teslat4": "T4",
    "4070ti": "RTX-4070-Ti",
    "a6000": "RTX-A6000",
    "V100 16GB": "V100-16",
    "5090": "RTX-5090",
    "l40s": "L40S",
}
NEAR = {
    "a100": ["A100-80", "A100-40"],
    "rtx 3050": ["RTX-3050-4GB"],  # of which there is one with 8 GB, too
    "A10G": [],
    "rtx40900": ["RTX-4090"],
    "l40": ["L40S"],
    "rtx4070": ["RTX-4070-Ti"],
    "rtx4060": [],
    "v100": ["V100-32", "V100-16"],
    "": [],
}


def test_gpus_are_known_however_they_are_typed() -> None:
    """Case and punctuation do not count, nor does the series; one size of several, or another card, is not guessed."""
    for written, name in TYPED.items():
        gpu = named_gpu(written)
        assert gpu is not None, written
        assert gpu.name == name, written
    for written, names in NEAR.items():
        assert named_gpu(written) is None, written
        assert [gpu.name for gpu in gpus_like(written)] == names, written
    for written in {*UNKNOWN} - {"4GiB"}:  # which are not the GPUs that they are named like
        assert named_gpu(written) is None, written


def test_gpus_are_known_by_their_size() -> None:
    """A card of 24 GB has a little less; every card is found by the size that it is sold with."""
    assert [gpu.name for gpu in gpus_of_size(24 * 2**30)] == ["L4", "A10", "RTX-4090", "RTX-3090"]
    assert gpus_of_size(8 * 2**30) == []
    found = [gpu for size in (4, 10, 12, 16, 24, 32, 40, 48, 80, 141, 180) for gpu in gpus_of_size(size * 2**30)]
    assert sorted(gpu.name for gpu in found) == sorted(gpu.name for gpu in KNOWN_GPUS)


def test_rates_follow_the_datasheets() -> None:
    """Those of a card with half the power are its own: the PCIe H100's are 0.7 of its products, 0.85 of its bytes."""
    slower, faster = (known_gpu(name) for name in ("H100-PCIe", "H100"))
    assert slower is not None
    assert faster is not None
    assert slower.flops == pytest.approx(0.7 * 756e12, rel=0.01)
    assert slower.bandwidth == pytest.approx(0.85 * 2000e9)
    assert (slower.flops < faster.flops, slower.bandwidth < faster.bandwidth) == (True, True)


def test_geforce_cards_have_no_way_to_one_another() -> None:
    """From the RTX 30 on, but for what a bridge may join; of other cards nothing is claimed."""
    told = {gpu.name for gpu in KNOWN_GPUS if gpu.no_peers}
    assert told == {gpu.name for gpu in KNOWN_GPUS if gpu.name.startswith(("RTX-3", "RTX-4", "RTX-5"))}
    assert len(told) > 5
    bridged = {gpu.name for gpu in KNOWN_GPUS if "bridge" in gpu.no_peers}
    assert bridged == {"RTX-3090"}
    assert {gpu.name for gpu in KNOWN_GPUS if gpu.is_untried} == {"B200", "RTX-5090", "RTX-5080"}


def test_every_row_is_found_by_its_own_name() -> None:
    """No row hides another that stands behind it."""
    for gpu in KNOWN_GPUS:
        assert known_gpu(gpu.name) is gpu


def test_rates_are_below_the_datasheet() -> None:
    """What long runs sustain is less than the peak, of the type that auto computes in."""
    for gpu in KNOWN_GPUS:
        rate = gpu.computing(compute_type_at("auto", gpu.capability).name == "fp32", is_deterministic=False).flops
        assert gpu.peak_flops is not None
        assert 0.3 * gpu.peak_flops < rate < gpu.peak_flops, gpu.name


def test_the_peak_is_that_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the driver's name; a CPU and an unknown GPU have none, and then no MFU is told."""
    names = ["Tesla T4", "NVIDIA H100 PCIe", "NVIDIA A100-SXM4-40GB MIG 1g.5gb"]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: names[device.index])
    assert [peak_flops(torch.device("cuda", i)) for i in range(3)] == [65e12, 756e12, None]
    assert peak_flops(torch.device("cpu")) is None


def test_a_device_has_its_own_memory_and_the_row_s_rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Known: nothing is measured. Unknown: the measured rates count, and there is no peak."""
    properties = SimpleNamespace(name="NVIDIA H100 PCIe", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(gpus, "machine_host_bytes", lambda: 7)
    device = torch.device("cuda")
    known: Any = known_gpu("H100-PCIe")
    found = detect_gpu(device, torch.bfloat16)
    assert (found.memory_bytes, found.max_host_bytes, found.has_graphs) == (80 * 2**30, 7, True)
    assert (found.flops, found.bandwidth, found.bus) == (known.flops, known.bandwidth, known.bus)
    assert detect_gpu(device, torch.float32).flops == known.fp32_flops
    properties.name = "NVIDIA B300"
    monkeypatch.setattr(gpus, "_measured_rates", lambda *_: (3e14, 2e12, 1e10))
    found = detect_gpu(device, torch.bfloat16)
    assert (found.flops, found.bandwidth, found.bus, found.peak_flops) == (3e14, 2e12, 1e10, None)


def test_what_a_container_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """The smaller of the machine's memory and the container's limit, less a tenth; no limit is the machine's."""
    files = {
        "/proc/meminfo": "MemTotal: 64 kB\nMemAvailable:   20480 kB\n",
        "/sys/fs/cgroup/memory.max": str(10 * MIB),
        "/sys/fs/cgroup/memory.current": str(4 * MIB),
    }
    monkeypatch.setattr(gpus.Path, "read_text", lambda self, **_: files[str(self)])
    assert gpus.free_host_bytes() == int(0.9 * 6 * MIB)
    files["/sys/fs/cgroup/memory.max"] = "max\n"
    assert gpus.free_host_bytes() == int(0.9 * 20 * MIB)


def test_local_processes_share_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four processes of a machine may pin a quarter each."""
    alone = gpus.free_host_bytes()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert gpus.free_host_bytes() == pytest.approx(alone / 4, rel=0.2)

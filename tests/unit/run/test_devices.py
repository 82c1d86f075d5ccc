"""What is chosen, said and refused on cards of every age, simulated by their compute capability."""

import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate import Accelerator

import train.engine
from tests.conftest import ROOT, splits_of, training_of
from train import ending
from train.banner import banner
from train.config import Config, EngineConfig
from train.engine import attention, operations
from train.engine.copies import HostMemoryError
from train.engine.graphs import is_out_of_memory
from train.models.tokenizer import load_tokenizer
from train.run import devices
from train.run.accelerator import bitsandbytes_options, check_engine, check_machine
from train.run.defects import Doing
from train.run.devices import ComputeType
from train.run.exits import ExitCode, ExitWith

GPU = torch.device("cuda")
CPU = torch.device("cpu")
CARDS = [(5, 2), (6, 0), (6, 1), (7, 0), (7, 5), (8, 0), (8, 6), (9, 0), (12, 0)]
CU126 = ["sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90"]
CU130 = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120"]

Choose = Callable[[tuple[int, int]], None]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes every CUDA device one of the given capability."""

    def choose(number: tuple[int, int]) -> None:
        operations.kernels_for.cache_clear()
        monkeypatch.setattr(devices, "capability", lambda device: [number][device.index or 0])  # there is one
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old Card")

    yield choose
    operations.kernels_for.cache_clear()


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("NCCL error in: x\nLast error:\nCuda failure 2 'out of memory'", "Cuda failure 2 'out of memory'"),
        ("NCCL error in: x\nLast error:\nFailed to CUDA calloc 6291456 bytes", "Failed to CUDA calloc 6291456 bytes"),
        ("NCCL error\nLast error: \nFailed to CUDA host alloc 64 bytes\n", "Failed to CUDA host alloc 64 bytes"),
        ("CUDA error: out of memory\nCUDA kernel errors might", "CUDA error: out of memory"),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", "CUDA error: CUBLAS_STATUS_AL"),
        ("NCCL error in: x\nncclRemoteError: A call failed possibly due to a network error", ""),
        ("NCCL error in: x\nLast error:\nCuda failure 1 'invalid argument'", ""),
        ("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1", ""),
        ("", ""),
    ],
)
def test_messages_that_tell_of_memory(message: str, line: str) -> None:
    """As torch, cuBLAS and NCCL write them, and only such; then a trial takes them for what they are, too."""
    error = RuntimeError(message)
    found = devices.out_of_memory_line(error)
    assert found.startswith(line)
    assert bool(found) == bool(line) == is_out_of_memory(error)


def test_one_function_asks_for_the_capability() -> None:
    """So that all of what follows is decided by what these tests patch."""
    callers = [path for path in (ROOT / "train").rglob("*.py") if "get_device_capability" in path.read_text()]
    assert callers == [ROOT / "train" / "run" / "devices.py"]


def test_the_compute_type_of_every_card(card: Choose) -> None:
    """bf16, fp16 or fp32 by auto, with a reason where it is not bf16; on a CPU fp32, and nothing to explain."""
    chosen = {}
    for number in [*CARDS, (5, 0), (5, 3), (6, 2), (7, 2)]:
        card(number)
        found = devices.compute_type("auto", GPU)
        chosen[number] = found.name
        wanted = {"bf16": "", "fp16": "has no bf16", "fp32": "has no bf16 and no fast fp16"}[found.name]
        assert found.reason == (f"compute capability {number[0]}.{number[1]} {wanted}" if wanted else "")
    assert {number for number, dtype in chosen.items() if dtype == "bf16"} == {(8, 0), (8, 6), (9, 0), (12, 0)}
    assert {number for number, dtype in chosen.items() if dtype == "fp16"} == {(5, 3), (6, 0), (7, 0), (7, 2), (7, 5)}
    assert devices.compute_type("auto", CPU) == ComputeType("fp32")


def test_a_type_that_is_asked_for(card: Choose) -> None:
    """bf16 below 8.0 is refused with what works; anything else is taken as it is said, and needs no reason."""
    for number, instead in (((7, 5), "fp16"), ((6, 1), "fp32")):
        card(number)
        with pytest.raises(ExitWith, match=rf"--model\.dtype bf16: .*auto, which chooses {instead}") as refusal:
            devices.compute_type("bf16", GPU)
        assert refusal.value.code == ExitCode.BAD_INPUT
        assert devices.compute_type("fp16", GPU) == ComputeType("fp16")
        assert devices.compute_type("bf16", CPU) == ComputeType("bf16")
    card((8, 0))
    assert devices.compute_type("bf16", GPU) == ComputeType("bf16")


def test_attention_and_kernels_of_every_card(card: Choose, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flash from 8.0 in 16 bits, Triton from 7.0 where it is installed, and a line for each that is missing."""
    kernels = ModuleType("train.engine.kernels")  # the real one needs Triton
    monkeypatch.setitem(sys.modules, "train.engine.kernels", kernels)
    monkeypatch.setattr(train.engine, "kernels", kernels, raising=False)
    monkeypatch.setattr(operations.importlib.util, "find_spec", lambda name: object())
    for number in CARDS:
        card(number)
        assert attention.has_flash(torch.float16, GPU) == (number >= (8, 0))
        assert not attention.has_flash(torch.float32, GPU)
        assert (operations.kernels_for(GPU) is None) == (number < (7, 0))
        said = " ".join(devices.kernel_fallbacks(GPU))
        assert ("SDPA, one sample at a time" in said) == (number < (8, 0))
        assert ("instead of Triton" in said) == (number < (7, 0))
    assert operations.kernels_for(CPU) is None
    assert devices.kernel_fallbacks(CPU) == []
    monkeypatch.setattr(operations.importlib.util, "find_spec", lambda name: None)
    card((9, 0))
    assert operations.kernels_for(GPU) is None


def test_int8_on_every_card(card: Choose) -> None:
    """Below 7.5 a warning that names nf4; not for other types, and not on a CPU."""
    for number in CARDS:
        card(number)
        assert ("nf4 is not" in devices.int8_warning("int8", GPU)) == (number < (7, 5))
        assert devices.int8_warning("nf4", GPU) == ""
        assert devices.int8_warning("int8", CPU) == ""


@pytest.mark.parametrize(
    ("built", "served"),
    [
        (CU126, {number for number in CARDS if number < (12, 0)}),  # sm_61 runs what sm_60 was made for
        (CU130, {(7, 5), (8, 0), (8, 6), (9, 0), (12, 0)}),
        (["sm_86"], {(8, 6)}),  # not 8.0
        (["compute_70"], {(7, 0), (7, 5), (8, 0), (8, 6), (9, 0), (12, 0)}),
        (["sm_90a", "compute_80a"], {(8, 0), (9, 0)}),
        (["gfx90a"], set(CARDS)),  # ROCm's: nothing to compare
        ([], set(CARDS)),
    ],
)
def test_which_builds_serve_which_cards(
    built: list[str], served: set[tuple[int, int]], card: Choose, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A build without kernels for the card is refused by name, with the build that has them."""
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: built)
    for number in CARDS:
        card(number)
        if number in served:
            devices.check_build(GPU)
            continue
        with pytest.raises(ExitWith, match=rf"Old Card needs kernels for sm_{number[0]}{number[1]}\b") as refusal:
            devices.check_build(GPU)
        assert refusal.value.code == ExitCode.BAD_INPUT
        assert ", ".join(built) in refusal.value.reason
        assert ("CUDA 12.6 build (cu126)" in refusal.value.reason) == (number < (7, 5))
        assert ("a newer torch" in refusal.value.reason) == (number >= (7, 5))


def test_a_card_that_no_build_serves(card: Choose, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Kepler is not sent to a build that has nothing for it either."""
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: CU130)
    card((3, 5))
    with pytest.raises(ExitWith, match="no build of this torch has them"):
        devices.check_build(GPU)


def test_what_bitsandbytes_does_not_run_on(card: Choose, config: Config) -> None:
    """Below 6.0 its types and optimizers are refused with what works; a recipe without them is not."""

    def check(quantization: Any, optimizer: Any) -> None:
        model, optim = replace(config.model, quantization=quantization), replace(config.optim, name=optimizer)
        devices.check_bitsandbytes(bitsandbytes_options(replace(config, model=model, optim=optim)), GPU)

    for number in CARDS:
        card(number)
        check("none", "adamw")
        if number >= (6, 0):
            check("nf4", "paged_adamw_8bit")
            continue
        with pytest.raises(ExitWith, match=r"quantization nf4 \(write none\)") as refusal:
            check("nf4", "adamw")
        assert "optim.name" not in refusal.value.reason
        with pytest.raises(ExitWith, match=r"optim\.name adamw_8bit \(write adamw\)"):
            check("none", "adamw_8bit")


@pytest.fixture
def machine(card: Choose, monkeypatch: pytest.MonkeyPatch) -> None:
    """One visible GPU with 6.1, under torch's build for CUDA 13."""
    card((6, 1))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: CU130)


def test_a_run_is_refused_before_it_reads_data(
    machine: None, card: Choose, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The start looks at the build, at bitsandbytes and at the type, and only where the run is to use the GPU."""
    auto = replace(config, run=replace(config.run, device="auto"))
    with pytest.raises(ExitWith, match=r"CUDA 12\.6 build"):
        check_machine(auto)
    check_machine(config)  # run.device cpu
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    check_machine(auto)
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: CU126)
    check_machine(auto)
    with pytest.raises(ExitWith, match=r"--model\.dtype bf16"):
        check_machine(replace(auto, model=replace(auto.model, dtype="bf16")))
    card((5, 2))
    with pytest.raises(ExitWith, match=r"bitsandbytes needs 6\.0"):
        check_machine(auto)


def test_the_banner_says_what_was_chosen(config: Config, card: Choose, monkeypatch: pytest.MonkeyPatch) -> None:
    """Type with its reason, attention and kernels of the fused engine, the int8 warning; none of it on a new card."""
    config = replace(config, engine=EngineConfig(kind="fused"))
    training = training_of(config, Accelerator(cpu=True))
    monkeypatch.setattr("train.banner.device_name", lambda device: "a card")
    monkeypatch.setattr(type(training.accelerator), "device", property(lambda self: GPU))
    slow: Any = replace(training, config=replace(config, model=replace(config.model, quantization="int8")))
    texts = {}
    for number in ((6, 1), (7, 5), (9, 0)):
        card(number)
        for each in (training, slow):
            texts[number, each is slow] = banner(each, load_tokenizer(config), splits_of(config), None)
    assert "compute in fp32 (compute capability 6.1 has no bf16 and no fast fp16)\n" in texts[(6, 1), False]
    assert "compute in fp16 (compute capability 7.5 has no bf16)\n" in texts[(7, 5), False]
    assert "compute in bf16\n" in texts[(9, 0), False]
    counts = {number: texts[number, False].count("kernels   ") for number in ((6, 1), (7, 5), (9, 0))}
    assert counts == {(6, 1): 2, (7, 5): 1, (9, 0): 0}
    assert [key for key, text in texts.items() if "warning   model.quantization int8 is slow" in text] == [
        ((6, 1), True)
    ]
    card((6, 1))
    reference = replace(training, plan=replace(training.plan, is_fused=False))
    assert "kernels   " not in banner(reference, load_tokenizer(config), splits_of(config), None)


def test_rows_of_the_embedding_without_triton() -> None:
    """Collected on the host where the device has no Triton, whatever the ids' device."""
    table, ids = torch.randn(50, 7), torch.tensor([3, 49, 3, 0])
    assert torch.equal(operations.gather_rows(table, ids), table[ids])


def test_what_only_the_engine_does_is_refused_before_data_are_read(
    card: Choose, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp8 and sharing on a CPU, where --engine.kind fused is the way, and fp8 on a GPU without; the rest passes."""
    fp8 = replace(config, engine=replace(config.engine, products="fp8"))
    shard = replace(config, memory=replace(config.memory, shard=True))
    with pytest.raises(ExitWith, match=r"^--engine\.products fp8: there is no GPU; --engine\.kind fused multiplies"):
        check_engine(fp8)
    told = r"only the fused engine shards, and there is no GPU \(--engine\.kind fused runs it here as well\); or leave"
    with pytest.raises(ExitWith, match=rf"^--memory\.shard: {told}"):
        check_engine(shard)
    for asked in (fp8, shard):
        check_engine(replace(asked, engine=replace(asked.engine, kind="fused")))
    check_engine(replace(shard, memory=replace(shard.memory, offload="stream")))  # which takes the engine anywhere
    check_engine(config)
    reference = replace(shard, engine=replace(shard.engine, kind="reference"))
    assert any("memory.shard" in problem and "use --engine.kind auto" in problem for problem in reference.problems())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    on_gpu = replace(fp8, run=replace(fp8.run, device="auto"))
    card((8, 0))
    with pytest.raises(ExitWith, match=r"8\.0 has no fp8 products"):
        check_engine(on_gpu)
    card((8, 9))
    check_engine(on_gpu)


def test_host_memory_is_not_the_gpu_s(config: Config) -> None:
    """What could not be pinned repeats CUDA's words, and other plans may need more of it: told as host memory."""
    error = HostMemoryError("2.0 GiB of host memory could not be pinned: CUDA error: out of memory")
    error.__context__ = RuntimeError("CUDA error: out of memory")
    assert not is_out_of_memory(error)
    end = ending._foreseen(error, config, Doing())
    assert end is not None
    assert end.reason.startswith("2.0 GiB of host memory")
    assert "free host memory" in end.reason

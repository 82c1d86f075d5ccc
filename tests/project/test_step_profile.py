"""How the benchmark of a step's profile counts: gaps over all streams, kinds by names."""

import sys
from typing import Any

import pytest
import torch

from benchmarks import real_job, step_profile
from benchmarks.step_profile import Gap, Work, gaps, kind_of, short, summary

GEMM = "void cutlass::gemm::Kernel<Policy<float>>(Params)"


def test_gaps_are_times_without_any_stream() -> None:
    """Copies beside a kernel hide what the kernel leaves; the work that ends last is what a gap comes after."""
    work = [Work("b", 30, 40), Work("a", 0, 20), Work("copy", 5, 25), Work("c", 40, 41), Work("d", 43, 44)]
    assert gaps(work) == [Gap(5e-6, "copy", "b"), Gap(2e-6, "c", "d")]


def test_names() -> None:
    """Kernels of libraries, of Triton and of this project."""
    named = {GEMM: "products", "ncclDevKernel_AllReduce_Sum_f32_RING": "reduction between GPUs"}
    named |= {"nvjet_tst_128x256": "products", "void kDequantizeBlockwise<__nv_bfloat16>": "dequantising"}
    named |= {"void pytorch_flash::flash_bwd_kernel<T>": "attention", "Memcpy HtoD (Pinned -> Device)": "copies"}
    named |= {"grouped_forward_kernel": "experts' products", "rms_norm_kernel": "norms, activations, rotary"}
    assert {name: kind_of(name) for name in named} == named
    assert short(GEMM) == "Kernel"


def test_a_step_is_the_mean_of_several() -> None:
    """Milliseconds are of one step, and all of the time is work or gap."""
    work = [Work(GEMM, 0, 3000), Work("nccl", 4000, 5000), Work(GEMM, 5000, 8000)]
    found = summary(work, 2, [{"data/tokens": 10}, {"data/tokens": 20}])
    assert (found["step_ms"], found["idle_ms"], found["tokens_a_step"]) == (4.0, 0.5, 15)
    assert found["kinds_ms"] == {"products": 3.0, "reduction between GPUs": 0.5}
    assert sum(found["kinds_ms"].values()) + found["idle_ms"] == found["step_ms"]
    assert found["gaps_ms"] == {"Kernel -> nccl, 1 times": 0.5}


def test_a_refused_command_line_ends_as_the_run_s_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One message and 78, of the profile and of the job that other benchmarks start."""
    refused = ["--profile", "demo", "--train.lr", "1"]
    assert real_job.run_words(refused, real_job.noting) == 78
    assert "handloop: the configuration cannot be used:\n  --train.lr" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(sys, "argv", ["step_profile", "--", *refused])
    with pytest.raises(SystemExit) as ended:
        step_profile.main()
    assert ended.value.code == 78
    assert "handloop: the configuration cannot be used:\n  --train.lr" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:CUDA is not available")
@pytest.mark.parametrize("settle", [0, 2])
def test_steps_under_the_profiler_that_do_not_count(settle: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trace has what runs in the counted steps, and nothing of those in which the profiler was already prepared."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    window = step_profile.Window(warmup=2, settle=settle, num_steps=2)
    work = [torch.sin, torch.cos, torch.tan, torch.exp, torch.log, torch.sqrt, torch.abs, torch.neg]  # one a step
    for step, operation in enumerate(work, start=1):
        operation(torch.ones(1))
        window({"step": step, "data/tokens": step})
    counted = [3 + settle, 4 + settle]
    assert [row["step"] for row in window.rows] == counted
    events: Any = window.profiler.events()
    traced = [event.name.removeprefix("aten::") for event in events]
    names = [operation.__name__ for operation in work]
    assert [name for name in names if name in traced] == names[2 + settle : 4 + settle]

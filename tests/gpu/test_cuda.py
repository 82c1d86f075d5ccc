"""What only a GPU can show: NF4 kernels, paged optimizer state, the memory cap, bitwise resume."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from bitsandbytes.optim import PagedAdamW8bit

from tests.conftest import BUNDLED_BASE, Fault, arguments, losses, run_command, training_of
from train.config import Config
from train.optim import load_optimizer_state, optimizer_state
from train.step import Training, optimizer_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; the CPU suite covers the same code"),
]


@pytest.fixture
def on_gpu(config: Config) -> Config:
    return replace(config, run=replace(config.run, device="cuda"))


def build(config: Config) -> Training:
    return training_of(config, Accelerator())


def test_an_nf4_base_trains_in_bf16(on_gpu: Config) -> None:
    """An NF4 base computes in bf16, its adapters stay fp32, and five steps lower the loss."""
    training = build(on_gpu)
    losses_by_step = [optimizer_step(training, step).loss for step in range(5)]
    assert training.model.adapted.get_base_model().dtype == torch.bfloat16
    assert losses_by_step[-1] < losses_by_step[0]
    assert next(iter(training.parameters.values())).dtype == torch.float32


def test_paged_state_comes_back_paged_and_to_the_bit(on_gpu: Config) -> None:
    """Saved and restored: equal bytes, still in paged memory, our learning rate, and no more memory than before."""
    # bitsandbytes pages what has 1e5 elements or more: here the matrices of r x 64 and r x 128, not those of r x 32
    wide = replace(on_gpu, lora=replace(on_gpu.lora, r=2048))
    training = build(wide)
    assert isinstance(training.optimizer, PagedAdamW8bit)
    optimizer_step(training, 0)
    saved = optimizer_state(training.optimizer, training.parameters)
    other = build(wide)
    load_optimizer_state(other.optimizer, other.parameters, saved)
    again = optimizer_state(other.optimizer, other.parameters)
    assert saved.keys() == again.keys()
    assert all(torch.equal(saved[name], again[name]) for name in saved)
    for one, two in zip(training.parameters.values(), other.parameters.values(), strict=True):
        paged = getattr(training.optimizer.state[one]["state1"], "is_paged", False)
        assert paged == (one.numel() >= 1e5)
        assert getattr(other.optimizer.state[two]["state1"], "is_paged", False) == paged


def test_the_budget_is_a_hard_cap(on_gpu: Config, tmp_path: Path) -> None:
    """A budget that the run does not fit in ends it with an error; the same run fits a larger one."""
    large = replace(on_gpu, memory=replace(on_gpu.memory, budget="2GiB"))
    assert run_command(arguments(large)).returncode == 0
    small = replace(large, memory=replace(large.memory, budget="1MiB"), run=replace(large.run, dir=str(tmp_path / "b")))
    outcome = run_command(arguments(small))
    assert outcome.returncode != 0
    assert "out of memory" in outcome.stderr


def test_resume_is_bitwise_with_deterministic_kernels(on_gpu: Config, tmp_path: Path) -> None:
    """Stopped after the first epoch and continued: the losses of the uninterrupted run, to the bit, with dropout."""
    config = replace(on_gpu, run=replace(on_gpu.run, deterministic=True), lora=replace(on_gpu.lora, dropout=0.1))
    whole = replace(config, run=replace(config.run, dir=str(tmp_path / "whole")))
    outcome = run_command(arguments(whole))
    assert outcome.returncode == 0, outcome.stderr
    broken = replace(config, run=replace(config.run, dir=str(tmp_path / "broken")))
    run_command(arguments(broken), Fault("publish", 2, "before"))
    outcome = run_command(arguments(broken))
    assert outcome.returncode == 0, outcome.stderr
    assert "continues after step 3" in outcome.stdout
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")


def test_the_bundled_base_through_the_4gb_profile(config: Config, tmp_path: Path) -> None:
    """Real weights quantised on the GPU, int8 and NF4, the cap of one process, generation, and what is left behind."""
    for quantization in ("nf4", "int8"):
        run_dir = tmp_path / quantization
        words = ["--profile", "4gb", "--model.name_or_path", str(BUNDLED_BASE), "--model.quantization", quantization]
        words += ["--data.path", *config.data.path, "--run.dir", str(run_dir), "--train.max_steps", "3"]
        words += ["--track.wandb", "off", "--compare.num_questions", "2", "--compare.max_new_tokens", "8"]
        outcome = run_command(words)
        assert outcome.returncode == 0, outcome.stderr
        assert "capped at 4GiB" in outcome.stdout
        assert (run_dir / "answers.json").exists()

"""What only a GPU can show: NF4 kernels, paged optimizer state, the memory cap, bitwise resume."""

from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from bitsandbytes.optim import PagedAdamW8bit

from tests.conftest import BUNDLED_BASE, arguments, losses, run_command, training_of
from tests.injections import Fault
from train.collate import collate_packed
from train.config import CheckpointConfig, Config, EngineConfig
from train.engine.attention import announce, varlen_attention
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
    # bitsandbytes pages what has 1e5 elements or more
    wide = replace(on_gpu, lora=replace(on_gpu.lora, r=2048))
    training = build(wide)
    assert isinstance(training.optimizer, PagedAdamW8bit)
    optimizer_step(training, 0)
    saved = optimizer_state(training.optimizer, training.flat)
    other = build(wide)
    load_optimizer_state(other.optimizer, other.flat, saved)
    again = optimizer_state(other.optimizer, other.flat)
    assert saved.keys() == again.keys()
    assert all(torch.equal(saved[name], again[name]) for name in saved)
    for one, two in zip(training.flat.leaves, other.flat.leaves, strict=True):
        paged = getattr(training.optimizer.state[one]["state1"], "is_paged", False)
        assert paged == (one.numel() >= 1e5)
        assert getattr(other.optimizer.state[two]["state1"], "is_paged", False) == paged


def test_packed_samples_are_isolated_by_the_flash_kernel(on_gpu: Config) -> None:
    """Packed loss = the samples' own, per sample whatever stands before it; gradients as with the block mask."""
    packed_config = replace(on_gpu, data=replace(on_gpu.data, packing=True), engine=EngineConfig(kind="reference"))
    training = build(packed_config)
    causal_lm: Any = training.model.adapted.get_base_model()
    assert causal_lm.config._attn_implementation == "varlen"
    rows = [training.data.samples[i] for i in range(12)]
    packed = collate_packed(rows).to(torch.device("cuda"))
    gradients = []
    for kind in ("varlen", "sdpa"):
        causal_lm.set_attn_implementation(kind)
        loss = training.model(packed)
        loss.backward()
        gradients.append(
            torch.cat([p.grad.flatten().clone() for p in training.parameters.values() if p.grad is not None])
        )
        for parameter in training.parameters.values():
            assert parameter.grad is not None
            parameter.grad.zero_()
        with torch.no_grad():
            alone = sum(training.model(collate_packed([row]).to(torch.device("cuda"))).item() for row in rows)
        assert loss.item() == pytest.approx(alone, rel=2e-3)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.999
    causal_lm.set_attn_implementation("varlen")
    with torch.no_grad():
        results = []
        for before in (rows[3], rows[4]):
            silent = {**before, "trained": [False] * len(before["trained"])}
            batch: Any = collate_packed([silent, rows[5]]).to(torch.device("cuda"))
            results.append(training.model(batch).item())
            leaking = replace(batch, cu_seqlens=batch.cu_seqlens[[0, -1]], max_length=batch.input_ids.shape[1])
            assert abs(training.model(leaking).item() - results[-1]) > 1e-3 * results[-1]
        assert results[0] == pytest.approx(results[1], rel=1e-3)


@pytest.mark.parametrize("heads", [(4, 4), (8, 2)])
@pytest.mark.parametrize(("reach", "width"), [(None, 64), (5, 64), (None, 100)])
def test_varlen_attention_against_fp32(heads: tuple[int, int], reach: int | None, width: int) -> None:
    """Value and every gradient against a masked softmax in fp32: grouped heads, a sample of one token, a window, heads
    that the kernel does not take."""
    torch.manual_seed(0)
    lengths = [1, 17, 64, 3]
    total = sum(lengths)
    shapes = ((1, heads[0], total, width), (1, heads[1], total, width), (1, heads[1], total, width))
    exact = [torch.randn(shape, device="cuda", requires_grad=True) for shape in shapes]
    short = [states.detach().bfloat16().requires_grad_() for states in exact]
    sample = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).cuda()
    distance = torch.arange(total)[:, None].cuda() - torch.arange(total)[None].cuda()
    seen = (sample[:, None] == sample[None]) & (distance >= 0) & (distance < (reach or total))
    key, value = (states.repeat_interleave(heads[0] // heads[1], dim=1) for states in exact[1:])
    scores = (exact[0] @ key.transpose(2, 3) * 0.2).masked_fill(~seen, float("-inf"))
    wanted = (scores.softmax(-1) @ value).transpose(1, 2)
    cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cuda")
    announce(replace(collate_packed([{"input_ids": [0], "trained": [True]}]), cu_seqlens=cu_seqlens, max_length=64))
    options = {"scaling": 0.2, "sliding_window": reach}
    found, _ = varlen_attention(torch.nn.Module(), short[0], short[1], short[2], None, **options)
    upstream = torch.randn_like(wanted)
    wanted.backward(upstream)
    found.backward(upstream.bfloat16())
    pairs: Any = zip((wanted, *(s.grad for s in exact)), (found, *(s.grad for s in short)), strict=True)
    for one, two in pairs:
        assert (one - two.float()).norm() < 1e-2 * one.norm()


def test_the_budget_is_a_hard_cap(on_gpu: Config, tmp_path: Path) -> None:
    """A budget that the run does not fit in ends it with an error; the same run fits a larger one."""
    large = replace(on_gpu, memory=replace(on_gpu.memory, budget="2GiB"))
    assert run_command(arguments(large)).returncode == 0
    small = replace(large, memory=replace(large.memory, budget="1MiB"), run=replace(large.run, dir=str(tmp_path / "b")))
    outcome = run_command(arguments(small))
    assert outcome.returncode != 0
    assert "out of memory" in outcome.stderr


@pytest.mark.parametrize("packing", [False, True])
def test_resume_is_bitwise_with_deterministic_kernels(packing: bool, on_gpu: Config, tmp_path: Path) -> None:
    """Stopped after the first epoch and continued: the losses of the uninterrupted run, to the bit, with dropout."""
    on_gpu = replace(on_gpu, data=replace(on_gpu.data, packing=packing), checkpoint=CheckpointConfig(every=1))
    config = replace(on_gpu, run=replace(on_gpu.run, deterministic=True), lora=replace(on_gpu.lora, dropout=0.1))
    whole = replace(config, run=replace(config.run, dir=str(tmp_path / "whole")))
    outcome = run_command(arguments(whole))
    assert outcome.returncode == 0, outcome.stderr
    broken = replace(config, run=replace(config.run, dir=str(tmp_path / "broken")))
    run_command(arguments(broken), Fault("publish", 2, "before"))
    outcome = run_command(arguments(broken))
    assert outcome.returncode == 0, outcome.stderr
    assert "continues after step" in outcome.stdout
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

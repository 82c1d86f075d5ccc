"""Whole steps by the fused engine: the reference's losses, merged passes, and what it cannot run."""

from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig

from tests.conftest import training_of, with_batch
from tests.parity.models import SIZES, adapted_model
from train.collate import collate_packed
from train.config import Config, EngineConfig
from train.engine.support import unsupported_reason
from train.layout import BatchLayout
from train.models.language_model import choose_engine, sketch
from train.run.exits import ExitWith
from train.step import optimizer_step

CPU = torch.device("cpu")


def fused(config: Config) -> Config:
    return replace(config, engine=EngineConfig(kind="fused"))


def test_fifty_steps_fused_and_not(config: Config) -> None:
    """The same losses and adapters after fifty steps; the engine really ran."""
    config = replace(config, train=replace(config.train, epochs=50), model=replace(config.model, quantization="nf4"))
    runs = [training_of(each, Accelerator(cpu=True)) for each in (config, fused(config))]
    assert [run.model.engine_name for run in runs] == ["reference", "fused"]
    curves = [[optimizer_step(run, step).loss for step in range(50)] for run in runs]
    assert curves[0][-1] < 0.9 * curves[0][0]
    assert curves[0] != curves[1]
    assert curves[1] == pytest.approx(curves[0], rel=2e-3)


def test_without_merging_every_pass_is_run(config: Config) -> None:
    """1 x 8 with merge off are eight passes of one sample, also where two would fit."""
    config = fused(with_batch(config, 1, 8))
    literal = training_of(replace(config, batch=replace(config.batch, merge="off")), Accelerator(cpu=True))
    batch = literal.data.batch(0, literal.plan)
    assert [(micro_batch.position_ids == 0).sum() for micro_batch in batch.micro_batches] == [1] * 8
    merged = training_of(config, Accelerator(cpu=True))
    assert len(merged.data.batch(0, merged.plan).micro_batches) == 1


def test_an_idle_process_learns_nothing(config: Config) -> None:
    """The first of two processes in an epoch's last window of one sample: no targets, gradients of zero."""
    training = training_of(fused(with_batch(config, 1, 2)), Accelerator(cpu=True))
    data = training.data
    data.rows, data.steps_per_epoch = data.rows[:5], 2
    data.layout = BatchLayout(1, 2, 2, rank=0)
    (batch,) = data.batch(1, training.plan).micro_batches
    assert len(batch.targets) == 0
    training.model(batch).backward()
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in training.flat.leaves)


def test_merged_passes_are_the_same_step(config: Config) -> None:
    """2 x 4 as it is written = as one pass: loss, gradient norm, samples; in the partial last window too."""
    config = fused(with_batch(config, 2, 4))
    literal = training_of(replace(config, batch=replace(config.batch, merge="off")), Accelerator(cpu=True))
    merged = training_of(config, Accelerator(cpu=True))
    for step, passes in ((0, 4), (2, 2)):
        assert len(literal.data.batch(step, literal.plan).micro_batches) == passes
        assert len(merged.data.batch(step, merged.plan).micro_batches) == 1
        one, other = (optimizer_step(run, step) for run in (literal, merged))
        assert one.sample_ids == other.sample_ids
        assert other.loss == pytest.approx(one.loss, rel=1e-5)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)


def test_what_the_engine_cannot_run_is_said(config: Config) -> None:
    """auto falls back with a reason, fused ends with it."""
    sizes = {**SIZES, "num_key_value_heads": None}
    neox = AutoModelForCausalLM.from_config(GPTNeoXConfig(**{k: v for k, v in sizes.items() if v is not None}))
    assert "GPTNeoXForCausalLM is not one of" in unsupported_reason(neox)
    gelu = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, hidden_act="gelu"))
    assert "computes GELUActivation" in unsupported_reason(gelu)
    uneven = adapted_model(LlamaConfig(**SIZES), ["1.mlp.up_proj"]).get_base_model()
    assert unsupported_reason(uneven) == "its blocks do not all have the same adapters"
    int8 = replace(config, model=replace(config.model, quantization="int8"))
    sketched = sketch(int8, torch.float32)
    assert choose_engine(sketched, int8, CPU) == (False, "int8 layers round their inputs, which only bitsandbytes does")
    with pytest.raises(ExitWith, match=r"--engine\.kind fused: int8 layers"):
        choose_engine(sketched, fused(int8), CPU)
    streaming = replace(int8, memory=replace(int8.memory, offload="stream"))
    with pytest.raises(ExitWith, match=r"--memory\.offload stream: only the fused engine streams, and int8 layers"):
        choose_engine(sketched, streaming, CPU)
    reference = replace(config, engine=EngineConfig(kind="reference"))
    assert choose_engine(sketched, reference, CPU) == (False, "engine.kind reference")


def test_long_samples_of_one_length_are_filled_up() -> None:
    """Rows of 2,041 and 2,048 tokens become 2,048 each, targets stay; rows that differ more stay as they are."""
    rows = [{"input_ids": list(range(1, n + 1)), "trained": [True] * n} for n in (2041, 2048)]
    batch = collate_packed(rows)
    assert (batch.uniform_length, batch.max_length, batch.input_ids.shape[1]) == (2048, 2048, 4096)
    assert batch.targets.tolist() == [*range(2, 2042), *range(2, 2049)]
    assert torch.equal(batch.input_ids[0, batch.target_rows] + 1, batch.targets)
    assert batch.cu_seqlens is not None
    assert batch.cu_seqlens.tolist() == [0, 2048, 4096]
    shorter = collate_packed([rows[0], {"input_ids": list(range(1900)), "trained": [True] * 1900}])
    assert (shorter.uniform_length, shorter.input_ids.shape[1]) == (0, 3941)

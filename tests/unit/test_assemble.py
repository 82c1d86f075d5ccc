"""The longest micro-batch is tried before the first step, and what runs out of memory is planned smaller."""

import re
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from tests.conftest import arguments, splits_of, training_of
from train import assemble as assembling
from train import main as command
from train.assemble import fit_to_memory
from train.batching import LengthStatistics, MicroBatchShape
from train.checkpoints.resume import checkpoint_layout, saved_shape
from train.config import BatchConfig, Config, EngineConfig, LoraConfig, MemoryConfig
from train.engine.plan import Plan
from train.memory import cost, outlook
from train.memory.outlook import Outlook
from train.run.exits import ExitCode, ExitWith
from train.step import optimizer_step


class FailingGpu:
    """Stands for a GPU that is out of memory the first `failures` times that the longest micro-batch is tried."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.tried: list[Plan] = []

    def runs(self, training: Any, plan: Plan, longest_validation: int) -> bool:
        self.tried.append(plan)
        return len(self.tried) > self.failures


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, gpu: FailingGpu) -> None:
    """Makes `fit_to_memory` believe that there is one."""
    monkeypatch.setattr(assembling, "_runs", gpu.runs)
    monkeypatch.setattr(assembling, "_is_gpu", lambda training: True)


def test_out_of_memory_is_answered_by_smaller_plans(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three failures: each next plan needs less, blocks move to the host, and the step is the same as without."""
    config = replace(config, engine=EngineConfig(kind="fused"), lora=LoraConfig(r=4, alpha=8))
    wanted = [optimizer_step(training_of(config, Accelerator(cpu=True)), 0).loss]
    training = training_of(config, Accelerator(cpu=True))
    gpu = FailingGpu(failures=3)
    on_a_gpu(monkeypatch, gpu)
    monkeypatch.setattr(cost, "CUBLAS_BYTES", 0)  # more than the whole of so small a model
    rows = training.data.length_statistics()
    largest = Outlook.of(config, torch.device("cpu"), rows, 10**12).first_plan()
    ahead = Outlook.of(config, torch.device("cpu"), rows, largest.peak_bytes)
    found = fit_to_memory(replace(training, plan=ahead.first_plan()), ahead)
    peaks = [plan.peak_bytes for plan in gpu.tried]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == 4
    assert found.plan == gpu.tried[-1]
    assert [optimizer_step(found, 0).loss] == pytest.approx(wanted, rel=1e-5)


def test_a_run_plans_for_the_longest_sample_of_its_validation(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """train/main.py looks it up in what is held out."""
    config = replace(config, data=replace(config.data, validation_fraction=0.2))
    seen: list[LengthStatistics] = []

    def look(_: Any, __: Any, rows: LengthStatistics, *___: Any) -> None:
        seen.append(rows)
        raise ExitWith(ExitCode.INTERRUPTED, "seen")

    monkeypatch.setattr(outlook.Outlook, "of", look)
    for each in (config, replace(config, data=replace(config.data, validation_fraction=0.0))):
        assert command.main(arguments(each)) == ExitCode.INTERRUPTED
    held_out = splits_of(config).validation
    assert held_out is not None
    assert [rows.longest_validation for rows in seen] == [max(held_out.samples["num_tokens"]), 0]


def test_the_reason_for_the_reference_engine_is_said_once(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the banner, with what is chosen on that engine; nothing that is said while loading repeats it."""

    def stop(*_: Any) -> int:
        raise ExitWith(ExitCode.INTERRUPTED, "behind the banner")

    monkeypatch.setattr(command, "check_folder", stop)
    config = replace(config, engine=EngineConfig(kind="reference"))
    assert command.main(arguments(config)) == ExitCode.INTERRUPTED
    said = capsys.readouterr().out
    assert said.count("engine.kind reference") == 1
    assert re.search(r"^engine    transformers and PEFT \(.*engine.kind reference.*\)\n {10}\w+", said, re.MULTILINE)


@pytest.mark.parametrize("kind", ["fused", "reference"])
def test_a_validation_s_longer_sample_is_tried(kind: Any, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before training, where it is longer than any trained on; where it does not fit, a smaller plan is taken."""
    config = replace(config, engine=EngineConfig(kind=kind), batch=BatchConfig(2, 2))
    training = training_of(config, Accelerator(cpu=True))
    longest = max(training.data.num_tokens)
    monkeypatch.setattr(assembling, "_is_gpu", lambda training: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    tried: list[tuple[int, ...]] = []

    def look(_: Any, arguments: Any) -> None:
        shape = tuple(arguments[0].input_ids.shape)
        if not torch.is_grad_enabled():
            tried.append(shape)
            if len(tried) == 1:
                raise torch.OutOfMemoryError

    training.model.register_forward_pre_hook(look)
    rows = training.data.length_statistics()
    monkeypatch.setattr(cost, "CUBLAS_BYTES", 0)  # more than the whole of so small a model
    budget = Outlook.of(config, torch.device("cpu"), rows, 10**12).first_plan().peak_bytes
    plain = Outlook.of(config, torch.device("cpu"), rows, budget)
    training = replace(training, plan=plain.first_plan())
    assert same_but_for_words(fit_to_memory(training, plain).plan, training.plan)
    assert tried == []
    longer = replace(plain, rows=replace(rows, longest_validation=longest + 7))
    found = fit_to_memory(training, longer)
    assert len(tried) == 2
    assert tried == [(rows, longest + 7) for rows in ((1, 1) if kind == "fused" else (2, 1))]
    assert found.plan != training.plan
    assert not any(leaf.grad is not None and leaf.grad.any() for leaf in training.flat.leaves)


def same_but_for_words(one: Plan, other: Plan) -> bool:
    """Whether two plans execute alike."""
    return asdict(one) | {"choices": ()} == asdict(other) | {"choices": ()}


def test_the_reference_engine_takes_smaller_micro_batches(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """It merges the whole step, then half of it and so on; the step's loss stays."""
    wanted = optimizer_step(training_of(as_configured(config), Accelerator(cpu=True)), 0).loss
    training = training_of(config, Accelerator(cpu=True))
    gpu = FailingGpu(failures=2)
    on_a_gpu(monkeypatch, gpu)
    ahead = Outlook.of(config, torch.device("cpu"), training.data.length_statistics(), None)
    found = fit_to_memory(training, ahead)
    tokens = [plan.micro_batch_tokens for plan in gpu.tried]
    assert [plan.num_kept for plan in gpu.tried] == [2, 2, 2]
    assert tokens == sorted(tokens, reverse=True)
    assert len(set(tokens)) == 3
    sizes = [batch.input_ids.numel() for batch in found.data.batch(0, found.plan).micro_batches]
    assert max(sizes) <= tokens[-1] < tokens[0]
    assert optimizer_step(found, 0).loss == pytest.approx(wanted, rel=1e-5)


def as_configured(config: Config) -> Config:
    return replace(config, batch=replace(config.batch, merge="off"))


def test_a_resumed_run_on_the_reference_engine_keeps_its_rows(config: Config) -> None:
    """Size and layout are a checkpoint's; one of the other engine is none; padded before is padded now."""
    training = training_of(config, Accelerator(cpu=True))
    shape = training.plan.micro_batch_shape
    assert shape.layout == "unpadded"
    for saved in (
        replace(shape, tokens=200),
        MicroBatchShape(0, layout="padded"),
        MicroBatchShape(300, layout="fused"),
    ):
        resumed = assembling.assemble(config, Accelerator(cpu=True), training.data, saved)
        assert resumed.plan.micro_batch_shape == (shape if saved.layout == "fused" else saved)
        layout = checkpoint_layout(resumed)
        checkpoint: Any = SimpleNamespace(state=SimpleNamespace(layout=layout))
        assert saved_shape(checkpoint, training.data, "auto") == resumed.plan.micro_batch_shape


def test_the_fused_engine_does_not_take_the_other_s_shape(config: Config) -> None:
    """A run that moves from a CPU to a GPU plans anew."""
    config = replace(config, engine=EngineConfig(kind="fused"))
    data = training_of(config, Accelerator(cpu=True)).data
    saved = MicroBatchShape(77, layout="unpadded")
    ahead = Outlook.of(config, torch.device("cpu"), data.length_statistics(), None, saved)
    assert ahead.saved is None
    assert ahead.first_plan().micro_batch_tokens > 77


def test_a_trial_leaves_no_trace(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients, weights and torch's generator are as before, and passes that use too much are not taken."""
    config = replace(config, lora=replace(config.lora, dropout=0.5), memory=MemoryConfig())
    training = training_of(config, Accelerator(cpu=True))
    monkeypatch.setattr(assembling, "_is_gpu", lambda training: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(assembling, "_gpu_limit", lambda training: 100.0)
    passes: list[int] = []
    training.model.register_forward_pre_hook(lambda _, arguments: passes.append(arguments[0].input_ids.numel()))
    room = [96, 93, 92, 96, 93]  # of three sizes kept, of which one leaves the margin free, and of two recomputed
    monkeypatch.setattr(assembling, "_peak_bytes", lambda training: room[len(passes) - 1])
    values = [leaf.detach().clone() for leaf in training.flat.leaves]
    before = torch.get_rng_state()
    ahead = Outlook.of(config, torch.device("cpu"), training.data.length_statistics(), None)
    found = fit_to_memory(training, ahead)
    assert len(passes) == 5
    assert found.plan.micro_batch_tokens < passes[1] < passes[0]
    assert found.plan.num_kept == found.plan.num_blocks
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(values, training.flat.leaves, strict=True))
    assert not any(leaf.grad is not None and leaf.grad.any() for leaf in training.flat.leaves)
    assert not training.model.reference.recomputes
    assert any("by trial" in line for line in vars(found.plan)["choices"])


def test_when_nothing_smaller_is_left_that_is_said(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clear end before training instead of one at step 3,000."""
    training = training_of(config, Accelerator(cpu=True))
    on_a_gpu(monkeypatch, FailingGpu(failures=99))
    ahead = Outlook.of(config, torch.device("cpu"), training.data.length_statistics(), None)
    with pytest.raises(ExitWith, match="out of memory at the longest micro-batch"):
        fit_to_memory(training, ahead)


def test_the_longest_micro_batch_is_the_longest(config: Config) -> None:
    """Of packed rows on the reference engine all rows count; padding makes it no longer than the plan."""
    packed = replace(config, data=replace(config.data, packing=True), batch=BatchConfig(4, 2))
    training = training_of(packed, Accelerator(cpu=True))
    longest = assembling.longest_micro_batch(training, training.plan)
    steps = [training.data.batch(step, training.plan) for step in range(training.data.steps_per_epoch)]
    assert longest.input_ids.numel() >= max(each.input_ids.numel() for step in steps for each in step.micro_batches)
    data = training.data
    data.num_tokens, data.rows = [1000] * 6, [[i] for i in range(6)]
    for total in (6000, 6144, 7000, 1000):
        plan = Plan(True, True, total, num_blocks=2, num_kept=2, uses_graphs=True, num_samples=40)
        longest = assembling.longest_micro_batch(training, plan)
        assert longest.input_ids.numel() <= max(total, 1024)
        assert longest.cu_seqlens is not None
        assert len(longest.cu_seqlens) == 41
        assert longest.cu_seqlens[-1] == longest.input_ids.numel()
    data.num_tokens[0], data.rows = 5000, data.rows[1:]  # as data.weights leave out samples
    longest = assembling.longest_micro_batch(training, replace(plan, micro_batch_tokens=3000))
    assert max(longest.lengths) == 1000

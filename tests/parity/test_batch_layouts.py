"""How a batch is cut into forward passes and processes does not change the mathematics."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from tests.compare_runs import start_processes
from tests.conftest import arguments, run_command, thorough, training_of, with_batch
from train.config import BatchConfig, Config, EngineConfig
from train.run.accelerator import least
from train.run.processes import any_process
from train.run.same_command import differing
from train.step import Training, optimizer_step
from train.track.metrics_file import read_metrics
from train.validation.material import Material
from train.validation.measure import validate

LAYOUTS = [(8, 1), (4, 2), (2, 4), (1, 8)]


def build(config: Config) -> Training:
    return training_of(config, Accelerator(cpu=True))


def loss_and_gradient(config: Config, completed: int) -> tuple[float, torch.Tensor]:
    """Loss and flat gradient of one step, taken before its update."""
    training = build(config)
    gradient: list[torch.Tensor] = []

    def capture(*_: object) -> None:
        gradient.append(torch.cat([p.grad.flatten() for p in training.parameters.values() if p.grad is not None]))

    training.optimizer.register_step_pre_hook(capture)
    return optimizer_step(training, completed).loss, gradient[0]


@pytest.fixture
def unclipped(config: Config) -> Config:
    return replace(config, optim=replace(config.optim, max_grad_norm=float("inf")))


@pytest.mark.parametrize("completed", [0, 2], ids=["whole window", "partial last window"])
def test_every_cut_of_the_batch_gives_the_same_loss_and_gradient(unclipped: Config, completed: int) -> None:
    """8x1 = 4x2 = 2x4 = 1x8 with samples of unequal length, also in the epoch's last window of 3 samples."""
    results = [loss_and_gradient(with_batch(unclipped, *layout), completed) for layout in LAYOUTS]
    reference_loss, reference_gradient = results[0]
    assert reference_gradient.norm() > 1e-3
    for layout, (loss, gradient) in zip(LAYOUTS, results, strict=True):
        assert loss == pytest.approx(reference_loss, rel=1e-6), layout
        error = (gradient - reference_gradient).norm() / reference_gradient.norm()
        assert error < 1e-5, (layout, error)


def test_the_partial_window_weighs_every_token_alike(unclipped: Config) -> None:
    """The step's loss is transformers' own token mean over exactly the window's samples, not a mean of means."""
    training = build(with_batch(unclipped, 2, 4))
    ids = training.data.sample_ids(2)
    assert len(ids) == 3
    causal_lm = training.model.adapted
    loss_sum, count = 0.0, 0
    with torch.no_grad():
        for i in ids:
            sample = training.data.samples[i]
            logits = causal_lm(input_ids=torch.tensor([sample["input_ids"]])).logits[0, :-1]
            labels = torch.tensor(sample["input_ids"])[1:].where(torch.tensor(sample["trained"][1:]), -100)
            loss_sum += F.cross_entropy(logits, labels, ignore_index=-100, reduction="sum").item()
            count += int((labels != -100).sum())
    result = optimizer_step(training, 2)
    assert result.num_supervised_tokens == count
    assert result.loss == pytest.approx(loss_sum / count, rel=1e-5)


def test_a_validation_beside_graphs_takes_small_passes(config: Config) -> None:
    """None has more tokens than there is room for, but for longer samples, which are a pass of their own."""
    training = build(replace(config, engine=EngineConfig(kind="fused")))
    samples = training.data.samples
    material = Material({1: samples})
    whole = validate(training, material)
    most = 60
    plan = replace(training.plan, validation_tokens=most)
    passes: list[int] = []
    training.model.register_forward_pre_hook(lambda _, arguments: passes.append(arguments[0].input_ids.numel()))
    cut = validate(replace(training, plan=plan), material)
    assert cut["eval/loss"] == pytest.approx(whole["eval/loss"], rel=1e-6)
    longer = [length for length in samples["num_tokens"] if length > most]
    assert longer
    assert [tokens for tokens in passes if tokens > most] == longer
    assert sum(passes) == sum(samples["num_tokens"])
    assert len(passes) > len(longer) + 1  # several small ones


def test_a_validation_takes_the_plan_s_passes_though_none_are_merged(config: Config) -> None:
    """With merge off too, or two samples longer than any in training would be one pass that nobody has counted."""
    config = replace(config, engine=EngineConfig(kind="fused"), batch=BatchConfig(2, 4, merge="off"))
    training = build(config)
    samples: Any = training.data.samples
    longest = max(range(len(samples)), key=lambda i: samples[i]["num_tokens"])
    most = samples[longest]["num_tokens"]
    passes: list[int] = []
    training.model.register_forward_pre_hook(lambda _, arguments: passes.append(arguments[0].input_ids.numel()))
    plan = replace(training.plan, micro_batch_tokens=most)
    validate(replace(training, plan=plan), Material({1: samples.select([longest] * 4)}))
    assert passes == [most] * 4


def test_gradients_are_shared_once_a_step(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """With four forward passes there is one reduction for each flat parameter, after the last of them."""
    training = build(replace(config, batch=replace(config.batch, merge="off")))
    events: list[str] = []
    training.model.register_forward_pre_hook(lambda *_: events.append("forward"))
    monkeypatch.setattr(Accelerator, "num_processes", 2)

    def counted(tensor: torch.Tensor, reduction: str) -> torch.Tensor:
        events.append(f"{reduction} of {tensor.numel()}")
        return tensor * 2  # the other process has the same

    def counted_in_place(tensor: torch.Tensor) -> None:
        tensor.copy_(counted(tensor, "sum"))

    monkeypatch.setattr(training.accelerator, "reduce", counted)
    monkeypatch.setattr(torch.distributed, "all_reduce", counted_in_place)
    optimizer_step(training, 0)
    gradients = [f"sum of {leaf.numel()}" for leaf in training.flat.leaves]
    assert sum(p.numel() for p in training.parameters.values()) == sum(leaf.numel() for leaf in training.flat.leaves)
    assert events == ["forward"] * 4 + gradients + ["sum of 3"]  # the loss, who was asked to stop, who is there


def test_a_sum_that_was_given_up_is_not_used(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """NCCL gives a process its own part back when the others are silent: no update, and no flag is believed."""
    training = build(config)
    monkeypatch.setattr(Accelerator, "num_processes", 2)
    monkeypatch.setattr(training.accelerator, "reduce", lambda tensor, reduction: tensor)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: None)
    before = [leaf.detach().clone() for leaf in training.flat.leaves]
    accelerator = training.accelerator
    exchanges = (
        lambda: any_process(accelerator, True),
        lambda: differing(accelerator, {"code": "ours"}),
        lambda: least(accelerator, [1.0]),
    )
    for ask in (lambda: optimizer_step(training, 0), *exchanges):
        with pytest.raises(RuntimeError, match="a collective of NCCL or gloo was given up: 1 of 2"):
            ask()
    assert all(torch.equal(a, b) for a, b in zip(before, training.flat.leaves, strict=True))


def test_gradient_checkpointing_changes_nothing(unclipped: Config) -> None:
    """Recomputed activations give the same gradient, also with dropout."""
    dropped = replace(unclipped, lora=replace(unclipped.lora, dropout=0.3))
    kept = loss_and_gradient(dropped, 0)
    recomputed = loss_and_gradient(replace(dropped, memory=replace(dropped.memory, checkpointing="full")), 0)
    assert recomputed[0] == kept[0]
    assert torch.equal(recomputed[1], kept[1])


@pytest.mark.slow
@pytest.mark.parametrize("kind", [pytest.param("reference", marks=thorough), "fused"])
def test_two_processes_train_the_same_samples_to_the_same_losses(
    kind: Literal["reference", "fused"], config: Config, tmp_path: Path
) -> None:
    """2 processes x 1 x 4 = 1 process x 2 x 4 at every step, partial windows with an idle process included."""
    config = replace(config, engine=EngineConfig(kind=kind))
    single = replace(config, run=replace(config.run, dir=str(tmp_path / "single")))
    double = with_batch(replace(config, run=replace(config.run, dir=str(tmp_path / "double"))), 1, 4)
    outcomes = [run_command(arguments(single)), *(run.wait() for run in start_processes(arguments(double), [None] * 2))]
    assert [outcome.returncode for outcome in outcomes] == [0, 0, 0], outcomes[1].stderr
    first, second = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("single", "double"))
    assert len(first) == len(second) == 6
    for one, two in zip(first, second, strict=True):
        assert one["data/sample_ids"] == two["data/sample_ids"]
        assert two["train/loss"] == pytest.approx(one["train/loss"], rel=1e-4)
        assert two["train/grad_norm"] == pytest.approx(one["train/grad_norm"], rel=1e-3)

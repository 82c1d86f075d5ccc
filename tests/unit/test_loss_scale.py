"""fp16 steps: an overflow is computed again with half the scale and costs nothing else."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from tests.conftest import training_of
from tests.injections import NotANumber
from train.checkpoints.contents import (
    TrainerState,
)
from train.config import Config, EngineConfig
from train.models.language_model import LanguageModel
from train.optim import load_scaler_state
from train.step import StepResult, Training, optimizer_step


def build(config: Config, scale: float, growth_interval: int = 2000) -> Training:
    """A fused fp16 run with dropout, which starts with another loss scale than torch's 2^16."""
    config = replace(config, model=replace(config.model, dtype="fp16"), engine=EngineConfig(kind="fused"))
    training = training_of(replace(config, lora=replace(config.lora, dropout=0.1)), Accelerator(cpu=True))
    assert training.scaler.is_enabled()
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=growth_interval)
    return replace(training, scaler=scaler)


def step_with_gradient(training: Training, step: int) -> tuple[StepResult, list[torch.Tensor]]:
    """The step, and the gradients that the optimizer was given: one tensor, or none where it left the step out."""
    given: list[torch.Tensor] = []
    leaves = training.flat.leaves
    handle = training.optimizer.register_step_pre_hook(
        lambda *_: given.append(torch.cat([leaf.grad.flatten() for leaf in leaves if leaf.grad is not None]))
    )
    result = optimizer_step(training, step)
    handle.remove()
    return result, given


def counted_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every forward pass."""
    calls: list[int] = []
    original = LanguageModel.forward
    monkeypatch.setattr(LanguageModel, "forward", lambda model, batch: calls.append(1) or original(model, batch))
    return calls


@pytest.fixture
def injected(monkeypatch: pytest.MonkeyPatch) -> Callable[[NotANumber], None]:
    """Makes an injection whose traces are removed after the test."""

    def inject(fault: NotANumber) -> None:
        monkeypatch.setattr(LanguageModel, "forward", LanguageModel.forward)  # what is put back
        fault()

    return inject


def test_an_overflow_is_computed_again_and_nothing_else_changes(config: Config) -> None:
    """Its gradient is, to the bit, the one that a start with the lower scale gives; rate, samples and step are fp32's.

    The scale of 2^34 is too much for this model several times over.
    """
    high, exact = build(config, 2.0**34), training_of(config, Accelerator(cpu=True))
    first, given = step_with_gradient(high, 0)
    assert first.num_overflows > 2
    assert first.loss_scale == 2.0 ** (34 - first.num_overflows)
    assert high.scaler.state_dict()["_growth_tracker"] == 1
    low = build(config, first.loss_scale)
    same, wanted = step_with_gradient(low, 0)
    assert (same.num_overflows, same.loss_scale) == (0, first.loss_scale)
    assert torch.equal(given[0], wanted[0])
    assert given[0].norm() == pytest.approx(1, rel=1e-3)  # unscaled, then clipped to max_grad_norm
    for name, parameter in high.parameters.items():
        assert torch.equal(parameter, low.parameters[name]), name
    followed = [first, optimizer_step(high, 1)]
    for step, result in enumerate(followed):
        other = optimizer_step(exact, step)
        assert not result.is_skipped
        for field in ("step", "learning_rate", "sample_ids", "num_tokens", "num_supervised_tokens"):
            assert getattr(result, field) == getattr(other, field)
    assert followed[1].num_overflows == 0


def test_the_scale_grows_again(config: Config) -> None:
    """Every second step without an overflow doubles it, until it is too high and is halved in the same step."""
    training = build(config, 2.0**10, growth_interval=2)
    results = [optimizer_step(training, step) for step in range(5)]
    assert [result.loss_scale for result in results] == [2.0**10, 2.0**10, 2.0**11, 2.0**11, 2.0**12]
    assert not any(result.num_overflows for result in results)
    highest = optimizer_step(build(config, 2.0**34), 0).loss_scale
    training = build(config, highest, growth_interval=1)
    results = [optimizer_step(training, step) for step in range(4)]
    assert sum(result.num_overflows for result in results) >= 2
    assert not any(result.is_skipped for result in results)


def test_a_loss_that_is_no_number_is_a_skipped_step(
    config: Config, injected: Callable[[NotANumber], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Computed once, nothing updated, the scale as it was; the next step is an ordinary one."""
    training = build(config, 2.0**12)
    injected(NotANumber((1,)))
    passes = counted_passes(monkeypatch)
    before = {name: parameter.detach().clone() for name, parameter in training.parameters.items()}
    result, given = step_with_gradient(training, 0)
    assert (result.is_skipped, result.num_overflows, given) == (True, 0, [])
    assert len(passes) == len(training.data.batch(0, training.plan).micro_batches)
    assert all(torch.equal(parameter, before[name]) for name, parameter in training.parameters.items())
    assert training.scaler.get_scale() == 2.0**12
    after, given = step_with_gradient(training, 1)
    assert not after.is_skipped
    assert given[0].isfinite().all()


def test_a_gradient_that_no_scale_makes_finite_is_a_skipped_step(
    config: Config, injected: Callable[[NotANumber], None]
) -> None:
    """Tried down to a scale of 1, then left out; the scale, which was not to blame, is what it was."""
    training = build(config, 2.0**5)
    injected(NotANumber(tuple(range(1, 7)), only_gradient=True))
    assert len(training.data.batch(0, training.plan).micro_batches) == 1
    result, given = step_with_gradient(training, 0)
    assert (result.is_skipped, result.num_overflows, result.loss_scale, given) == (True, 5, 1.0, [])
    assert training.scaler.get_scale() == 2.0**5
    assert not optimizer_step(training, 1).is_skipped


def test_a_norm_that_is_infinite_alone_ends_too(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all elements are finite torch does not halve the scale: the window is not computed for ever."""
    training = build(config, 2.0**5)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda *_: torch.tensor(float("inf")))
    result = optimizer_step(training, 0)
    assert (result.is_skipped, result.num_overflows) == (True, 1)
    assert training.scaler.get_scale() == 2.0**5


def test_other_types_know_no_scale(config: Config, injected: Callable[[NotANumber], None]) -> None:
    """In fp32 and bf16 an infinite gradient is a skipped step at once, and there is nothing to save."""
    for number, dtype in enumerate(("fp32", "bf16")):
        chosen: Any = dtype
        training = training_of(replace(config, model=replace(config.model, dtype=chosen)), Accelerator(cpu=True))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LanguageModel, "forward", LanguageModel.forward)
            NotANumber((1,), only_gradient=True)()
            result = optimizer_step(training, 0)
        assert (result.is_skipped, result.num_overflows, result.loss_scale) == (True, 0, 1.0), number
        assert training.scaler.state_dict() == {}


def test_what_older_checkpoints_hold(config: Config) -> None:
    """A state without a scaler loads where none is used, and is refused where one is; JSON keeps all of it.

    One without metrics that wait for their validation has none.
    """
    old: dict[str, Any] = asdict(TrainerState(1, 2, {}, {}, {}))
    del old["scaler"], old["unlogged"]
    state = TrainerState(**json.loads(json.dumps(old)))
    assert state.unlogged == {}
    load_scaler_state(torch.amp.GradScaler("cpu", enabled=False), state.scaler)
    with pytest.raises(ValueError, match="the loss scaler's state"):
        load_scaler_state(torch.amp.GradScaler("cpu"), state.scaler)
    with pytest.raises(ValueError, match="the loss scaler's state"):
        load_scaler_state(torch.amp.GradScaler("cpu", enabled=False), {"scale": 8.0})
    training, other = build(config, 2.0**34, growth_interval=5), torch.amp.GradScaler("cpu")
    optimizer_step(training, 0)
    load_scaler_state(other, json.loads(json.dumps(training.scaler.state_dict())))
    assert other.state_dict() == training.scaler.state_dict()


def test_found_inf_is_a_function_of_the_gradient_alone() -> None:
    """What processes rely on: torch halves the scale for what stands in `.grad`, which is the sum over all of them."""
    for bad, wanted in ((float("inf"), 4.0), (float("nan"), 4.0), (1.0, 8.0)):
        parameter = torch.nn.Parameter(torch.zeros(3))
        optimizer, scaler = torch.optim.SGD([parameter]), torch.amp.GradScaler("cpu", init_scale=8.0)
        scaler.scale(torch.ones(()))
        parameter.grad = torch.tensor([8.0, bad, 8.0])
        place = parameter.grad
        scaler.unscale_(optimizer)
        assert parameter.grad is place  # in place: it stays a view of the flat gradient
        assert place[0] == 1.0
        scaler.update()
        assert scaler.get_scale() == wanted

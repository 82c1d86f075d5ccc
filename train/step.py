"""One optimizer step, the heart of the program."""

import math
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from train.collate import StepBatch
from train.config import Config
from train.data import TrainingData
from train.engine.plan import Plan
from train.learning_rate import Schedule
from train.metrics import Pace, to_host
from train.models.language_model import LanguageModel
from train.optim import FlatParameters, set_learning_rate
from train.run.processes import UNWATCHED, Watch, all_reduce_gradients, check_present
from train.seeds import seed_forward


@dataclass(frozen=True)
class Training:
    """What a step needs."""

    config: Config
    accelerator: Accelerator
    model: LanguageModel
    parameters: dict[str, torch.nn.Parameter]  # the adapters, by their names in adapter_model.safetensors
    flat: FlatParameters  # the same as the optimizer sees them
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # does nothing unless the base computes in fp16
    plan: Plan
    data: TrainingData
    schedule: Schedule
    reference_reason: str = ""  # why the engine is not the fused one, if it is not

    @property
    def total_steps(self) -> int:
        """Optimizer steps in the whole run."""
        return self.schedule.total_steps


class Dropped(Exception):
    """A step or a validation was left, in all processes and without a trace, because one was asked to stop."""


@dataclass(frozen=True)
class StepResult:
    """A completed optimizer step; `step` is how many are complete now."""

    step: int
    is_skipped: bool  # nothing was updated: the loss or gradient was not finite
    loss: float  # mean over the step's supervised tokens, of all processes
    grad_norm: float  # before clipping
    loss_scale: float  # 1 unless the base computes in fp16
    num_overflows: int  # times that the batch was computed again, each time at half the loss scale
    learning_rate: float
    num_tokens: int
    num_supervised_tokens: int
    num_micro_batches: int  # of this process
    sample_ids: list[int]


@dataclass(frozen=True)
class GradientStats:
    """Loss sum, gradient norm and loss scale of a step's gradient; the same in all processes."""

    loss_sum: float
    num_asked: float  # processes that were asked to stop and left their micro-batches unfinished
    norm: float  # before clipping
    scale: float  # the loss scale; the gradient is already divided by it

    @property
    def is_finite(self) -> bool:
        """Whether the optimizer may use it."""
        return math.isfinite(self.loss_sum) and math.isfinite(self.norm)

    @property
    def is_overflow(self) -> bool:
        """Whether a lower loss scale may help: the loss is finite, its gradient is not, and there is scale to lower."""
        return math.isfinite(self.loss_sum) and not math.isfinite(self.norm) and self.scale > 1 and not self.num_asked


def optimizer_step(training: Training, completed: int, watch: Watch = UNWATCHED) -> StepResult:
    """One update from the gradient of one batch; `completed` steps came before.

    After the all-reduce, a loss or gradient that was not finite in one process is not finite in any, so all of them
    skip the update. A gradient that only overflowed fp16 at this loss scale does not skip: the same batch is computed
    again at half the scale, so samples, learning rate and step numbers do not depend on the compute type.

    Raises Dropped, in all processes, if any was asked to stop before its last micro-batch: all is as it was before.
    """
    batch = training.data.batch(completed, training.plan)
    gradient, num_overflows, last_scale = step_gradient(training, batch, completed, watch), 0, math.inf
    first_scale, before = gradient.scale, training.scaler.state_dict()
    while gradient.is_overflow and gradient.scale < last_scale:
        last_scale, num_overflows = gradient.scale, num_overflows + 1
        training.scaler.update()  # halves the scale if an element is not finite, else (only the norm is) the loop ends
        gradient = step_gradient(training, batch, completed, watch)
    if gradient.num_asked:
        training.scaler.update(first_scale)  # forgets what unscale_ noted
        training.scaler.load_state_dict(before)
        raise Dropped
    rate = training.schedule.rate(completed)
    set_learning_rate(training.optimizer, rate)
    if gradient.is_finite:
        training.scaler.step(training.optimizer)
        training.scaler.update()
    else:
        training.scaler.update(first_scale)  # the scale was not the cause
    return StepResult(
        step=completed + 1,
        is_skipped=not gradient.is_finite,
        loss=gradient.loss_sum / batch.num_supervised_tokens,
        grad_norm=gradient.norm,
        loss_scale=gradient.scale,
        num_overflows=num_overflows,
        learning_rate=rate,
        num_tokens=batch.num_tokens,
        num_supervised_tokens=batch.num_supervised_tokens,
        num_micro_batches=len(batch.micro_batches),
        sample_ids=batch.sample_ids,
    )


def step_gradient(training: Training, batch: StepBatch, completed: int, watch: Watch) -> GradientStats:
    """Runs forward and backward over the batch; leaves the clipped gradient in the flat parameters.

    The loss of every token is divided by the number of supervised tokens in the whole step, over all micro-batches
    and processes, which is known before the first forward. So 8x1, 4x2, 2x4, 1x8 and several processes give the same
    gradient; a mean of means would not. The processes add their gradients once, after the last micro-batch; one that
    was asked to stop does so earlier, and the others learn it from the sum.
    """
    config, accelerator, scaler = training.config, training.accelerator, training.scaler
    training.flat.zero_grad()
    scale = scaler.scale(torch.ones((), device=accelerator.device))
    sums = torch.zeros(3, device=accelerator.device)  # of losses, of processes asked to stop, of all
    sums[2] = 1  # torch.tensor would wait for the device
    pace = Pace(accelerator.device)
    for number, micro_batch in enumerate(batch.micro_batches):
        if training.data.part.any_of(watch.is_asked()):  # those that share a micro-batch leave it together
            sums[1] = 1
            break
        on_device = micro_batch.to(accelerator.device)
        seed_forward(config.train.seed, completed, accelerator.process_index, number)
        token_loss_sum = training.model(on_device)
        scaler.scale(token_loss_sum / batch.num_supervised_tokens).backward()
        sums[0] += token_loss_sum.detach()
        del token_loss_sum  # and its autograd graph, before the next forward pass
        pace.mark()
    else:
        training.data.prefetch(completed + 1, training.plan, accelerator.device)  # while the GPU still computes

    watch.arrive()
    all_reduce_gradients(accelerator, training.flat.leaves)
    scaler.unscale_(training.optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(training.flat.leaves, config.optim.max_grad_norm)
    watch.arrive()
    totals = accelerator.reduce(sums, reduction="sum")
    loss, num_asked, num_present, norm, loss_scale = to_host(*totals, grad_norm, scale)
    check_present(accelerator.num_processes, num_present)
    return GradientStats(loss, num_asked, norm, loss_scale)

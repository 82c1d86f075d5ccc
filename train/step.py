"""One optimizer step, the heart of the program."""

import math
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from train.config import Config
from train.data import TrainingData
from train.metrics import read
from train.model import LanguageModel
from train.optim import FlatParameters, learning_rate, set_learning_rate
from train.plan import Plan
from train.runtime import add_over_processes, seed_forward


@dataclass(frozen=True)
class Training:
    """What a step needs."""

    config: Config
    accelerator: Accelerator
    model: LanguageModel
    parameters: dict[str, torch.nn.Parameter]  # the adapters, by their names in adapter_model.safetensors
    flat: FlatParameters  # the same as the optimizer sees them
    optimizer: torch.optim.Optimizer
    plan: Plan
    data: TrainingData
    total_steps: int


@dataclass(frozen=True)
class StepResult:
    """A completed optimizer step; `step` is how many are complete now."""

    step: int
    is_skipped: bool  # loss or gradient was not finite, in any process: nothing was updated
    loss: float  # mean over the step's supervised tokens, of all processes
    grad_norm: float  # before clipping
    learning_rate: float
    num_tokens: int
    num_supervised_tokens: int
    sample_ids: list[int]


def optimizer_step(training: Training, completed: int) -> StepResult:
    """Forward and backward over one window, then one update; `completed` steps came before.

    The loss of every token is divided by the number of supervised tokens in the whole step, over all micro-batches
    and processes, which is known before the first forward. So 8x1, 4x2, 2x4, 1x8 and several processes give the same
    gradient; a mean of means would not. The processes add their gradients once, after the last micro-batch. A loss or
    gradient that is not finite in one process is so in all of them after the reductions, and all of them leave the
    update out.
    """
    config, accelerator = training.config, training.accelerator
    window = training.data.window(completed)
    loss_sum = torch.zeros((), device=accelerator.device)
    for number, micro_batch in enumerate(window.micro_batches):
        batch = micro_batch.to(accelerator.device)
        seed_forward(config.train.seed, completed, accelerator.process_index, number)
        token_loss_sum = training.model(batch)
        (token_loss_sum / window.num_supervised_tokens).backward()
        loss_sum += token_loss_sum.detach()
    training.data.prepare(completed + 1)  # while a GPU still computes

    add_over_processes(accelerator, training.flat.leaves)
    grad_norm = torch.nn.utils.clip_grad_norm_(training.flat.leaves, config.optim.max_grad_norm)
    total = accelerator.reduce(loss_sum, reduction="sum")
    loss_total, norm = read(total, grad_norm)
    is_finite = math.isfinite(loss_total) and math.isfinite(norm)
    rate = learning_rate(completed, training.total_steps, config.optim)
    set_learning_rate(training.optimizer, rate)
    if is_finite:
        training.optimizer.step()
    training.flat.zero_grad()
    return StepResult(
        step=completed + 1,
        is_skipped=not is_finite,
        loss=loss_total / window.num_supervised_tokens,
        grad_norm=norm,
        learning_rate=rate,
        num_tokens=window.num_tokens,
        num_supervised_tokens=window.num_supervised_tokens,
        sample_ids=window.sample_ids,
    )

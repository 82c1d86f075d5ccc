"""The loop: a generator of completed steps, and what hangs off their boundaries."""

from collections.abc import Callable, Iterator

from train.config import CheckpointConfig
from train.exits import ExitCode, ExitWith
from train.metrics import Stopwatch, flops_per_token, num_matmul_weights, peak_flops
from train.runtime import StopRequest
from train.step import StepResult, Training, optimizer_step
from train.trackers import Trackers

Row = dict[str, float | int | list[int]]


def training_steps(training: Training, completed: int) -> Iterator[StepResult]:
    """Yields every step after the `completed` ones up to the last."""
    while completed < training.total_steps:
        result = optimizer_step(training, completed)
        completed = result.step
        yield result


def train(
    training: Training,
    completed: int,
    stop: StopRequest,
    trackers: Trackers,
    save: Callable[[int], None],
    validate: Callable[[], dict[str, float]],
) -> None:
    """Trains to the end; the boundary after a step is the only place where anything else happens.

    Raises ExitWith(INTERRUPTED) after a checkpoint when a process was asked to stop.
    """
    stopwatch = Stopwatch(training.accelerator.device)
    num_weights = num_matmul_weights(training.model)
    saved = completed
    since_last: Row = {}  # what happened between two steps, for the next row
    if stop.agreed(training.accelerator):
        raise ExitWith(ExitCode.INTERRUPTED, f"stopped by {stop.received or 'another process'} before a step was made")
    for result in training_steps(training, completed):
        row = _row(training, result, stopwatch, num_weights) | since_last
        since_last = {}
        if result.step % training.data.steps_per_epoch == 0 or result.step == training.total_steps:
            row |= validate()
        trackers.log(row)
        must_stop = stop.agreed(training.accelerator)
        if must_stop or is_due(training, result.step):
            stopwatch.restart()
            save(result.step)
            saved = result.step
            since_last["perf/save_seconds"] = round(stopwatch.lap(), 3)
        if must_stop:
            reason = (
                f"stopped by {stop.received or 'another process'}; step {saved} is saved, run the same command again"
            )
            raise ExitWith(ExitCode.INTERRUPTED, reason)
        stopwatch.restart()


def is_due(training: Training, step: int) -> bool:
    """Whether a checkpoint is to be written after `step`."""
    checkpoint: CheckpointConfig = training.config.checkpoint
    every = training.data.steps_per_epoch if checkpoint.every == "epoch" else checkpoint.every
    return step % every == 0 or step == training.total_steps


def _row(training: Training, result: StepResult, stopwatch: Stopwatch, num_weights: int) -> Row:
    seconds = stopwatch.lap()
    row: Row = {
        "step": result.step,
        "epoch": round(result.step / training.data.steps_per_epoch, 4),
        "train/loss": result.loss,
        "train/grad_norm": result.grad_norm,
        "train/learning_rate": result.learning_rate,
        "perf/step_seconds": round(seconds, 4),
        "perf/tokens_per_second": round(result.num_tokens / seconds, 1),
        "data/tokens": result.num_tokens,
        "data/supervised_tokens": result.num_supervised_tokens,
        "data/sample_ids": result.sample_ids,
        **stopwatch.peak_gib(),
    }
    peak = peak_flops(training.accelerator.device)
    if peak is not None:
        shape = training.model.adapted.get_base_model().config
        mean_length = result.num_tokens / len(result.sample_ids)
        flops = flops_per_token(num_weights, shape, mean_length) * result.num_tokens
        row["perf/mfu"] = round(flops / seconds / peak / training.accelerator.num_processes, 4)
    return row

"""The training loop: a generator of completed steps, and what happens at the boundary after each."""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from train.checkpoints.saver import Saver
from train.memory.gpus import peak_flops
from train.metrics import Stopwatch, flops_per_token, mfu, num_matmul_weights
from train.run.defects import Doing
from train.run.durable import write_atomically
from train.run.exits import ExitCode, ExitWith
from train.run.folder import RunFolder
from train.run.processes import Heartbeat, advice_to_repeat, any_process
from train.run.signals import StopRequest
from train.step import StepResult, Training, optimizer_step
from train.track.loss_watch import LossWatch
from train.track.trackers import Trackers

Row = dict[str, Any]
MAX_SKIPPED_IN_A_ROW = 3


def training_steps(training: Training, completed: int, doing: Doing) -> Iterator[StepResult]:
    """Yields every step after the `completed` ones up to the last."""
    while completed < training.total_steps:
        doing.now = f"training, step {completed + 1}"
        result = optimizer_step(training, completed)
        completed = result.step
        yield result


def training_loop(
    training: Training,
    stop: StopRequest,
    trackers: Trackers,
    saver: Saver,
    validate: Callable[[], dict[str, float]],
    doing: Doing,
) -> None:
    """Trains to the end; the boundary after a step is the only place where anything else happens.

    Raises ExitWith(INTERRUPTED) after a checkpoint when a process was asked to stop, ExitWith(NON_FINITE) when too many
    steps were skipped.
    """
    stopwatch = Stopwatch(training.accelerator.device)
    num_weights = num_matmul_weights(training.model)
    watch, heartbeat = LossWatch(), Heartbeat(training.config, training.accelerator)
    since_last: Row = {}  # time and failures of the last save, for the next row
    for result in training_steps(training, saver.saved, doing):
        heartbeat.beat(result.step)
        row = _row(training, result, stopwatch, num_weights) | since_last
        since_last = {}
        if result.step % training.data.steps_per_epoch == 0 or result.step == training.total_steps:
            row |= validate()
        warnings = [_without_bad_validation(row), watch.check(result.loss)]
        if result.is_skipped:
            warnings.append(report_skipped(training, saver.skipped, result))
        if any(warnings):
            row["warning"] = "; ".join(filter(None, warnings))
        trackers.log(row)
        validation_loss = row.get("eval/loss")
        is_first = training.accelerator.is_main_process  # its clock and its disk decide
        is_wanted = is_first and (saver.is_time() or saver.is_due(result.step, validation_loss))
        must_stop, must_save = any_process(training.accelerator, stop.is_received(), is_wanted)
        if must_stop or must_save:
            stopwatch.restart()
            saver.save(result.step, validation_loss, must_stop)
            since_last = {"perf/save_seconds": round(stopwatch.lap(), 3), "perf/failed_saves": saver.failures}
        if must_stop:
            who = stop.received or "another process"
            reason = f"stopped by {who}; step {saver.saved} is saved, {advice_to_repeat(training.config)}"
            raise ExitWith(ExitCode.INTERRUPTED, reason)
        stopwatch.restart()


def _without_bad_validation(row: Row) -> str:
    """Takes a validation loss that is not finite out of the row; returns a warning, or nothing."""
    if math.isfinite(row.get("eval/loss", 0.0)):
        return ""
    row.pop("eval/perplexity")
    return f"the validation loss is {row.pop('eval/loss')}; the best checkpoint is chosen without it"


def report_skipped(training: Training, skipped: list[int], result: StepResult) -> str:
    """Records a skipped step and returns a warning; raises ExitWith(NON_FINITE) when it is one too many."""
    skipped.append(result.step)
    limit = training.config.train.max_skipped_steps
    in_a_row = sum(step > result.step - MAX_SKIPPED_IN_A_ROW - 1 for step in skipped)
    sources = [training.data.samples[i]["source"] for i in result.sample_ids]
    text = f"loss {result.loss}, gradient norm {result.grad_norm}; nothing was updated"
    if training.accelerator.is_main_process:
        record = {"step": result.step, "loss": str(result.loss), "grad_norm": str(result.grad_norm)}
        record |= {"sample_ids": result.sample_ids, "sources": sources}
        path = RunFolder.of(training.config).nonfinite(result.step)
        with suppress(OSError):  # a full disk must not turn a skipped step into a dead run
            write_atomically(path, json.dumps(record, indent=2) + "\n")
    if len(skipped) > limit or in_a_row > MAX_SKIPPED_IN_A_ROW:
        raise ExitWith(
            ExitCode.NON_FINITE,
            f"step {result.step}: {text}.\nSkipped steps so far: {', '.join(map(str, skipped))} "
            f"(train.max_skipped_steps {limit}, {MAX_SKIPPED_IN_A_ROW} in a row)\n"
            f"The step's samples: {', '.join(sources)}\n"
            "Lower --optim.lr, or look at these samples; no checkpoint holds a weight that is not finite",
        )
    return f"{text}, the step is skipped ({len(skipped)} of at most {limit}); its samples: {', '.join(sources)}"


def _row(training: Training, result: StepResult, stopwatch: Stopwatch, num_weights: int) -> Row:
    seconds = stopwatch.lap()
    finite = {"train/loss": result.loss, "train/grad_norm": result.grad_norm}  # JSON has no NaN
    row: Row = {
        "step": result.step,
        "epoch": round(result.step / training.data.steps_per_epoch, 4),
        **({"train/skipped": 1} if result.is_skipped else finite),
        "train/learning_rate": result.learning_rate,
        "perf/step_seconds": round(seconds, 4),
        "perf/tokens_per_second": round(result.num_tokens / seconds, 1),
        "data/tokens": result.num_tokens,
        "data/supervised_tokens": result.num_supervised_tokens,
        "data/sample_ids": result.sample_ids,
        **stopwatch.peak_gib(),
    }
    if training.scaler.is_enabled():
        row |= {"train/loss_scale": result.loss_scale, "train/overflows": result.num_overflows}
    peak = peak_flops(training.accelerator.device)
    if peak is not None:
        shape = training.model.adapted.get_base_model().config
        mean_length = result.num_tokens / len(result.sample_ids)
        flops = flops_per_token(num_weights, shape, mean_length) * result.num_tokens
        row["perf/mfu"] = round(mfu(flops, seconds, peak, training.accelerator.num_processes), 4)
    return row

"""The training loop: a generator of completed steps, and what happens at the boundary after each."""

import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, NoReturn

from train.checkpoints.saver import Saver
from train.grace import Grace
from train.memory.gpus import peak_flops
from train.metrics import Stopwatch, flops_per_token, mfu, num_chosen_experts, num_matmul_weights
from train.recording import capture_seconds
from train.run.defects import Doing
from train.run.durable import write_atomically
from train.run.exits import ExitCode, ExitWith
from train.run.folder import RunFolder
from train.run.processes import Heartbeat, Watch, advice_to_repeat, any_process
from train.step import Dropped, StepResult, Training, optimizer_step
from train.track.loss_watch import LossWatch
from train.track.trackers import Trackers
from train.validation.validator import Validator

Row = dict[str, Any]
MAX_SKIPPED_IN_A_ROW = 3


def training_loop(boundary: "Boundary") -> int:
    """Trains to the end, which is the schedule's or a validation's decision; returns the last step.

    Raises ExitWith(INTERRUPTED) after a checkpoint when a process was asked to stop, ExitWith(NON_FINITE) when too many
    steps were skipped.
    """
    saver = boundary.saver
    try:
        if saver.unlogged:
            boundary.finish(saver.unlogged)
        elif not saver.saved:
            boundary.start()
        steps = training_steps(boundary.training, saver.saved, boundary.heartbeat, boundary.doing)
        while not boundary.validator.reason_to_end(boundary.row["step"]) and (result := next(steps, None)):
            boundary.cross(result)
    except Dropped:
        boundary.stop()
    return boundary.row["step"]


def training_steps(training: Training, completed: int, watch: Watch, doing: Doing) -> Iterator[StepResult]:
    """Yields every step after the `completed` ones up to the last; raises Dropped."""
    while completed < training.total_steps:
        doing.now = f"training, step {completed + 1}"
        result = optimizer_step(training, completed, watch)
        completed = result.step
        yield result


class Boundary:
    """What happens after a step, and nowhere else: log, validate, save, stop."""

    def __init__(
        self,
        training: Training,
        heartbeat: Heartbeat,
        trackers: Trackers,
        saver: Saver,
        validator: Validator,
        doing: Doing,
    ) -> None:
        self.training, self.heartbeat, self.trackers, self.saver = training, heartbeat, trackers, saver
        self.validator, self.doing = validator, doing
        self.stopwatch = Stopwatch(training.accelerator.device)
        shape: Any = training.model.causal_lm.config
        num_chosen = num_chosen_experts(shape.get_text_config(decoder=True))
        self.num_weights = num_matmul_weights(training.model, num_chosen)
        self.loss_watch, self.grace = LossWatch(), Grace(training.config.run)
        self.row: Row = {"step": saver.saved}  # of the last step that is complete
        self.since_last: Row = {}  # time and failures of the last save, for the next row
        self.capture_seconds = 0.0  # in rows so far

    def start(self) -> None:
        """Validates and logs before the first step, if that is wanted; raises Dropped."""
        if self.validator.starts:
            self.doing.now = "validating before the first step"
            self.trackers.log({**self.row, "epoch": 0.0, **self.validator.measure(0)})
            self.stopwatch.restart()

    def cross(self, result: StepResult) -> None:
        """Does all of it after a step; raises Dropped or ExitWith."""
        self.heartbeat.beat(result.step)
        row = _row(self.training, result, self.stopwatch, self.num_weights) | self.since_last | self._captures()
        num_passes = result.num_micro_batches * (1 + result.num_overflows)
        told, mirrored = self.saver.copies.news()
        row |= mirrored
        warnings = [self.loss_watch.check(result.loss), self.grace.check(row["perf/step_seconds"] / num_passes), told]
        if result.is_skipped:
            warnings.append(report_skipped(self.training, self.saver.skipped, result))
        if any(warnings):
            row["warning"] = "; ".join(filter(None, warnings))
        self.since_last, self.saver.is_current = {}, False
        self.finish(row)

    def _captures(self) -> Row:
        """The time that CUDA graphs were captured in since the last row; the first row has that of the start, too."""
        before, self.capture_seconds = self.capture_seconds, capture_seconds(self.training)
        seconds = self.capture_seconds - before
        return {"perf/capture_seconds": round(seconds, 3)} if seconds > 0 else {}

    def finish(self, row: Row) -> None:
        """Validates if it is time, logs the row, and saves and stops likewise; raises Dropped or ExitWith."""
        self.row = self.saver.unlogged = row
        step, training = row["step"], self.training
        is_validated = self.validator.is_due(step)
        if is_validated:
            self.doing.now = f"validating after step {step}"
            measured = self.validator.measure(step)
            told = [each for each in (measured.pop("warning", ""), row.get("warning", ""), self._early_end()) if each]
            self.row = row | measured | ({"warning": "; ".join(told)} if told else {})
        self.trackers.log(self.row)
        self.saver.unlogged, self.saver.is_current = {}, False
        if is_validated:
            self.doing.now = f"asking questions after step {step}"
            self.trackers.answers(self.validator.ask(step))
        is_first = training.accelerator.is_main_process  # its clock and its disk decide
        is_wanted = is_first and (self.saver.is_time() or self.saver.is_due(step, self.row.get("eval/loss")))
        self.heartbeat.arrive()
        must_stop, must_save = any_process(training.accelerator, self.heartbeat.is_asked(), is_wanted)
        if must_save and not must_stop:
            self._save(must_stop=False)
        if must_stop:
            self.stop()
        self.stopwatch.restart()

    def _early_end(self) -> str:
        """What is said where the run ends before its last step."""
        reason = self.validator.reason_to_end(self.row["step"])
        return f"training ends here, before step {self.training.total_steps}: {reason}" if reason else ""

    def stop(self) -> NoReturn:
        """Saves the last complete step, unless it is saved, and ends the run."""
        step, stop, repeat = self.row["step"], self.heartbeat.stop, advice_to_repeat(self.training.config)
        who = stop.received or "another process"
        if not step:
            reason = f"stopped by {who} before the first step was complete, so there is nothing to save; {repeat}"
            raise ExitWith(ExitCode.INTERRUPTED, reason)
        if not self.saver.is_current:
            self._save(must_stop=True)
        seconds = round(stop.seconds(), 1)
        if self.training.config.checkpoint.mirror:
            self.doing.now = "waiting for the mirror"
        copied = self.saver.finish_copies(stop)
        if self.saver.unlogged:  # its row is not written, so the summary counts a step fewer
            repeat += f", which repeats the validation of step {step} and then logs that step"
        repeat = f"{copied}; {repeat}" if copied else repeat
        if not stop.received:
            raise ExitWith(ExitCode.INTERRUPTED, f"stopped by {who}; step {step} is saved, {repeat}")
        reason = f"stopped by {who}; step {step} is saved, {seconds} s after the signal; {repeat}"
        raise ExitWith(ExitCode.INTERRUPTED, reason, seconds_after_signal=seconds)

    def _save(self, must_stop: bool) -> None:
        self.stopwatch.restart()
        self.doing.now = f"saving step {self.row['step']}"
        self.heartbeat.arrive()
        self.saver.save(self.row["step"], self.row.get("eval/loss"), must_stop)
        self.grace.save_seconds = self.stopwatch.lap()
        seconds = round(self.grace.save_seconds, 3)
        self.since_last = {"perf/save_seconds": seconds, "perf/failed_saves": self.saver.failures}
        if self.saver.is_current:
            self.since_last["checkpoint/step"] = self.saver.saved


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
        whole: Any = training.model.causal_lm.config
        shape = whole.get_text_config(decoder=True)
        mean_length = result.num_tokens / len(result.sample_ids)
        are_trained = training.config.train.method == "full"
        flops = flops_per_token(num_weights, shape, mean_length, are_trained) * result.num_tokens
        row["perf/mfu"] = round(mfu(flops, seconds, peak, training.accelerator.num_processes), 4)
    return row

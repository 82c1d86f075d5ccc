"""When a checkpoint is written, and what happens if that fails."""

import time
from dataclasses import dataclass, field
from typing import Any

from train.checkpoints.contents import Checkpoint, step_of
from train.checkpoints.copier import Copies
from train.checkpoints.resume import save_state
from train.checkpoints.store import DISK_RESERVE, CheckpointStore, free_bytes
from train.early_stop import ValidationRecord
from train.optim import state_bytes
from train.run.exits import ExitCode, ExitWith
from train.run.processes import on_first_process, say
from train.run.redact import redact
from train.run.signals import StopRequest
from train.step import Training
from train.track.trackers import Trackers

MAX_FAILED_SAVES = 3  # in a row; one more ends the run


@dataclass
class Saver:
    """Writes the checkpoints of one run; every process has one, and all of them take the same decisions."""

    training: Training
    store: CheckpointStore
    same_run: dict[str, object]
    trackers: Trackers
    saved: int = 0  # the step of the newest checkpoint
    is_current: bool = False  # it is in this run's folder and holds all that is known after that step
    skipped: list[int] = field(default_factory=list)  # steps whose loss or gradient was not finite
    record: ValidationRecord = field(default_factory=ValidationRecord)  # of all validations so far
    unlogged: dict[str, Any] = field(default_factory=dict)  # the last step's metrics until its validation is done
    failures: int = 0
    copies: Copies = field(default_factory=Copies)  # to the mirror
    since: float = field(default_factory=time.monotonic)

    @classmethod
    def of(
        cls,
        training: Training,
        store: CheckpointStore,
        same_run: dict[str, object],
        trackers: Trackers,
        checkpoint: Checkpoint | None,
    ) -> "Saver":
        """A saver that continues from `checkpoint`, or starts without one."""
        saver = cls(training, store, same_run, trackers, record=ValidationRecord(store.measured_on))
        if checkpoint is not None:
            state = checkpoint.state
            saver.record = ValidationRecord.resumed(state.validation or _best(store), store.measured_on)
            saver.saved, saver.skipped, saver.unlogged = state.step, list(state.skipped_steps), state.unlogged
            saver.is_current = store.holds(checkpoint)
            if training.accelerator.is_main_process:
                store.prune()  # a kill may have come between save and retention
        return saver

    def is_due(self, step: int, validation_loss: float | None) -> bool:
        """Whether `step` gets a checkpoint whatever the clock says: by the interval, as the last, or as the best."""
        is_best = validation_loss is not None and step == self.record.best_step
        return self.training.data.ends(step, self.training.config.checkpoint.every) or self.is_last(step) or is_best

    def is_last(self, step: int) -> bool:
        """Whether no step comes after `step`: by the schedule, or since the validation loss ends the run early."""
        return step == self.training.total_steps or bool(self.record.reason_to_end(self.training.config.validate))

    def is_time(self) -> bool:
        """Whether checkpoint.minutes have passed since the last checkpoint, by this process's clock."""
        minutes = self.training.config.checkpoint.minutes
        return minutes > 0 and time.monotonic() - self.since >= 60 * minutes

    def save(self, step: int, validation_loss: float | None, must_stop: bool) -> None:
        """Writes the checkpoint of `step`; if that fails, the run goes on without it.

        Raises ExitWith(SAVE_FAILED) if the run must stop now, or if more than MAX_FAILED_SAVES in a row have failed.
        """
        self.since = time.monotonic()
        try:
            save_state(self.training, self.store, self.same_run, lambda: self._moment(step, validation_loss))
        except ExitWith as end:
            self.failures += 1
            if end.code != ExitCode.SAVE_FAILED or must_stop or self.failures > MAX_FAILED_SAVES:
                raise
            stands = f"step {self.saved} is the newest checkpoint" if self.saved else "there is no checkpoint yet"
            count = f"{self.failures} of at most {MAX_FAILED_SAVES} failures in a row"
            goes_on = "training goes on"
            if self.is_last(step):
                goes_on = "training is over, final/ follows; repeating the command would train the last steps again"
            say(self.training.accelerator, f"\n{redact(end.reason)}\n{goes_on}, {stands}; {count}")
            return
        self.saved, self.is_current, self.failures = step, True, 0
        self.copies.copy(step)

    def finish_copies(self, stop: StopRequest, is_stopping: bool = True) -> str:
        """What is at the mirror, after waiting for what is under way; empty without one.

        Before a stop all processes wait for the first one: launchers kill those that are left.
        """
        said, grace = "", self.training.config.run.grace_seconds

        def finish() -> int:
            nonlocal said
            said = self.copies.finish(stop, grace, is_stopping)
            return 0

        if self.training.config.checkpoint.mirror and is_stopping:
            on_first_process(self.training.accelerator, finish)
        else:
            finish()
        return said

    def _moment(self, step: int, validation_loss: float | None) -> dict[str, object]:
        return {
            "step": step,
            "metrics_bytes": self.trackers.metrics_bytes(),
            "answers_bytes": self.trackers.answers_bytes(),
            "skipped_steps": self.skipped,
            "validation_loss": validation_loss,
            "validation": self.record.as_state(),
            "unlogged": self.unlogged,
        }


def _best(store: CheckpointStore) -> dict[str, Any]:
    """What a checkpoint of 0.1.0 leaves to be read from all of them."""
    best = store.best()
    return {"best_loss": best[1], "best_step": step_of(best[0])} if best else {}


def checkpoint_bytes(training: Training) -> int:
    """Size of one checkpoint on disk: fp32 adapters, the optimizer's state, and what describes them."""
    parameters = training.parameters
    tensors = 4 * sum(p.numel() for p in parameters.values()) + state_bytes(parameters.values(), training.config.optim)
    descriptions = 1000 * len(parameters)  # five entries of some 200 bytes in the headers for each
    return tensors + descriptions


def check_disk(training: Training, store: CheckpointStore) -> int:
    """Reports the size of a checkpoint and the free space; raises ExitWith(BAD_INPUT) if not even one fits."""
    size, free = checkpoint_bytes(training), free_bytes(store.folder.path)
    line = f"checkpoints of {size / 2**20:,.1f} MiB, {free / 2**30:,.1f} GiB free in {store.folder.path}"
    if free < size * DISK_RESERVE:
        raise ExitWith(ExitCode.BAD_INPUT, f"{line}: not enough for one; make room, or choose another --run.dir")
    stay = store.keep + 2  # the best one, and the one being written
    if free < size * stay:
        line += f"; {stay} of them may have to stand at once, and training goes on without those that find no room"
    say(training.accelerator, f"disk      {line}")
    return 0

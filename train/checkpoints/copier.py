"""Copies checkpoints to the mirror in a thread of its own; whatever happens there, training goes on."""

import json
import threading
import time
from contextlib import suppress
from typing import Any

from train.checkpoints.contents import UNREADABLE, step_of
from train.checkpoints.mirror import Mirror
from train.checkpoints.remote import reason_of
from train.checkpoints.source import Source
from train.checkpoints.store import CheckpointStore
from train.run.durable import write_atomically
from train.run.signals import StopRequest

FINISH_SECONDS = 600.0  # at most, for what is under way when a run ends that nobody has stopped
STALL_SECONDS = 120.0  # without a byte, after which such a run waits no longer
TELL_SECONDS = 2.0  # of waiting, after which it is said
LOOK_SECONDS = 0.1  # between two looks whether it is done, or a signal has come
MAX_RESERVE = 5.0  # of the grace period: for exit.json and the end of the process


class Copies:
    """Copies nothing: of a process that is not the first, and of a run without a mirror."""

    def copy(self, step: int) -> None:
        """Hands the checkpoint of `step` over, which has just become durable here."""

    def news(self) -> tuple[str, dict[str, float]]:
        """A warning about a failure that was not told yet, and what has changed, for a row of metrics."""
        return "", {}

    def finish(self, stop: StopRequest, grace_seconds: float, is_stopping: bool) -> str:
        """Waits for what is under way, and says what is at the mirror; once.

        For FINISH_SECONDS at most, and where the run must stop for what is left of its grace period (`is_stopping`:
        another process was asked).
        """
        return ""


class Copier(Copies):
    """The newest checkpoint waits while another one is copied; one that a newer one overtakes is left out."""

    def __init__(self, mirror: Mirror, store: CheckpointStore, newest: int) -> None:
        """Starts with the checkpoint of step `newest`, if there is one here that the mirror lacks."""
        self.mirror, self.store = mirror, store
        self.condition = threading.Condition()
        self.waiting: Source | None = None
        self.current: Source | None = None
        self.wanted = self.mirrored = 0  # the newest step here, and that which is whole there
        self.copied = self.failed = self.overtaken = 0
        self.failure = ""  # of the last try, until one succeeds
        self.untold: list[str] = []
        self.told = 0  # the mirrored step, as rows of metrics have it
        self.is_over = False  # what is at the mirror was said
        self.thread = threading.Thread(target=self._work, name="mirror", daemon=True)
        self.thread.start()
        if newest:
            self.copy(newest)

    def copy(self, step: int) -> None:
        """Hands the checkpoint of `step` over; returns at once."""
        self.wanted = step
        try:
            source = Source.of(self.store.path_of(step), self.store.folder)
        except (OSError, *UNREADABLE) as error:
            self._failed(step, error)
            return
        with self.condition:
            if self.waiting is not None:
                self.overtaken += 1
                self.waiting.close()
            self.waiting = source
            self.condition.notify_all()

    def news(self) -> tuple[str, dict[str, float]]:
        """Failures that were not told yet, the newest mirrored step where it has changed, and how many failed."""
        with self.condition:
            warning, self.untold = "; ".join(self.untold), []
            figures: dict[str, float] = {}
            if self.mirrored != self.told:
                self.told = figures["checkpoint/mirrored_step"] = self.mirrored
            if warning:
                figures["checkpoint/failed_copies"] = self.failed
            return warning, figures

    def finish(self, stop: StopRequest, grace_seconds: float, is_stopping: bool) -> str:
        """Waits as Copies says; a copy that failed is tried once more."""
        if self.is_over:
            return ""
        self.is_over = True
        if self.failure and not self._is_busy() and self.wanted > self.mirrored:
            self.copy(self.wanted)
        grace = grace_seconds - min(MAX_RESERVE, grace_seconds / 5)
        began = moved_at = time.monotonic()
        moved, is_told = -1, is_stopping
        while self._is_busy():
            now = time.monotonic()
            if now - began > TELL_SECONDS and not is_told:
                is_told = True
                with suppress(OSError):  # a terminal that is gone
                    print(f"mirror    waiting for step {self.wanted} to be copied to {self.mirror.url}", flush=True)
            if self.mirror.remote.moved != moved:
                moved, moved_at = self.mirror.remote.moved, now
            if stop.is_received():
                is_over = stop.seconds() >= grace
            elif is_stopping:
                is_over = now - began >= grace
            else:
                is_over = now - began >= FINISH_SECONDS or now - moved_at >= STALL_SECONDS
            if is_over:
                break
            time.sleep(LOOK_SECONDS)
        self._record()
        return self._outcome()

    def _is_busy(self) -> bool:
        with self.condition:
            return self.waiting is not None or self.current is not None

    def _outcome(self) -> str:
        """What is at the mirror, and what is not."""
        with self.condition:
            stands = f"step {self.mirrored} is the newest there" if self.mirrored else "no checkpoint is there"
            url, current = self.mirror.url, self.current or self.waiting
            if self.wanted == self.mirrored:
                return f"step {self.mirrored} is whole at {url}" if self.wanted else f"nothing was copied to {url}"
            if current is not None:
                sent = f"{current.sent / 2**20:,.1f} of {current.size / 2**20:,.1f} MiB were sent"
                return (
                    f"step {self.wanted} is not whole at {url}, time was up ({sent} of step {current.step}); {stands}"
                )
            return f"step {self.wanted} is not at {url} ({self.failure}); {stands}"

    def _work(self) -> None:
        while True:
            with self.condition:
                while self.waiting is None:
                    self.condition.wait()
                source, self.current, self.waiting = self.waiting, self.waiting, None
            self._copy_one(source)
            with self.condition:
                self.current = None

    def _copy_one(self, source: Source) -> None:
        try:
            is_new = self.mirror.put(source)
        except Exception as error:  # whatever it is, it must not reach training
            self._failed(source.step, error)
            return
        finally:
            source.close()
        with self.condition:
            self.copied += is_new
            self.mirrored, self.failure = max(self.mirrored, source.step), ""
        self._record()
        try:
            self._keep_best()
            self.mirror.prune(source.run_uid, self.store.keep, self._best_step())
        except Exception as error:
            self._say(f"what {self.mirror.url} no longer needs could not be removed: {reason_of(error)}")

    def _keep_best(self) -> None:
        """Copies the checkpoint with the lowest validation loss, if it was overtaken when it was new."""
        best = self._best_step()
        if best and all(copy.step != best for copy in self.mirror.copies()):
            source = Source.of(self.store.path_of(best), self.store.folder)
            try:
                self.mirror.put(source)
            finally:
                source.close()

    def _best_step(self) -> int:
        best = self.store.best()
        return step_of(best[0]) if best else 0

    def _failed(self, step: int, error: Exception) -> None:
        with self.condition:
            self.failed += 1
            self.failure = reason_of(error)
        stands = f"step {self.mirrored} is the newest there" if self.mirrored else "no checkpoint is there yet"
        self._say(
            f"step {step} could not be copied to {self.mirror.url}: {self.failure}; {stands}, training goes on, and "
            "the next checkpoint is tried"
        )
        self._record()

    def _say(self, warning: str) -> None:
        with self.condition:
            self.untold.append(warning)

    def _record(self) -> None:
        """Writes mirror.json, for people and the summary."""
        with self.condition:
            facts: dict[str, Any] = {"url": self.mirror.url, "step": self.mirrored, "newest_step": self.wanted}
            facts |= {"copied": self.copied, "failed": self.failed, "overtaken": self.overtaken}
            facts |= {"last_failure": self.failure}
        with suppress(OSError):
            write_atomically(self.store.folder.mirror, json.dumps(facts, indent=2) + "\n")

"""Who is told about a run: metrics.jsonl, which is the truth, the terminal, and listeners. None can stop training."""

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from train.config import Config
from train.run.folder import RunFolder, read_object
from train.track.isolated import Isolated, Listener
from train.track.metrics_file import MetricsFile, read_metrics
from train.track.mlflow_tracker import MLflow
from train.track.shared import plan_table
from train.track.tensorboard_tracker import TensorBoard
from train.track.weights_and_biases import WeightsAndBiases

T = TypeVar("T")


def wanted_listeners(config: Config) -> list[Listener]:
    """The listeners that the configuration asks for; raises ExitWith(BAD_INPUT) where one cannot be had.

    To add a tracker write its Listener in a file beside weights_and_biases.py, its options in TrackConfig
    (train/config.py), a name for what it writes in the run folder in RunFolder (train/run/folder.py), and a line here.
    """
    found = [WeightsAndBiases.wanted(config), MLflow.wanted(config), TensorBoard.wanted(config)]
    return [listener for listener in found if listener is not None]


class Watcher(Protocol):
    """Sees the rows in this process, at once."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Takes one row of metrics, at a step's boundary."""
        ...

    def finish(self) -> None:
        """Ends; nothing comes after it."""
        ...


class TerminalWatcher(Watcher, Protocol):
    """Shows them on the terminal."""

    def rest(self) -> None:
        """Training is over: no row comes any more, and others use the terminal."""
        ...


class Watch:
    """A function of the user's that sees the rows."""

    def __init__(self, told: Callable[[Mapping[str, Any]], None]) -> None:
        self.told = told

    def log(self, row: Mapping[str, Any]) -> None:
        """Tells it the row."""
        self.told(row)

    def finish(self) -> None:
        """Nothing ends it."""


class Trackers:
    """All who are told about a run; processes other than the first tell nobody.

    One that fails is left out from then on, and that is said. metrics.jsonl stays the truth even then: a checkpoint
    needs its length, and fails where it cannot be had.
    """

    def __init__(
        self,
        metrics: MetricsFile | None = None,
        display: TerminalWatcher | None = None,
        listeners: Sequence[Isolated] = (),
        watch: Callable[[Mapping[str, Any]], None] | None = None,
        answers: MetricsFile | None = None,
    ) -> None:
        self.metrics, self.answers_file, self.display = metrics, answers, display
        self.listeners = listeners
        # metrics.jsonl first: what a listener lacks is read from it
        own = Watch(watch) if watch else None
        self.watchers: list[Watcher] = [one for one in (metrics, *listeners, display, own) if one is not None]
        self.left_out: set[Any] = set()  # those that failed

    def log(self, row: Mapping[str, Any]) -> None:
        """Tells all of them the row."""
        self._each(self.watchers, lambda watcher: watcher.log(row))

    def table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Tells the listeners a table, unless it is empty; it has a file of its own in the run folder."""
        if not rows:
            return
        self._each(self.listeners, lambda listener: listener.table(name, rows))

    def answers(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Tells the answers of one validation, if there are any: a line each in a file of their own, and a table."""
        if rows and self.answers_file is not None:
            for row in rows:
                self._each([self.answers_file], lambda file, row=row: file.log(row))
            self.table("validation", rows)

    def rest(self) -> None:
        """Tells that training is over: the terminal is for others; listeners wait for the answers and the end."""
        self._each([self.display] if self.display else [], lambda display: display.rest())
        self._each(self.listeners, lambda listener: listener.rest())

    def tell_about(self, folder: RunFolder) -> None:
        """Tells the listeners the plan and what the audit found, as the run folder has them."""
        with contextlib.suppress(OSError):
            self.table("audit", read_metrics(folder.audit))
        self.table("plan", plan_table(read_object(folder.plan)))

    def finish(self) -> None:
        """Ends all of them, also those that were left out; the listeners together, so that patience is spent once."""
        self.left_out.clear()
        self._each(self.listeners, lambda listener: listener.request_finish())
        self._each(self.watchers, lambda watcher: watcher.finish())
        self._each([self.answers_file] if self.answers_file else [], lambda file: file.finish())

    def metrics_bytes(self) -> int:
        """Length of metrics.jsonl, made durable; 0 in a process that writes none. Raises OSError."""
        return self.metrics.durable_bytes() if self.metrics else 0

    def answers_bytes(self) -> int:
        """Length of validation_answers.jsonl, likewise."""
        return self.answers_file.durable_bytes() if self.answers_file else 0

    def _each(self, members: Sequence[T], tell: Callable[[T], None]) -> None:
        for member in members:
            if member in self.left_out:
                continue
            try:
                tell(member)
            except Exception as error:  # whatever it is, it must not reach training
                self.left_out.add(member)
                with contextlib.suppress(OSError):
                    print(f"{type(member).__name__} is left out from now on: {error}", file=sys.stderr, flush=True)

"""The terminal: a screen that stays, or lines where there is none; and a summary at the end."""

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from rich.console import Console
from rich.text import Text

from data_tools.terminal import printable
from train.config import Config
from train.data import TrainingData
from train.run.devices import device_name
from train.run.exits import ExitCode
from train.run.folder import RunFolder, read_object
from train.step import Training
from train.track.metrics_file import read_metrics
from train.track.painter import Painter
from train.track.plain_lines import epoch_line, plain_line
from train.track.progress import Progress, RunFacts, is_validated
from train.track.screen import Room, screen
from train.track.summary import short_summary, summary

PLAIN_LINE_SECONDS = 5.0  # between two lines, without a terminal
REFRESH_SECONDS = 0.25  # between two looks at what has come
PATIENCE_SECONDS = 5.0  # with a terminal that takes nothing, at the end
MAX_WAITING = 10_000  # rows; of more, which a hanging terminal has not taken, the oldest are not shown
# finished, or finished but for the questions
WELL_ENDED = (ExitCode.FINISHED, ExitCode.DELIVERY_FAILED)

Row = Mapping[str, Any]


class View(Protocol):
    """Where rows are shown."""

    def take(self, row: Row, now: float) -> None:
        """Shows the row, which the progress has taken."""
        ...

    def tick(self, now: float) -> None:
        """Shows that time has passed."""
        ...

    def close(self) -> None:
        """Shows nothing more."""
        ...


class Display:
    """Takes rows in no time; a thread of its own shows them, so a slow or dead terminal costs training nothing."""

    def __init__(
        self,
        facts: RunFacts,
        console: Console,
        first_step: int = 0,
        is_stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """`is_stopping`: whether a signal's handler has written to the terminal, past the screen."""
        self.facts, self.console, self.first_step = facts, console, first_step
        self.progress = Progress(facts, first_step)
        lives = console.is_interactive
        self.view: View = Screen(self.progress, console, is_stopping) if lives else Lines(self.progress, console)
        self.waiting: deque[tuple[float, Row]] = deque(maxlen=MAX_WAITING)
        self.closing = threading.Event()
        self.failure: BaseException | None = None
        self.thread = threading.Thread(target=self._work, name="display", daemon=True)
        self.thread.start()

    @classmethod
    def of(cls, training: Training, first_step: int, is_stopping: Callable[[], bool]) -> "Display":
        """For the run that goes on after `first_step`."""
        config, plan, accelerator = training.config, training.plan, training.accelerator
        facts = replace(
            run_facts(config, training.data, accelerator),
            total_steps=training.total_steps,
            planned_gib=plan.peak_bytes / 2**30,
            uses_graphs=plan.uses_graphs,
        )
        return cls(facts, Console(), first_step, is_stopping)

    def log(self, row: Row) -> None:
        """Hands the row to the thread. Raises what failed there."""
        if self.failure is not None:
            failure, self.failure = self.failure, None
            raise failure
        self.waiting.append((time.monotonic(), row))

    def rest(self) -> None:
        """Removes the screen: no row comes any more, and the terminal is for others."""
        self._close()

    def finish(self) -> None:
        """Removes the screen and prints the summary."""
        if self._close():
            try:
                self._sum_up()
            except (Exception, SystemExit) as error:
                if not self._is_gone(error):
                    raise

    def _close(self) -> bool:
        """Whether all that waits is shown and the thread has ended."""
        patience = 0.0 if self.closing.is_set() else PATIENCE_SECONDS  # once is enough
        self.closing.set()
        self.thread.join(patience)
        return not self.thread.is_alive()

    def _work(self) -> None:
        try:
            with suppress(OSError):
                earlier = read_metrics(self.facts.folder.metrics) if self.first_step else []
                self.progress.remember(row for row in earlier if row["step"] <= self.first_step)
            while not self.closing.wait(REFRESH_SECONDS):
                self._catch_up()
            self._catch_up()
            self.view.close()
        except BaseException as error:  # in a thread nobody else would hear of it
            self.failure = None if self._is_gone(error) else error
            with suppress(BaseException):
                self.view.close()

    def _is_gone(self, error: BaseException) -> bool:
        """Whether the error is that of a terminal that is gone; rich exits for a pipe without a reader."""
        return isinstance(error, OSError | SystemExit) or getattr(self.console.file, "closed", False)

    def _catch_up(self) -> None:
        while self.waiting:
            at, row = self.waiting.popleft()
            self.progress.take(row, at)
            self.view.take(row, at)
        self.view.tick(time.monotonic())

    def _sum_up(self) -> None:
        folder = self.facts.folder
        rows = read_metrics(folder.metrics)
        code = read_object(folder.exit).get("code")
        room = room_of(self.console)
        if rows and code in WELL_ENDED:
            lines = summary(self.facts, rows, room)
        elif rows and code == ExitCode.INTERRUPTED:
            lines = short_summary(self.facts, rows, room)
        else:
            return  # the end is an error, which is told next
        put(self.console, "\n".join(["", *lines]))


class Screen:
    """Lines that stay at the bottom of a terminal."""

    def __init__(self, progress: Progress, console: Console, is_stopping: Callable[[], bool]) -> None:
        self.progress, self.console = progress, console
        self.painter = Painter(console, is_stopping)
        self.shown: tuple[int, Any, int] = (-1, None, 0)  # the step, the size and the second that are shown

    def take(self, row: Row, now: float) -> None:
        """Prints a line above the screen at an epoch's end, and at a validation."""
        if is_milestone(self.progress, row):
            put(self.console, epoch_line(self.progress, row))

    def tick(self, now: float) -> None:
        """Draws the screen, if a row has come, the second or the terminal's size has changed."""
        progress = self.progress
        if self.painter.is_frozen():
            self.painter.stop()
            return
        state = (progress.step, self.console.size, int(now))
        if state == self.shown or not (progress.row or progress.validation) or not progress.last_at:
            return
        self.shown = state
        self.painter.show(screen(progress, now, room_of(self.console)))

    def close(self) -> None:
        """Removes the screen."""
        self.painter.stop()


class Lines:
    """A line every few seconds, and at each epoch's end and validation."""

    def __init__(self, progress: Progress, console: Console) -> None:
        self.progress, self.console = progress, console
        self.last_line = float("-inf")

    def take(self, row: Row, now: float) -> None:
        """Prints the row if it is time, and its warning."""
        if is_milestone(self.progress, row) or now - self.last_line > PLAIN_LINE_SECONDS:
            self.last_line = now
            put(self.console, plain_line(self.progress, row, now))
        if "warning" in row:
            put(self.console, f"step {row['step']}: {printable(str(row['warning']))}")

    def tick(self, now: float) -> None:
        """Nothing moves."""

    def close(self) -> None:
        """Nothing is to be removed."""


def put(console: Console, text: str) -> None:
    """Prints the text as it is, without characters that the encoding lacks."""
    written = text.encode(console.encoding, "backslashreplace").decode(console.encoding)
    console.print(Text(written), soft_wrap=True)


def is_milestone(progress: Progress, row: Row) -> bool:
    """Whether the row ends an epoch or the run, or has a validation."""
    facts, step = progress.facts, row["step"]
    return (step > 0 and step % facts.steps_per_epoch == 0) or step == facts.total_steps or is_validated(row)


def room_of(console: Console) -> Room:
    """The console's size, and whether it has block characters: by its encoding, and a C locale that was asked for."""
    width, height = console.size
    locale = os.environ.get("LC_ALL") or os.environ.get("LANG") or ""
    return Room(width, height, not console.encoding.startswith("utf") or locale in ("C", "POSIX"))


def run_facts(config: Config, data: TrainingData, accelerator: Accelerator) -> RunFacts:
    """What is known before the model is there: what is trained on what, and how, in names short enough for a title."""
    first, *others = [printable(Path(path).name or path) for path in config.data.path]
    lora = f"{'rsLoRA' if config.lora.rslora else 'LoRA'} r={config.lora.r}"
    held = {"nf4": "NF4", "int8": "int8", "none": "an unquantised base"}[config.model.quantization]
    is_whole = config.train.method == "full"
    count = f"{accelerator.num_processes} x " if accelerator.num_processes > 1 else ""
    return RunFacts(
        folder=RunFolder.of(config),
        base=printable(Path(config.model.name_or_path).name),
        data=first + (f" and {len(others)} more" if others else ""),
        method="full fine-tuning" if is_whole else f"{lora} on {held}",
        device=count + device_name(accelerator.device).partition(",")[0],
        total_steps=data.total_steps(config.train),
        steps_per_epoch=data.steps_per_epoch,
        max_steps=config.train.max_steps,
        is_whole=is_whole,
    )

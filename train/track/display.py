"""The terminal."""

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from data_tools.terminal import fitted

PLAIN_LINE_SECONDS = 5.0  # between two lines, without a terminal


class Display:
    """A live progress bar on a terminal; elsewhere a plain line every few seconds and at each epoch's end."""

    def __init__(self, console: Console, completed: int, total_steps: int, steps_per_epoch: int) -> None:
        self.console = console
        self.total_steps = total_steps
        self.steps_per_epoch = steps_per_epoch
        self.last_line = 0.0
        self.started = time.monotonic()
        self.first_step = completed
        self.progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=24),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        if console.is_terminal:
            self.progress.start()
        self.task = self.progress.add_task("train", total=total_steps, completed=completed, numbers="")

    def log(self, row: Mapping[str, Any]) -> None:
        """Shows the row."""
        step = row["step"]
        numbers = _numbers(row)
        self.progress.update(self.task, completed=step, numbers=numbers)
        at_epoch_end = step % self.steps_per_epoch == 0 or step == self.total_steps
        due = time.monotonic() - self.last_line > PLAIN_LINE_SECONDS
        if at_epoch_end or (due and not self.console.is_terminal):
            self.last_line = time.monotonic()
            per_step = (self.last_line - self.started) / (step - self.first_step)
            left = f"  {per_step * (self.total_steps - step):.0f} s left" if step < self.total_steps else ""
            self.console.print(f"step {step}/{self.total_steps}  {numbers}{left}", highlight=False, soft_wrap=True)
        if "warning" in row:
            self.console.print(fitted(f"step {step}: {row['warning']}"), highlight=False, soft_wrap=True)
        if step == self.total_steps:
            self.progress.stop()

    def finish(self) -> None:
        """Removes the bar."""
        self.progress.stop()


def _numbers(row: Mapping[str, Any]) -> str:
    loss = f"loss {row['train/loss']:.4f}" if "train/loss" in row else "left out"
    parts = [f"epoch {row['epoch']:.2f}", loss]
    if "eval/loss" in row:
        parts.append(f"validation {row['eval/loss']:.4f}")
    parts += [f"lr {row['train/learning_rate']:.2e}", f"{row['perf/tokens_per_second']:,.0f} tokens/s"]
    if "perf/mfu" in row:
        parts.append(f"MFU {row['perf/mfu']:.1%}")
    if "memory/peak_allocated_gib" in row:
        parts.append(f"{row['memory/peak_allocated_gib']:.2f} GiB")
    return "  ".join(parts)

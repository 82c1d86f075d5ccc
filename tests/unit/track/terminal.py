"""A terminal in memory that obeys the few codes which the display writes, and rows of a made-up run."""

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console

from train.run.folder import RunFolder
from train.track.progress import RunFacts

CODES = re.compile(r"\x1b\[(\??[\d;]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)")
TOTAL_STEPS, STEPS_PER_EPOCH = 60, 20


class Terminal(io.StringIO):
    """What a person would see: `rows`, from the first line that was ever written. Its height is not limited."""

    encoding = "utf-8"  # pyrefly: ignore

    def __init__(self, width: int = 80) -> None:
        super().__init__()
        self.width, self.row, self.column = width, 0, 0
        self.cells: list[list[str]] = [[]]
        self.written: list[str] = []
        self.has_cursor = True

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.written.append(text)
        end = 0
        for match in CODES.finditer(text):
            assert match.start() == end, f"not understood: {text[end : match.start()]!r}"
            end = match.end()
            argument, code, motion, characters = match.groups()
            if code:
                self._obey(code, argument)
            elif motion:
                self.column = 0
                self.row += motion == "\n"
            else:
                self._type(characters)
            self.cells += [[] for _ in range(self.row + 1 - len(self.cells))]
        assert end == len(text)
        return len(text)

    def _obey(self, code: str, argument: str) -> None:
        if code == "A":
            self.row = max(0, self.row - int(argument))
        elif code == "G":
            self.column = int(argument) - 1
        elif code == "K":
            assert argument in ("", "0")
            del self.cells[self.row][self.column :]
        elif code in "hl":
            assert argument == "?25"
            self.has_cursor = code == "h"
        else:
            assert code == "m", code

    def _type(self, characters: str) -> None:
        for character in characters:
            if self.column == self.width:
                self.row, self.column = self.row + 1, 0
                self.cells += [[] for _ in range(self.row + 1 - len(self.cells))]
            line = self.cells[self.row]
            line += [" "] * (self.column + 1 - len(line))
            line[self.column] = character
            self.column += 1

    def narrow(self, width: int) -> None:
        """Wraps what stands there at a smaller width, as terminals do; the cursor stays at the end."""
        assert self.row == len(self.cells) - 1
        text = ["".join(line) for line in self.cells]
        self.cells, self.width = [], width
        for line in text:
            self.cells += [list(line[start : start + width]) for start in range(0, max(len(line), 1), width)]
        self.row, self.column = len(self.cells) - 1, len(self.cells[-1])

    def rows(self) -> list[str]:
        """The lines, without spaces at their ends, and without empty ones at the end."""
        lines = ["".join(line).rstrip() for line in self.cells]
        while lines and not lines[-1]:
            lines.pop()
        return lines


def console_on(file: Any, width: int = 80, height: int = 24, color: Any = "truecolor") -> Console:
    """A console that takes the file for a terminal."""
    return Console(file=file, force_terminal=True, width=width, height=height, color_system=color)


def facts_in(folder: Path, **others: Any) -> RunFacts:
    """What is known of the made-up run."""
    facts: dict[str, Any] = {
        "folder": RunFolder(folder),
        "base": "SmolLM2-135M",
        "data": "glossary.jsonl",
        "method": "LoRA r=16 on NF4",
        "device": "NVIDIA H100",
        "total_steps": TOTAL_STEPS,
        "steps_per_epoch": STEPS_PER_EPOCH,
        "planned_gib": 1.4,
        "uses_graphs": True,
    }
    return RunFacts(**(facts | others))


def rows_of_a_run(last: int = TOTAL_STEPS) -> Iterator[dict[str, Any]]:
    """Rows with all that a row may have: validation before the first step and every epoch, saves, a skipped step."""
    best = (0, 3.5)
    yield {"step": 0, "epoch": 0.0, "eval/loss": 3.5, "eval/perplexity": 33.12, "eval/general_loss": 3.21}
    for step in range(1, last + 1):
        row: dict[str, Any] = {
            "step": step,
            "epoch": round(step / STEPS_PER_EPOCH, 4),
            "train/loss": 4.0 / step + 0.125 * (step % 3),
            "train/grad_norm": 0.5 + step / 1000,
            "train/learning_rate": 1e-3 * (1 - step / 100),
            "perf/step_seconds": 0.5,
            "perf/tokens_per_second": 1000.0 + step,
            "perf/mfu": 0.024,
            "data/tokens": 500 + step,
            "data/supervised_tokens": 200,
            "data/sample_ids": [1, 2, 3],
            "memory/peak_allocated_gib": 1.1,
            "memory/peak_reserved_gib": 1.25,
        }
        if step == 30:
            del row["train/loss"], row["train/grad_norm"]
            row |= {"train/skipped": 1, "warning": "loss nan, nothing was updated; its samples: [/red]\x1b[2J.jsonl:3"}
        if step % STEPS_PER_EPOCH == 0:
            loss = {20: 2.25, 40: 1.75, 60: 1.875}[step]
            best = min(best, (step, loss), key=lambda pair: pair[1])
            row |= {"eval/loss": loss, "eval/perplexity": 9.5, "eval/general_loss": 3.25}
            row |= {"eval/best_step": best[0], "eval/best_loss": best[1]}
        if step % STEPS_PER_EPOCH == 1 and step > 1:
            row |= {"perf/save_seconds": 0.25, "perf/failed_saves": 0, "checkpoint/step": step - 1}
        yield row

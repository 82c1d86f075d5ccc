"""TensorBoard: event files in the run folder."""

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train.bundled import how_to_install
from train.config import Config
from train.run.exits import ExitCode, ExitWith
from train.run.folder import RunFolder
from train.track.isolated import Listener, Row
from train.track.shared import flat_config, table_key

FLUSH_SECONDS = 15  # what a killed run loses until it is resumed
MAX_WAITING = 1000  # events on the way to the file
ESCAPED = {ord(sign): f"&#{ord(sign)};" for sign in "&\\`*_{}[]<>#|"}  # what is markup in Markdown and HTML
COMPARED = ("train/loss", "eval/loss")  # metrics that the page of hyperparameters shows beside them


class TensorBoard(Listener):
    """Writes the whole run anew whenever it starts, out of metrics.jsonl, and removes earlier attempts' files.

    So each step is there once for every reader; `purge_step` alone would leave it to the reader. A TensorBoard that is
    open meanwhile is told by it to forget what it has read.
    """

    name = "TensorBoard"

    def __init__(self, config: Config) -> None:
        self.config = config
        self.folder = RunFolder.of(config).tensorboard
        self.earlier: list[Path] = []
        self.writer: Any = None
        self.step = 0  # of the last row

    @classmethod
    def wanted(cls, config: Config) -> "TensorBoard | None":
        """The listener, if it is asked for; raises ExitWith(BAD_INPUT) where the package is not installed."""
        if not config.track.tensorboard:
            return None
        if importlib.util.find_spec("tensorboard") is None:
            reason = "--track.tensorboard true: the package tensorboard is not installed: "
            raise ExitWith(ExitCode.BAD_INPUT, reason + how_to_install("tensorboard"))
        return cls(config)

    def start(self, run_uid: str) -> int:
        """Begins a new file; it has no steps."""
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self.earlier = list(self.folder.glob("events.out.tfevents.*"))
        self.writer = SummaryWriter(str(self.folder), purge_step=0, max_queue=MAX_WAITING, flush_secs=FLUSH_SECONDS)
        file_writer: Any = self.writer.file_writer
        for summary in hparams(flat_config(self.config), dict.fromkeys(COMPARED, 0)):
            file_writer.add_summary(summary)
        return -1

    def catch_up(self, rows: Sequence[Row], answers: Mapping[int, Sequence[Row]]) -> None:
        """Writes them; then earlier files hold nothing that this one lacks."""
        super().catch_up(rows, answers)
        self.writer.flush()
        for path in self.earlier:
            path.unlink()

    def log(self, row: Row) -> None:
        """Writes each number under its name."""
        self.step = row["step"]
        for name, value in row.items():
            if name != "step":
                self.writer.add_scalar(name, value, self.step)

    def table(self, name: str, rows: Sequence[Row]) -> None:
        """Writes the rows as a Markdown table."""
        step = max(self.step, rows[0].get("step", 0))
        self.writer.add_text(table_key(name), markdown(rows), step)

    def finish(self) -> str:
        """Closes the file; says how to look at it."""
        self.writer.close()
        return f"{self.name}: tensorboard --logdir {self.folder}"


def markdown(rows: Sequence[Row]) -> str:
    """A table of the rows; what would break it, or be taken for markup, is escaped."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([_cell(row[column]) for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: object) -> str:
    return str(value).translate(ESCAPED).replace("\n", "<br>")

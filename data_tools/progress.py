"""How far a long preparation is: a moving line on a terminal, now and then a line of text elsewhere."""

import sys
import time
from types import TracebackType

from rich.console import Console
from rich.status import Status

SILENT_SECONDS = 2.0  # what is done by then says nothing
LINE_SECONDS = 15.0  # between two lines where there is no terminal


class Progress:
    """A line on stderr with the number of rows so far and their rate; stdout stays the command's own."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.console = Console(file=sys.stderr)
        self.start = self.last = time.monotonic()
        self.status: Status | None = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.status is not None:
            self.status.stop()

    def show(self, num_rows: int) -> None:
        """Says how many rows are done, if it is time to say so."""
        now = time.monotonic()
        elapsed = now - self.start
        if elapsed < SILENT_SECONDS:
            return
        text = f"{self.what}: {num_rows:,} rows, {num_rows / elapsed:,.0f} a second"
        if self.console.is_terminal:
            if self.status is None:
                self.status = self.console.status(text)
                self.status.start()
            self.status.update(text)
        elif now - self.last >= LINE_SECONDS:
            self.last = now
            self.console.print(text, highlight=False)

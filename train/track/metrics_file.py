"""metrics.jsonl, the truth about a run: one JSON object a step."""

import contextlib
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from train.run.json_lines import read_lines


class MetricsFile:
    """metrics.jsonl: one JSON object a step. Rows that a full disk refuses are kept and written later."""

    def __init__(self, path: Path, keep_bytes: int) -> None:
        """Continues after `keep_bytes`, the file's length at the checkpoint; later rows, of a lost attempt, go.

        Of a file that is shorter, an unfinished last row goes as well.
        """
        self.path = path
        self.path.touch()
        size = self.path.stat().st_size
        if size < keep_bytes:
            print(f"{self.path} is shorter than at the checkpoint: rows of earlier steps are lost", flush=True)
            keep_bytes = self.path.read_bytes().rfind(b"\n") + 1
        os.truncate(self.path, keep_bytes)
        self.descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)
        self.unwritten = b""
        self.is_refused = False

    def log(self, row: Mapping[str, Any]) -> None:
        """Appends the row."""
        self.unwritten += json.dumps(row).encode() + b"\n"
        try:
            self._write()
            self.is_refused = False
        except OSError as error:
            if not self.is_refused:
                with contextlib.suppress(OSError):  # the terminal may be a file on the same disk
                    print(f"{self.path}: {error}; rows are kept until it can be written", file=sys.stderr, flush=True)
            self.is_refused = True

    def _write(self) -> None:
        while self.unwritten:
            self.unwritten = self.unwritten[os.write(self.descriptor, self.unwritten) :]

    def durable_bytes(self) -> int:
        """The file's length, after making sure that all rows are on disk; raises OSError if that fails."""
        self._write()
        os.fsync(self.descriptor)
        return self.path.stat().st_size

    def finish(self) -> None:
        """Closes the file; raises OSError if rows are lost with it."""
        try:
            self._write()
        finally:
            os.close(self.descriptor)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that a killed process left unfinished is left out. Raises OSError."""
    return read_lines(path)

"""Files of one JSON object a line, in which a killed writer may leave half a line."""

import json
import os
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from train.run.durable import sync


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Adds the object durably, on a line of its own whatever stands before it; raises OSError."""
    line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        while line:
            line = line[os.write(descriptor, line) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    if not size:
        sync(path.parent)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file; lines that hold no whole one are left out. Raises OSError."""
    rows = []
    for line in path.read_bytes().split(b"\n"):
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict):
                rows.append(row)
    return rows


def last_step(path: Path) -> int:
    """The last `step` in a file of rows such as metrics.jsonl, read from its end; 0 where there is none."""
    with suppress(OSError), path.open("rb") as file:
        for line in reversed(deque(file, maxlen=2)):  # the last of all may be half a line
            with suppress(ValueError, TypeError, KeyError, OverflowError, RecursionError):
                return int(json.loads(line)["step"])
    return 0

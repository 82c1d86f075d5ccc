"""stdout and stderr that cannot end a run. Imports nothing heavy: main guards them before imports that take seconds.

A reader may be gone (`| head`, or Ctrl-C, which ends `| tee` first), the disk behind a redirect full, a terminal closed
or without UTF-8. What cannot be written is lost; training goes on.
"""

import errno
import io
import os
import select
import sys
from typing import Any, TextIO

GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO)  # nobody will ever read there again; EIO: a closed terminal
SECONDS_FOR_A_READER = 5.0  # of a pipe that does not block and is full


class Unfailing(io.FileIO):
    """A descriptor to which writing never fails."""

    def write(self, data: Any, /) -> int:
        """Writes what can be written and drops the rest; a descriptor without a reader leads to /dev/null from then on.

        So it is quiet for C code and for other processes that share it as well.
        """
        try:
            written = super().write(data)
            if written is None:  # it does not block, and nobody has read for a while
                select.select([], [self.fileno()], [], SECONDS_FOR_A_READER)
                written = super().write(data)
            return memoryview(data).nbytes if written is None else written
        except OSError as error:
            if error.errno in GONE:
                lead_to_null(self.fileno())
            return memoryview(data).nbytes


def guard_streams() -> None:
    """Replaces sys.stdout and sys.stderr by streams that never raise: neither for a reader nor for a character."""
    sys.stdout, sys.stderr = _guarded(sys.stdout, 1), _guarded(sys.stderr, 2)


def guard_messages() -> None:
    """The same for a command whose output is its result: stdout still says that it cannot be written."""
    sys.stderr = _guarded(sys.stderr, 2)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    elif sys.stdout is None:
        sys.stdout = _guarded(sys.stdout, 1)


def lead_to_null(descriptor: int) -> None:
    """Whatever is written to the descriptor is dropped."""
    null = os.open(os.devnull, os.O_WRONLY)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)


def _guarded(stream: TextIO | None, descriptor: int) -> TextIO:
    if stream is None:  # started with a closed descriptor, which the next file to be opened would get
        lead_to_null(descriptor)
    else:
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(Unfailing(descriptor, "wb", closefd=False)),
        encoding=stream.encoding if stream else "utf-8",
        errors="backslashreplace",
        line_buffering=descriptor == 2 or bool(stream and stream.isatty()),
    )

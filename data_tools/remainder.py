"""What of a file was not read, how much of it and why."""

from pathlib import Path
from typing import Any, TextIO

import pyarrow

from data_tools.compressed import DAMAGE, open_bytes
from data_tools.utf8 import not_utf8

MAX_PIECE = 2**20  # characters
# of a table: damage, text that is not UTF-8, dates that Python cannot hold
UNREADABLE = (OSError, ValueError, OverflowError, pyarrow.ArrowException)


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def rows_of(table: pyarrow.RecordBatch | pyarrow.Table) -> list[dict[str, Any]]:
    """The rows, maps as objects; raises ValueError where one has a key twice."""
    try:
        return table.to_pylist(maps_as_pydicts="strict")
    except KeyError as error:
        raise ValueError(f"a map cannot be read as an object: {first_line(error)}") from None


def unread_rows(error: BaseException, num_read: int, count: int) -> str:
    """Why a table of `count` rows was read no further than so many."""
    return f"unreadable value near here: {first_line(error)}; {count - num_read:,} of {count:,} rows were not read"


def unread_lines(file: TextIO, first: int) -> str:
    """How many of a text file's lines were not read, where `first` is the first of them: the end of a sentence."""
    count, piece = 0, "\n"
    try:
        while line := file.readline(MAX_PIECE):
            count += piece.endswith(("\n", "\r")) and piece[-1] + line != "\r\n"  # which a piece's end may part
            piece = line
    except (*DAMAGE, OSError):
        return f"the file was not read from line {first:,} on"
    return f"{count - first + 1:,} of the file's {count:,} lines were not read, from line {first:,} on"


def bad_byte(path: Path) -> tuple[int, int]:
    """(line, byte of that line) of what is not UTF-8 in a file that may be compressed."""
    with open_bytes(path) as file:
        return not_utf8(file)

"""What of a file was not read, how much of it and why."""

import codecs
from pathlib import Path
from typing import TextIO

import pyarrow

from data_tools.compressed import CHUNK_BYTES, DAMAGE, open_bytes

MAX_PIECE = 2**20  # characters
# of a table: damage, text that is not UTF-8, dates that Python cannot hold
UNREADABLE = (OSError, ValueError, OverflowError, pyarrow.ArrowException)


def first_line(error: BaseException) -> str:
    """The first line of what an error says, or its name."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def unread_rows(error: BaseException, num_read: int, count: int) -> str:
    """Why a table of `count` rows was read no further than so many."""
    return f"unreadable value near here: {first_line(error)}; {count - num_read:,} of {count:,} rows were not read"


def unread_lines(file: TextIO, first: int) -> str:
    """How many of a text file's lines were not read, where `first` is the first of them: the end of a sentence."""
    count, piece = 0, "\n"
    try:
        while line := file.readline(MAX_PIECE):
            count += piece.endswith(("\n", "\r"))
            piece = line
    except (*DAMAGE, OSError):
        return f"the file was not read from line {first:,} on"
    return f"{count - first + 1:,} of the file's {count:,} lines were not read, from line {first:,} on"


def not_utf8(path: Path) -> tuple[int, int]:
    """(line, byte of that line) of the first byte that is not UTF-8, both from 1; of a file that holds one."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line, byte = 1, 1
    with open_bytes(path) as file:
        while True:
            chunk = file.read(CHUNK_BYTES)
            held, _ = decoder.getstate()  # the beginning of a character
            good = held + chunk
            try:
                decoder.decode(chunk, final=not chunk)
                good = good[: len(good) - len(decoder.getstate()[0])]
            except UnicodeDecodeError as error:
                before = good[: error.start]
                newline = before.rfind(b"\n")
                start = byte + len(before) if newline < 0 else len(before) - newline
                return line + before.count(b"\n"), start
            assert chunk, f"{path} is UTF-8"
            newline = good.rfind(b"\n")
            line += good.count(b"\n")
            byte = byte + len(good) if newline < 0 else len(good) - newline

"""What of a file was not read, how much of it and why."""

import codecs
import re
from pathlib import Path
from typing import TextIO

import pyarrow

from data_tools.compressed import DAMAGE, open_bytes

MAX_PIECE = 2**20  # characters
# as TextIOWrapper reads, so that damage behind a byte that it refused is not met before that byte
STEP_BYTES = 8192
_LINE_END = re.compile(rb"\r\n?|\n")
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
            count += piece.endswith(("\n", "\r")) and piece[-1] + line != "\r\n"  # which a piece's end may part
            piece = line
    except (*DAMAGE, OSError):
        return f"the file was not read from line {first:,} on"
    return f"{count - first + 1:,} of the file's {count:,} lines were not read, from line {first:,} on"


def not_utf8(path: Path) -> tuple[int, int]:
    """(line, byte of that line) of the first byte that is not UTF-8, both from 1; of a file that holds one."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line, byte, held = 1, 1, b""
    with open_bytes(path) as file:
        while True:
            chunk, is_found = file.read1(STEP_BYTES), False
            good = decoder.getstate()[0] + chunk
            try:
                decoder.decode(chunk, final=not chunk)
                good = good[: len(good) - len(decoder.getstate()[0])]  # without the beginning of a character
            except UnicodeDecodeError as error:
                good, is_found = good[: error.start], True
            good = held + good
            held = b"\r" if good.endswith(b"\r") and not is_found else b""  # a newline may follow
            good = good[: len(good) - len(held)]
            ends = [match.end() for match in _LINE_END.finditer(good)]
            line += len(ends)
            byte = len(good) - ends[-1] + 1 if ends else byte + len(good)
            if is_found:
                return line, byte
            assert chunk, f"{path} is UTF-8"

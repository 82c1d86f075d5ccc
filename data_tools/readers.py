"""Files and data sets -> rows, one at a time, each with its place."""

import csv
import hashlib
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import pyarrow
import pyarrow.parquet

from data_tools.compressed import CHUNK_BYTES, COMPRESSIONS, DAMAGE, kind_of, open_bytes
from data_tools.delimiters import delimiter_of, misread
from data_tools.remainder import UNREADABLE, bad_byte, first_line, rows_of, unread_lines, unread_rows
from data_tools.report import Unread
from data_tools.strict_json import json_reason, parse_json, strict_decoder

MAX_ROW_BYTES = 8 * 2**20
BATCH_ROWS = 256
LONGEST_WORD = len("-Infinity")  # of what json takes for a value, strings and numbers aside
LONG_LINE = f"the line is longer than {MAX_ROW_BYTES} characters"

Place = str  # file:line, file:entry, or file:row
Row = dict[str, Any]
ReportProblem = Callable[[Place, str], None]

_SPACE = re.compile(r"[ \t\n\r]*")


def _open_text(path: Path, newline: str | None = None, errors: str = "strict") -> TextIO:
    return io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", errors=errors, newline=newline)


def file_digest(path: Path) -> str:
    """sha256 of the file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class RowFile:
    """A file of rows, read by its extension."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def rows(self, report: ReportProblem) -> Iterator[tuple[Place, Row]]:
        """The readable rows in order; problems go to `report`, and reading continues where it can."""
        if self.path.stat().st_size == 0:
            report(str(self.path), "the file is empty")
            return
        num_seen = 0

        def report_and_count(place: Place, reason: str) -> None:
            nonlocal num_seen
            num_seen += 1
            report(place, reason)

        try:
            for place, row in READERS[kind_of(self.path)](self.path, report_and_count):
                if isinstance(row, dict):
                    num_seen += 1
                    yield place, row
                else:
                    report_and_count(place, f"expected a JSON object, not {type(row).__name__}")
        except (*DAMAGE, OSError) as error:
            if self.path.suffix.lower() not in COMPRESSIONS:
                raise
            reason = f"cannot be decompressed after {num_seen:,} rows: {first_line(error)}; the rest was not read"
            report_and_count(str(self.path), Unread(f"{reason}; make or fetch the file anew"))
        if num_seen == 0:
            report(str(self.path), "the file has no rows")

    def digest(self) -> str:
        """sha256 of the file's bytes."""
        return file_digest(self.path)


def _jsonl(path: Path, report: ReportProblem) -> Iterator[tuple[Place, Any]]:
    with open_bytes(path) as file:
        number = 0
        while line := file.readline(MAX_ROW_BYTES + 1):
            number += 1
            place = f"{path}:{number}"
            if len(line) > MAX_ROW_BYTES:
                report(place, f"the line is longer than {MAX_ROW_BYTES} bytes")
                while line and not line.endswith(b"\n"):
                    line = file.readline(MAX_ROW_BYTES)
            elif line.strip():
                try:
                    # only the first line may begin with a byte order mark
                    yield place, parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except UnicodeDecodeError as error:
                    byte = len(line) - len(error.object) + error.start + 1  # the object is without the mark
                    report(place, f"not UTF-8 (byte {byte} of the line); convert the file")
                except ValueError as error:
                    report(place, f"{error}; expected one JSON object per line")


def _json(path: Path, report: ReportProblem) -> Iterator[tuple[Place, Any]]:
    """The entries of a JSON array, which is never held as a whole."""
    decoder, number, num_read = strict_decoder(), 0, 0
    with _open_text(path) as file:
        window = _Window(file)
        try:
            if window.next_character() != "[":
                reason = "expected a JSON array of objects; name a file of one object per line .jsonl"
                report(str(path), Unread(reason))
                return
            window.position += 1
            while window.next_character() != "]":
                number += 1
                entry, window.position = decoder.raw_decode(window.text, window.position)
                yield f"{path}:{number}", entry
                num_read = number
                separator = window.next_character()
                if separator not in (",", "]"):
                    reason = "expected ',' or ']' after this entry"
                    raise json.JSONDecodeError(reason, window.text, window.position)
                window.position += separator == ","
            window.position += 1
            if window.next_character():
                reason = "something follows the array's end, as where two files were joined: write one array"
                report(str(path), Unread(f"{reason}; {window.unread(num_read)}"))
        except UnicodeDecodeError:
            line, byte = bad_byte(path)
            reason = f"not UTF-8 (byte {byte} of line {line}); convert the file, which was not read from here on"
            report(f"{path}:{number + 1}", Unread(reason))
        except (ValueError, RecursionError) as error:
            report(f"{path}:{number}", Unread(f"{window.reason(error)}; {window.unread(num_read)}"))


class _Window:
    """A text read piece by piece: from `position` on it holds a whole row, or the file's end."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.text, self.position = file, "", 0
        self.length, self.lines, self.column = 0, 0, 0  # of what was before the text, and of its last line

    def next_character(self) -> str:
        """Moves behind white space and returns what stands there; empty at the end."""
        while True:
            is_short, is_end = len(self.text) - self.position < MAX_ROW_BYTES, False
            if is_short and (more := self.file.read(MAX_ROW_BYTES)):
                self._drop()
                self.text += more
            elif is_short:
                is_end = True
            match = _SPACE.match(self.text, self.position)
            assert match is not None
            self.position = match.end()
            if self.position < len(self.text) or is_end:
                return self.text[self.position : self.position + 1]

    def _drop(self) -> None:
        newline = self.text.rfind("\n", 0, self.position)
        self.column = self.column + self.position if newline < 0 else self.position - newline - 1
        self.lines += self.text.count("\n", 0, self.position)
        self.length += self.position
        self.text, self.position = self.text[self.position :], 0

    def reason(self, error: Exception) -> str:
        """What is wrong here, with line and column in the file; of an entry longer than what is held, only that."""
        is_long = isinstance(error, json.JSONDecodeError) and len(self.text) - self.position >= MAX_ROW_BYTES
        # where a text ends too early, json names its end, or where its last string or word begins
        if is_long and (error.msg.startswith("Unterminated string") or error.pos > len(self.text) - LONGEST_WORD):
            return f"the entry is longer than {MAX_ROW_BYTES} characters, or not JSON"
        return json_reason(error, self.lines, self.column)

    def unread(self, num_entries: int) -> str:
        """How many entries are behind the position, if they are as long as those before it: the end of a sentence."""
        done, rest = self.length + self.position, len(self.text) - self.position
        if not num_entries:
            return "none of the file's entries was read"
        try:
            while piece := self.file.read(MAX_ROW_BYTES):
                rest += len(piece)
        except (*DAMAGE, OSError, UnicodeDecodeError):
            return "the rest of the file was not read"
        if not rest:
            return "the file ends there"
        count = max(round(rest * num_entries / done), 1)
        return f"about {count:,} more {'entries were' if count > 1 else 'entry was'} not read"


def _csv(path: Path, report: ReportProblem) -> Iterator[tuple[Place, Any]]:
    csv.field_size_limit(MAX_ROW_BYTES)
    delimiter = column_delimiter(path)

    def stop(line: int, reason: str, first: int = 1) -> None:
        with _open_text(path, newline="", errors="replace") as file:
            report(f"{path}:{line}", Unread(f"{reason}; {unread_lines(file, first)}"))

    with _open_text(path, newline="") as file:
        reader, last = csv.DictReader(_lines(file), delimiter=delimiter, strict=True), 0
        try:
            names = list(reader.fieldnames or ())
            if reason := misread(names):
                return stop(1, reason)
            repeated = next((name for name in names if names.count(name) > 1), None)
            if repeated is not None:
                return stop(1, f"the column {repeated!r} appears twice; rename or remove one")
            last = reader.line_num
            for row in reader:
                place, last = f"{path}:{reader.line_num}", reader.line_num
                if None in row or None in row.values():
                    report(place, f"expected {len(names)} columns, as in the first line")
                else:
                    yield place, row
        except UnicodeDecodeError:
            line, byte = bad_byte(path)
            stop(line, f"not UTF-8 (byte {byte} of the line); convert the file", last + 1)
        except csv.Error as error:
            # where a quote is not closed, the reader has gone to the end
            way_out = "split it" if str(error) == LONG_LINE else "close every quote, and double those inside a text"
            stop(last + 1, f"not CSV: {error}; {way_out}", last + 1)


def column_delimiter(path: Path) -> str:
    """What separates the columns of a CSV file, by its first lines; the comma where they cannot be read."""
    try:
        with _open_text(path, newline="") as file:
            beginning = file.read(CHUNK_BYTES)
    except (*DAMAGE, OSError, UnicodeDecodeError):  # which is said when the rows are read
        return ","
    is_whole = len(beginning) < CHUNK_BYTES
    return delimiter_of(beginning if is_whole else beginning.rpartition("\n")[0])


def _lines(file: TextIO) -> Iterator[str]:
    while line := file.readline(MAX_ROW_BYTES + 1):
        if len(line) > MAX_ROW_BYTES:
            raise csv.Error(LONG_LINE)
        yield line


def _parquet(path: Path, report: ReportProblem) -> Iterator[tuple[Place, Any]]:
    number, file = 0, None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            report(str(path), Unread(f"the column {repeated!r} appears twice; rename or remove one"))
            return
        for batch in file.iter_batches(BATCH_ROWS):
            for row in rows_of(batch):
                number += 1
                yield f"{path}:{number}", row
    except UNREADABLE as error:
        if file is None:
            report(str(path), Unread(f"not Parquet: {first_line(error)}"))
            return
        report(f"{path}:{number + 1}", Unread(unread_rows(error, number, file.metadata.num_rows)))


READERS: dict[str, Callable[[Path, ReportProblem], Iterator[tuple[Place, Any]]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}


def is_rows_in_disguise(text: str) -> bool:
    """Whether a text is rows: a JSON object in its first line, or an object, or an array of them, in all of it."""
    begin = text.strip()
    if not begin.startswith(("{", "[")):
        return False
    for part in (begin.partition("\n")[0], begin):
        try:
            value = json.loads(part)
        except (ValueError, RecursionError):
            continue
        entries = value if isinstance(value, list) else [value]
        if entries and all(isinstance(entry, dict) for entry in entries):
            return True
    return False

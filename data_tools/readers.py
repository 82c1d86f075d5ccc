"""Files and data sets -> rows, one at a time, each with its place."""

import bz2
import csv
import gzip
import hashlib
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import pyarrow
import pyarrow.parquet

from data_tools.delimiters import delimiter_of, misread
from data_tools.report import Unread
from data_tools.strict_json import json_reason, parse_json, strict_decoder

MAX_ROW_BYTES = 8 * 2**20
CHUNK_BYTES = 2**16
BATCH_ROWS = 256

# What the decompressors raise for a damaged or cut file.
DAMAGE = (gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowException)
COMPRESSIONS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": lambda path: io.BufferedReader(_Streams(path, bz2.BZ2Decompressor)),
    ".xz": lambda path: io.BufferedReader(_Streams(path, lzma.LZMADecompressor)),
    ".zst": lambda path: io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd")),
    ".lz4": lambda path: io.BufferedReader(pyarrow.input_stream(str(path), compression="lz4")),
}


class _Streams(io.RawIOBase):
    """One or more compressed streams behind one another; Python's own files end in silence at one that is damaged."""

    def __init__(self, path: Path, make: Callable[[], Any]) -> None:
        self.file, self.make, self.decompressor = path.open("rb"), make, make()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Up to len(buffer) bytes; raises OSError or LZMAError for what is no stream, EOFError for one that is cut."""
        while True:
            packed = b""
            if self.decompressor.eof:
                packed = self.decompressor.unused_data.lstrip(b"\0") or self.file.read(CHUNK_BYTES).lstrip(b"\0")
                if not packed:
                    return 0
                self.decompressor = self.make()
            elif self.decompressor.needs_input and not (packed := self.file.read(CHUNK_BYTES)):
                raise EOFError("the compressed stream is cut")
            if found := self.decompressor.decompress(packed, len(buffer)):
                buffer[: len(found)] = found
                return len(found)

    def close(self) -> None:
        self.file.close()
        super().close()


Place = str  # file:line, file:entry, or file:row
Row = dict[str, Any]
ReportProblem = Callable[[Place, str], None]

_SPACE = re.compile(r"[ \t\n\r]*")


def kind_of(path: Path) -> str:
    """The extension that says how a file is read, in lower case: `.jsonl` also of rows.jsonl.gz."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    is_compressed = len(suffixes) == 2 and suffixes[1] in COMPRESSIONS and suffixes[0] != ".parquet"
    return suffixes[0] if is_compressed else path.suffix.lower()


def open_bytes(path: Path) -> BinaryIO:
    """The file's content, decompressed as its name says."""
    opener = COMPRESSIONS.get(path.suffix.lower())
    return opener(path) if opener else path.open("rb")


def _open_text(path: Path, newline: str | None = None) -> TextIO:
    return io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig", newline=newline)


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
            report_and_count(str(self.path), Unread(reason))
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
                    report(place, f"not UTF-8 (byte {error.start} of the line); convert the file")
                except ValueError as error:
                    report(place, f"{error}; expected one JSON object per line")


def _json(path: Path, report: ReportProblem) -> Iterator[tuple[Place, Any]]:
    """The entries of a JSON array, which is never held as a whole."""
    decoder, number = strict_decoder(), 0
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
                separator = window.next_character()
                if separator not in (",", "]"):
                    raise ValueError("not JSON: expected ',' or ']' after this entry")
                window.position += separator == ","
            window.position += 1
            if window.next_character():
                reason = "something follows the array's end, as where two files were joined; it was not read"
                report(str(path), Unread(reason))
        except UnicodeDecodeError as error:
            report(f"{path}:{number or 1}", Unread(f"not UTF-8 (byte {error.start}); convert the file"))
        except (ValueError, RecursionError) as error:
            is_cut = isinstance(error, json.JSONDecodeError) and len(window.text) - window.position >= MAX_ROW_BYTES
            reason = f"the entry is longer than {MAX_ROW_BYTES} bytes, or not JSON" if is_cut else json_reason(error)
            report(f"{path}:{number}", Unread(f"{reason}; the rest of the file was not read"))


class _Window:
    """A text read piece by piece: from `position` on it holds a whole row, or the file's end."""

    def __init__(self, file: TextIO) -> None:
        self.file, self.text, self.position = file, "", 0

    def next_character(self) -> str:
        """Moves behind white space and returns what stands there; empty at the end."""
        while True:
            if len(self.text) - self.position < MAX_ROW_BYTES and (more := self.file.read(MAX_ROW_BYTES)):
                self.text, self.position = self.text[self.position :] + more, 0
            match = _SPACE.match(self.text, self.position)
            assert match is not None
            self.position = match.end()
            if self.position < len(self.text) or not self.text:
                return self.text[self.position : self.position + 1]
            self.text, self.position = "", 0


def _csv(path: Path, report: ReportProblem) -> Iterator[tuple[Place, Any]]:
    csv.field_size_limit(MAX_ROW_BYTES)
    delimiter = column_delimiter(path)
    with _open_text(path, newline="") as file:
        reader, last = csv.DictReader(_lines(file), delimiter=delimiter, strict=True), 1
        try:
            names = list(reader.fieldnames or ())
            if reason := misread(names):
                report(f"{path}:1", Unread(reason))
                return
            repeated = next((name for name in names if names.count(name) > 1), None)
            if repeated is not None:
                report(f"{path}:1", Unread(f"the column {repeated!r} appears twice; rename or remove one"))
                return
            for row in reader:
                place, last = f"{path}:{reader.line_num}", reader.line_num
                if None in row or None in row.values():
                    report(place, f"expected {len(names)} columns, as in the first line")
                else:
                    yield place, row
        except UnicodeDecodeError as error:
            report(f"{path}:{reader.line_num + 1}", Unread(f"not UTF-8 (byte {error.start}); convert the file"))
        except csv.Error as error:
            # where a quote is not closed, the reader has gone to the end
            report(f"{path}:{last + 1}", Unread(f"not CSV: {error}; from here on the file was not read"))


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
            raise csv.Error(f"the line is longer than {MAX_ROW_BYTES} characters")
        yield line


def _parquet(path: Path, report: ReportProblem) -> Iterator[tuple[Place, Any]]:
    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        repeated = next((name for name in names if names.count(name) > 1), None)
        if repeated is not None:
            report(str(path), Unread(f"the column {repeated!r} appears twice; rename or remove one"))
            return
        for batch in file.iter_batches(BATCH_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", row
    except (OSError, pyarrow.ArrowException) as error:
        report(str(path), Unread(f"not Parquet: {first_line(error)}"))
    except (ValueError, OverflowError) as error:  # text that is not UTF-8, dates that Python cannot hold
        reason = f"unreadable value near here: {first_line(error)}; the rest was not read"
        report(f"{path}:{number + 1}", Unread(reason))


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


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

"""Files and hub data sets -> rows, one at a time, each with its place."""

import csv
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import datasets
import pyarrow.parquet

MAX_ROW_BYTES = 8 * 2**20
PARQUET_BATCH_ROWS = 256

# What the datasets library raises; RuntimeError if the data set would have to run a script.
LOAD_ERRORS = (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError)

Place = str  # file:line, file:entry, or file:row
Row = dict[str, Any]
ReportProblem = Callable[[Place, str], None]


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

        for place, row in READERS[self.path.suffix.lower()](self.path, report_and_count):
            if isinstance(row, dict):
                num_seen += 1
                yield place, row
            else:
                report_and_count(place, f"expected a JSON object, not {type(row).__name__}")
        if num_seen == 0:
            report(str(self.path), "the file has no rows")

    def digest(self) -> str:
        """sha256 of the file's bytes."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class HubData:
    """A data set on the hub as `owner/name` or `owner/name:split`, loaded without running code from it."""

    name: str

    def __str__(self) -> str:
        return self.name

    def load(self) -> datasets.Dataset:
        """The named split, or `train`, memory-mapped; raises one of LOAD_ERRORS."""
        name, _, split = self.name.partition(":")
        loaded = datasets.load_dataset(name, split=split or "train")
        assert isinstance(loaded, datasets.Dataset)
        return loaded

    def rows(self, report: ReportProblem) -> Iterator[tuple[Place, Row]]:
        """The rows in order; a data set that cannot be loaded goes to `report`."""
        try:
            loaded = self.load()
        except LOAD_ERRORS as error:
            report(self.name, f"no such file or folder, and the hub data set cannot be loaded: {_first_line(error)}")
            return
        for number, row in enumerate(loaded, start=1):
            yield f"{self.name}:{number}", dict(row)

    def digest(self) -> str:
        """The datasets library's fingerprint of the loaded data."""
        try:
            return self.load()._fingerprint
        except LOAD_ERRORS:
            return "unreachable"


def _jsonl(path: Path, report: ReportProblem) -> Iterator[tuple[Place, Any]]:
    with path.open("rb") as file:
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
    decoder = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse_constant)
    with path.open(encoding="utf-8-sig") as file:
        number = 0
        try:
            buffer = file.read(MAX_ROW_BYTES).lstrip()
            if not buffer.startswith("["):
                report(str(path), "expected a JSON array of objects; name a file of one object per line .jsonl")
                return
            buffer = buffer[1:].lstrip()
            while not buffer.startswith("]"):
                number += 1
                if len(buffer) < MAX_ROW_BYTES:
                    buffer += file.read(MAX_ROW_BYTES)
                entry, length = decoder.raw_decode(buffer)
                yield f"{path}:{number}", entry
                buffer = buffer[length:].lstrip()
                if not buffer.startswith((",", "]")):
                    raise ValueError("not JSON: expected ',' or ']' after this entry")
                buffer = buffer.removeprefix(",").lstrip() or file.read(MAX_ROW_BYTES).lstrip()
        except UnicodeDecodeError as error:
            report(f"{path}:{number or 1}", f"not UTF-8 (byte {error.start}); convert the file")
        except (ValueError, RecursionError) as error:
            report(f"{path}:{number}", f"{_json_reason(error)}; the rest of the file was not read")


def _csv(path: Path, report: ReportProblem) -> Iterator[tuple[Place, Any]]:
    csv.field_size_limit(MAX_ROW_BYTES)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(_lines(file), strict=True)
        try:
            for row in reader:
                place = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    report(place, f"expected {len(reader.fieldnames or ())} columns, as in the first line")
                else:
                    yield place, row
        except UnicodeDecodeError as error:
            report(f"{path}:{reader.line_num + 1}", f"not UTF-8 (byte {error.start}); convert the file")
        except csv.Error as error:
            report(f"{path}:{reader.line_num + 1}", f"not CSV: {error}; the rest of the file was not read")


def _lines(file: TextIO) -> Iterator[str]:
    while line := file.readline(MAX_ROW_BYTES + 1):
        if len(line) > MAX_ROW_BYTES:
            raise csv.Error(f"the line is longer than {MAX_ROW_BYTES} characters")
        yield line


def _parquet(path: Path, report: ReportProblem) -> Iterator[tuple[Place, Any]]:
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(PARQUET_BATCH_ROWS):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", row
    except (OSError, pyarrow.ArrowException) as error:
        report(str(path), f"not Parquet: {_first_line(error)}")
    except (ValueError, OverflowError) as error:  # text that is not UTF-8, dates that Python cannot hold
        report(
            f"{path}:{number + 1}",
            f"unreadable value near here: {_first_line(error)}; the rest was not read",
        )


READERS: dict[str, Callable[[Path, ReportProblem], Iterator[tuple[Place, Any]]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}


def parse_json(text: str) -> Any:
    """One JSON value; raises ValueError also for NaN and repeated keys, which json accepts, and for deep nesting."""
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise ValueError(_json_reason(error)) from None


def _json_reason(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the field {repeated!r} appears twice")
    return row


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

"""Files and hub data sets -> rows, one at a time, each with the place it came from."""

import csv
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import datasets
import pyarrow.parquet

LONGEST_ROW_BYTES = 8 * 2**20
PARQUET_ROWS_AT_A_TIME = 256

# What the datasets library raises; RuntimeError is for a data set that would have to run a script.
UNREADABLE = (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError)

Place = str  # file:line, file:entry, or file:row
Row = dict[str, Any]
Complain = Callable[[Place, str], None]


@dataclass(frozen=True)
class RowFile:
    """A file of rows, by its ending."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def rows(self, complain: Complain) -> Iterator[tuple[Place, Row]]:
        """The readable rows in order; what cannot be read goes to `complain`, and reading goes on where it can."""
        if self.path.stat().st_size == 0:
            complain(str(self.path), "the file is empty")
            return
        num_seen = 0

        def note(place: Place, reason: str) -> None:
            nonlocal num_seen
            num_seen += 1
            complain(place, reason)

        for place, row in READERS[self.path.suffix.lower()](self.path, note):
            if isinstance(row, dict):
                num_seen += 1
                yield place, row
            else:
                note(place, f"a JSON object is expected, not {type(row).__name__}")
        if num_seen == 0:
            complain(str(self.path), "there is no row in it")

    def digest(self) -> str:
        """sha256 of the file's bytes."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class HubData:
    """A data set on the hub as `owner/name` or `owner/name:split`, loaded without running any code of it."""

    name: str

    def __str__(self) -> str:
        return self.name

    def load(self) -> datasets.Dataset:
        """The split (train unless named), memory-mapped; raises one of UNREADABLE where it cannot be had."""
        name, _, split = self.name.partition(":")
        loaded = datasets.load_dataset(name, split=split or "train")
        assert isinstance(loaded, datasets.Dataset)
        return loaded

    def rows(self, complain: Complain) -> Iterator[tuple[Place, Row]]:
        """Its rows in order."""
        try:
            loaded = self.load()
        except UNREADABLE as error:
            complain(self.name, f"no such file or folder, and not a data set on the hub: {_first_line(error)}")
            return
        for number, row in enumerate(loaded, start=1):
            yield f"{self.name}:{number}", dict(row)

    def digest(self) -> str:
        """The fingerprint that the datasets library gives to the loaded data."""
        try:
            return self.load()._fingerprint
        except UNREADABLE:
            return "unreachable"


def _jsonl(path: Path, complain: Complain) -> Iterator[tuple[Place, Any]]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LONGEST_ROW_BYTES + 1):
            number += 1
            place = f"{path}:{number}"
            if len(line) > LONGEST_ROW_BYTES:
                complain(place, f"the line is longer than {LONGEST_ROW_BYTES} bytes")
                while line and not line.endswith(b"\n"):
                    line = file.readline(LONGEST_ROW_BYTES)
            elif line.strip():
                try:
                    # only the first line may begin with a byte order mark
                    yield place, parse_json(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except UnicodeDecodeError as error:
                    complain(place, f"not UTF-8 (byte {error.start} of the line); convert the file")
                except ValueError as error:
                    complain(place, f"{error}; one JSON object a line is expected")


def _json(path: Path, complain: Complain) -> Iterator[tuple[Place, Any]]:
    """The entries of one JSON array, without holding the whole of it."""
    decoder = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_refuse_constant)
    with path.open(encoding="utf-8-sig") as file:
        number = 0
        try:
            buffer = file.read(LONGEST_ROW_BYTES).lstrip()
            if not buffer.startswith("["):
                complain(str(path), "a JSON array of objects is expected; for one object a line name the file .jsonl")
                return
            buffer = buffer[1:].lstrip()
            while not buffer.startswith("]"):
                number += 1
                if len(buffer) < LONGEST_ROW_BYTES:
                    buffer += file.read(LONGEST_ROW_BYTES)
                entry, length = decoder.raw_decode(buffer)
                yield f"{path}:{number}", entry
                buffer = buffer[length:].lstrip()
                if not buffer.startswith((",", "]")):
                    raise ValueError("not JSON: ',' or ']' is expected behind this entry")
                buffer = buffer.removeprefix(",").lstrip() or file.read(LONGEST_ROW_BYTES).lstrip()
        except UnicodeDecodeError as error:
            complain(f"{path}:{number or 1}", f"not UTF-8 (byte {error.start}); convert the file")
        except (ValueError, RecursionError) as error:
            complain(f"{path}:{number}", f"{_json_reason(error)}; nothing behind it was read")


def _csv(path: Path, complain: Complain) -> Iterator[tuple[Place, Any]]:
    csv.field_size_limit(LONGEST_ROW_BYTES)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(_lines(file), strict=True)
        try:
            for row in reader:
                place = f"{path}:{reader.line_num}"
                if None in row or None in row.values():
                    complain(place, f"{len(reader.fieldnames or ())} columns are expected, as in the first line")
                else:
                    yield place, row
        except UnicodeDecodeError as error:
            complain(f"{path}:{reader.line_num + 1}", f"not UTF-8 (byte {error.start}); convert the file")
        except csv.Error as error:
            complain(f"{path}:{reader.line_num + 1}", f"not CSV: {error}; nothing behind it was read")


def _lines(file: TextIO) -> Iterator[str]:
    while line := file.readline(LONGEST_ROW_BYTES + 1):
        if len(line) > LONGEST_ROW_BYTES:
            raise csv.Error(f"the line is longer than {LONGEST_ROW_BYTES} characters")
        yield line


def _parquet(path: Path, complain: Complain) -> Iterator[tuple[Place, Any]]:
    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(PARQUET_ROWS_AT_A_TIME):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", row
    except (OSError, pyarrow.ArrowException) as error:
        complain(str(path), f"not Parquet: {_first_line(error)}")
    except (ValueError, OverflowError) as error:  # text that is not UTF-8, dates that Python cannot hold
        complain(f"{path}:{number + 1}", f"a value near here cannot be read: {_first_line(error)}; nothing more was")


READERS: dict[str, Callable[[Path, Complain], Iterator[tuple[Place, Any]]]] = {
    ".jsonl": _jsonl,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
}


def parse_json(text: str) -> Any:
    """One JSON value; raises ValueError also for NaN, repeated keys and deep nesting, which json would let through."""
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
        raise ValueError(f"the field {repeated!r} stands twice")
    return row


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

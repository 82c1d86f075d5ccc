"""Data sets on the hub, and those that the datasets library saved to a folder -> rows."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import pyarrow

from data_tools.places import not_found
from data_tools.readers import BATCH_ROWS, Place, ReportProblem, Row, file_digest
from data_tools.remainder import UNREADABLE, first_line, rows_of, unread_rows
from data_tools.report import Unread

# What the datasets library raises; RuntimeError if the data set would have to run a script.
LOAD_ERRORS = (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError, pyarrow.ArrowException)


@dataclass(frozen=True)
class HubData:
    """A data set on the hub as `owner/name`, `owner/name:split` or `owner/name:subset:split`; runs no code from it."""

    name: str

    def __str__(self) -> str:
        return self.name

    def load(self) -> datasets.Dataset:
        """The named split, or `train`, memory-mapped; raises one of LOAD_ERRORS."""
        name, *rest = self.name.split(":")
        subset, split = rest[:-1], rest[-1] if rest and rest[-1] else "train"
        loaded = datasets.load_dataset(name, *subset, split=split)
        assert isinstance(loaded, datasets.Dataset)
        return loaded

    def rows(self, report: ReportProblem) -> Iterator[tuple[Place, Row]]:
        """The rows in order; a data set that cannot be loaded goes to `report`."""
        try:
            loaded = self.load()
        except LOAD_ERRORS as error:
            way_out = "; write owner/name:subset:split" if "onfig name is missing" in str(error) else ""
            hub = f"and the hub data set cannot be loaded: {first_line(error)}{way_out}"
            report(self.name, Unread(f"{not_found(self.name)}, {hub}"))
            return
        yield from _rows_of(loaded, self.name, report)

    def digest(self) -> str:
        """The datasets library's fingerprint of the loaded data."""
        try:
            return self.load()._fingerprint
        except LOAD_ERRORS:
            return "unreachable"


@dataclass(frozen=True)
class SavedData:
    """A folder that `Dataset.save_to_disk` wrote."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def rows(self, report: ReportProblem) -> Iterator[tuple[Place, Row]]:
        """The rows in order; a folder that cannot be loaded goes to `report`."""
        try:
            loaded = datasets.load_from_disk(str(self.path))
        except (*LOAD_ERRORS, KeyError, TypeError) as error:  # state.json is read as it is
            reason = f"was saved with save_to_disk, and cannot be loaded: {first_line(error)}"
            report(str(self.path), Unread(reason))
            return
        assert isinstance(loaded, datasets.Dataset)
        yield from _rows_of(loaded, str(self.path), report)

    def digest(self) -> str:
        """sha256 of the bytes of the folder's files."""
        digest = hashlib.sha256()
        for file in sorted(self.path.iterdir()):
            if file.is_file():
                digest.update(f"{file.name} {file_digest(file)}\n".encode())
        return digest.hexdigest()


def _rows_of(loaded: datasets.Dataset, name: str, report: ReportProblem) -> Iterator[tuple[Place, Row]]:
    number = 0
    batches: Any = loaded.with_format("arrow")
    try:
        for table in batches.iter(batch_size=BATCH_ROWS):
            for row in rows_of(table):
                number += 1
                yield f"{name}:{number}", row
    except UNREADABLE as error:
        report(f"{name}:{number + 1}", Unread(unread_rows(error, number, len(loaded))))

"""Paths -> records, from files of any known kind or the hub; every problem is collected in one report."""

import glob
import hashlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from data_tools.formats import Format, Message, detect
from data_tools.readers import READERS, HubData, RowFile
from data_tools.terminal import escaped

TEXT_EXTENSIONS = (".txt", ".md")
KNOWN_EXTENSIONS = (*TEXT_EXTENSIONS, *READERS)
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.\[\]%:-]+)?")  # owner/name or owner/name:split


class DataError(ValueError):
    """Data that cannot be used; the text says where, why, and what to do."""


@dataclass(frozen=True)
class Conversation:
    """Turns of a conversation, of which some assistant turns are trained."""

    source: str  # file:line
    messages: tuple[Message, ...]
    path_number: int = 0  # which of the user's paths it came from


@dataclass(frozen=True)
class Document:
    """Raw text, all of which is trained."""

    source: str  # file, or file:line
    text: str
    path_number: int = 0


Record = Conversation | Document


@dataclass
class Report:
    """What reading found: formats, ignored fields, the number of problems and the first `limit` of them."""

    limit: int = 20
    total: int = 0
    lines: list[str] = field(default_factory=list)
    ignored_fields: Counter[str] = field(default_factory=Counter)
    formats: set[str] = field(default_factory=set)

    def add(self, where: str, reason: str) -> None:
        """Adds a problem; control characters are escaped, because file names and reasons may come from strangers."""
        self.total += 1
        if len(self.lines) < self.limit:
            self.lines.append(escaped(f"{where}: {reason}"))

    def raise_if_any(self) -> None:
        """Raises DataError with all problems, if there are any."""
        if self.total:
            more = [f"... and {self.total - len(self.lines)} more"] if self.total > len(self.lines) else []
            heading = f"{self.total} problem{'s' if self.total > 1 else ''} in the data, so none of it was used:"
            raise DataError("\n".join([heading, *self.lines, *more]))


@dataclass(frozen=True)
class TextFile:
    """A file that is one document."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def digest(self) -> str:
        """sha256 of the file's bytes."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()


@dataclass(frozen=True)
class Source:
    """A file or hub data set, its format, and which of the user's paths it came from."""

    origin: TextFile | RowFile | HubData
    format: str  # auto, or the name of a format
    path_number: int
    field_map: tuple[tuple[str, str], ...] = ()

    def num_bytes(self) -> int:
        """Size of the file; a hub data set counts as large."""
        return 2**40 if isinstance(self.origin, HubData) else self.origin.path.stat().st_size

    def digest(self) -> str:
        """A digest of the content, the format and the field names."""
        return f"{self.format} {self.field_map} {self.origin.digest()}"


def find_sources(paths: Sequence[str], data_format: str, fields: Sequence[str] = ()) -> list[Source]:
    """The files and hub data sets of `paths`, folders and globs in name order; raises DataError if any is missing.

    `fields` are `prompt=NAME` and `response=NAME`.
    """
    report, sources = Report(), []
    field_map = tuple(sorted((name, column) for name, _, column in (field.partition("=") for field in fields)))
    for number, name in enumerate(paths):
        origins = _origins(name, report)
        sources += [Source(origin, data_format, number, field_map) for origin in origins]
    for source in sources:
        if isinstance(source.origin, TextFile) and data_format not in ("auto", "text"):
            report.add(str(source.origin), f"is plain text; data.format {data_format} needs a file of rows")
    report.raise_if_any()
    return sources


def _origins(name: str, report: Report) -> list[TextFile | RowFile | HubData]:
    path = Path(name).expanduser()
    if path.is_dir():
        return _in_folder(path, report)
    if path.is_file():
        if path.suffix.lower() not in KNOWN_EXTENSIONS:
            report.add(name, f"unknown file extension; known: {', '.join(KNOWN_EXTENSIONS)}")
            return []
        return [_file(path)]
    if any(character in name for character in "*?["):
        found = sorted(map(Path, glob.glob(str(path), recursive=True)))
        files = [file for file in found if file.is_file() and file.suffix.lower() in KNOWN_EXTENSIONS]
        if not files:
            report.add(name, f"no {', '.join(KNOWN_EXTENSIONS)} file matches")
        return [_file(file) for file in files]
    if HUB_NAME.fullmatch(name) and Path(name.partition(":")[0]).suffix.lower() not in KNOWN_EXTENSIONS:
        return [HubData(name)]
    report.add(name, "no such file or folder")
    return []


def _in_folder(folder: Path, report: Report) -> list[TextFile | RowFile | HubData]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.suffix.lower() in KNOWN_EXTENSIONS)
    if len({file.suffix.lower() in TEXT_EXTENSIONS for file in files}) == 2:
        reason = "contains both text and row files; choose with a glob, such as --data.path 'folder/*.txt'"
        report.add(str(folder), reason)
    elif not files:
        report.add(str(folder), f"contains no {', '.join(KNOWN_EXTENSIONS)} file")
    for file in files:  # a downloaded folder must not pull in other files of the user
        if file.is_symlink() and not file.resolve().is_relative_to(folder.resolve()):
            report.add(str(file), "is a link to a file outside the folder; to use that file, give its own path")
    return [_file(file) for file in files]


def _file(path: Path) -> TextFile | RowFile:
    return TextFile(path) if path.suffix.lower() in TEXT_EXTENSIONS else RowFile(path)


def read_records(sources: Sequence[Source], report: Report) -> Iterator[Record]:
    """The valid records of the sources, in order; problems are added to `report`, and reading continues."""
    for source in sources:
        if isinstance(source.origin, TextFile):
            report.formats.add("text")
            yield from _document(source, report)
        else:
            yield from _rows(source, source.origin, report)


def _document(source: Source, report: Report) -> Iterator[Document]:
    assert isinstance(source.origin, TextFile)
    path = source.origin.path
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        report.add(str(path), f"not UTF-8 (byte {error.start}); convert it, for example with iconv -t utf-8")
        return
    if text.strip():
        yield Document(str(path), text, source.path_number)
    else:
        report.add(str(path), "the file contains only white space" if text else "the file is empty")


def _rows(source: Source, origin: RowFile | HubData, report: Report) -> Iterator[Record]:
    """The records of a file of rows; the first readable row decides the format of all."""
    row_format: Format | None = None
    for place, row in origin.rows(report.add):
        try:
            if row_format is None:
                row_format = detect(row, source.format, dict(source.field_map))
                report.formats.add(row_format.name)
            missing = [name for name in row_format.fields if name not in row]
            if missing:
                found = ", ".join(sorted(map(str, row))) or "none"
                raise ValueError(f"no field {' and no field '.join(map(repr, missing))} (fields here: {found})")
            content = row_format.read(row)
        except ValueError as error:
            report.add(place, str(error))
            continue
        report.ignored_fields.update(row_format.ignored_fields(row))
        if isinstance(content, str):
            yield Document(place, content, source.path_number)
        else:
            yield Conversation(place, content, source.path_number)

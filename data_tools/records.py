"""The records of a data set, from whatever files it lies in; everything that is wrong with it in one report."""

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

TEXT_ENDINGS = (".txt", ".md")
KNOWN_ENDINGS = (*TEXT_ENDINGS, *READERS)
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.\[\]%:-]+)?")  # owner/name or owner/name:split


class DataError(ValueError):
    """Data that cannot be trained on; the text says where, why, and what to do."""


@dataclass(frozen=True)
class Conversation:
    """Turns, some of which are trained."""

    source: str  # file:line
    messages: tuple[Message, ...]
    path_number: int = 0  # which of the user's paths it came from


@dataclass(frozen=True)
class Document:
    """Raw text that is trained whole."""

    source: str  # file, or file:line
    text: str
    path_number: int = 0


Record = Conversation | Document


@dataclass
class Report:
    """What reading found: formats, fields that nothing reads, and problems, all counted, the first `limit` kept."""

    limit: int = 20
    total: int = 0
    lines: list[str] = field(default_factory=list)
    ignored_fields: Counter[str] = field(default_factory=Counter)
    formats: set[str] = field(default_factory=set)

    def add(self, where: str, reason: str) -> None:
        """Notes one problem; file names and reasons may come from others, so what would steer a terminal is escaped."""
        self.total += 1
        if len(self.lines) < self.limit:
            self.lines.append(escaped(f"{where}: {reason}"))

    def raise_if_any(self) -> None:
        """Raises DataError with everything noted."""
        if self.total:
            more = [f"... and {self.total - len(self.lines)} more"] if self.total > len(self.lines) else []
            heading = f"{self.total} problem{'s' if self.total > 1 else ''} in the data; nothing was made of it:"
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
    """A file or hub data set, how it is read, and which of the user's paths it came from."""

    origin: TextFile | RowFile | HubData
    format: str  # auto, or the name of a format
    path_number: int
    field_map: tuple[tuple[str, str], ...] = ()

    def num_bytes(self) -> int:
        """Size of the file; a hub data set counts as large."""
        return 2**40 if isinstance(self.origin, HubData) else self.origin.path.stat().st_size

    def digest(self) -> str:
        """What changes when the content or the way of reading it does."""
        return f"{self.format} {self.field_map} {self.origin.digest()}"


def find_sources(paths: Sequence[str], data_format: str, fields: Sequence[str] = ()) -> list[Source]:
    """What is behind `paths`: files, folders and globs in name order, hub data sets; raises DataError for what is not.

    `fields` are `prompt=NAME` and `response=NAME`.
    """
    report, sources = Report(), []
    field_map = tuple(sorted((name, column) for name, _, column in (field.partition("=") for field in fields)))
    for number, name in enumerate(paths):
        origins = _origins(name, report)
        sources += [Source(origin, data_format, number, field_map) for origin in origins]
    for source in sources:
        if isinstance(source.origin, TextFile) and data_format not in ("auto", "text"):
            report.add(str(source.origin), f"is plain text; data.format {data_format} wants rows")
    report.raise_if_any()
    return sources


def _origins(name: str, report: Report) -> list[TextFile | RowFile | HubData]:
    path = Path(name).expanduser()
    if path.is_dir():
        return _in_folder(path, report)
    if path.is_file():
        if path.suffix.lower() not in KNOWN_ENDINGS:
            report.add(name, f"unknown file ending; known: {', '.join(KNOWN_ENDINGS)}")
            return []
        return [_file(path)]
    if any(character in name for character in "*?["):
        found = sorted(map(Path, glob.glob(str(path), recursive=True)))
        files = [file for file in found if file.is_file() and file.suffix.lower() in KNOWN_ENDINGS]
        if not files:
            report.add(name, f"no {', '.join(KNOWN_ENDINGS)} file matches")
        return [_file(file) for file in files]
    if HUB_NAME.fullmatch(name) and Path(name.partition(":")[0]).suffix.lower() not in KNOWN_ENDINGS:
        return [HubData(name)]
    report.add(name, "no such file or folder")
    return []


def _in_folder(folder: Path, report: Report) -> list[TextFile | RowFile | HubData]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.suffix.lower() in KNOWN_ENDINGS)
    if len({file.suffix.lower() in TEXT_ENDINGS for file in files}) == 2:
        reason = "holds both text and row files; say which with a glob, such as --data.path 'folder/*.txt'"
        report.add(str(folder), reason)
    elif not files:
        report.add(str(folder), f"holds no {', '.join(KNOWN_ENDINGS)} file")
    for file in files:  # a folder from elsewhere must not pull in the user's other files
        if file.is_symlink() and not file.resolve().is_relative_to(folder.resolve()):
            report.add(str(file), "is a link that leads out of the folder; name the file itself if it is meant")
    return [_file(file) for file in files]


def _file(path: Path) -> TextFile | RowFile:
    return TextFile(path) if path.suffix.lower() in TEXT_ENDINGS else RowFile(path)


def read_records(sources: Sequence[Source], report: Report) -> Iterator[Record]:
    """The good records of the sources in order; what is wrong goes to `report` and reading goes on."""
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
        report.add(str(path), "the file holds only white space" if text else "the file is empty")


def _rows(source: Source, origin: RowFile | HubData, report: Report) -> Iterator[Record]:
    """All rows of a source have the format of its first readable one."""
    layout: Format | None = None
    for place, row in origin.rows(report.add):
        try:
            if layout is None:
                layout = detect(row, source.format, dict(source.field_map))
                report.formats.add(layout.name)
            missing = [name for name in layout.fields if name not in row]
            if missing:
                found = ", ".join(sorted(map(str, row))) or "none"
                raise ValueError(f"no field {' and no field '.join(map(repr, missing))} (fields here: {found})")
            content = layout.read(row)
        except ValueError as error:
            report.add(place, str(error))
            continue
        report.ignored_fields.update(layout.unread(row))
        if isinstance(content, str):
            yield Document(place, content, source.path_number)
        else:
            yield Conversation(place, content, source.path_number)

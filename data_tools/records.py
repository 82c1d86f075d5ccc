"""Sources -> records: conversations and documents, each with its place; problems have theirs."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from data_tools.compressed import DAMAGE
from data_tools.data_sets import HubData, SavedData
from data_tools.formats import MAPPED, Format, Row, detect, fields_with_values
from data_tools.messages import Message
from data_tools.readers import RowFile, is_rows_in_disguise
from data_tools.remainder import bad_byte, first_line
from data_tools.report import Report, Unread
from data_tools.sources import Source, TextFile


@dataclass(frozen=True)
class Conversation:
    """Turns of a conversation, of which some assistant turns are trained."""

    source: str  # file:line
    messages: tuple[Message, ...]
    path_number: int = 0  # which of the user's paths it came from
    tools: tuple[dict[str, Any], ...] = ()  # definitions, as templates expect them
    template_arguments: tuple[tuple[str, Any], ...] = ()  # of this row alone


@dataclass(frozen=True)
class Document:
    """Raw text, all of which is trained."""

    source: str  # file, or file:line
    text: str
    path_number: int = 0


Record = Conversation | Document


@dataclass(frozen=True)
class Problem:
    """Something that could not be read."""

    place: str
    reason: str


@dataclass(frozen=True)
class RawRow:
    """A row, and the format in which it is to be read."""

    place: str
    row: Row
    format: Format
    path_number: int

    def read(self) -> Record:
        """The record; raises ValueError saying what of the row cannot be read."""
        missing = [name for name in self.format.fields if self.row.get(name) is None]
        if missing:
            here = fields_with_values(self.row)
            told = [f"{name!r} is null" if name in self.row else f"no field {name!r}" for name in missing]
            raise ValueError(f"{' and '.join(told)} (fields here: {here})")
        content = self.format.read(self.row)
        if isinstance(content, str):
            return Document(self.place, content, self.path_number)
        return Conversation(self.place, content.messages, self.path_number, content.tools, content.template_arguments)


Raw = RawRow | Document | Problem


def read_raw(sources: Sequence[Source]) -> Iterator[Raw]:
    """Everything in the sources, in order: rows that are yet to be read, documents, and problems."""
    for source in sources:
        if isinstance(source.origin, TextFile):
            yield _document(source, source.origin)
        else:
            yield from _rows(source, source.origin)


def _document(source: Source, file: TextFile) -> Document | Problem:
    try:
        text = file.read().decode("utf-8-sig")
    except (*DAMAGE, OSError) as error:
        return Problem(str(file), f"cannot be read: {first_line(error)}")
    except UnicodeDecodeError:
        line, byte = bad_byte(file.path)
        reason = f"not UTF-8 (byte {byte} of line {line}); convert it, for example with iconv -t utf-8"
        return Problem(str(file), reason)
    if not text.strip():
        return Problem(str(file), "the file contains only white space" if text else "the file is empty")
    if source.format == "auto" and is_rows_in_disguise(text):
        reason = (
            "holds rows of JSON: name it .jsonl (or .json) to train them, or train its text with --data.format text"
        )
        return Problem(str(file), Unread(reason))
    return Document(str(file), text, source.path_number)


def _rows(source: Source, origin: RowFile | HubData | SavedData) -> Iterator[RawRow | Problem]:
    """The rows of a file.

    The first readable one decides the format; a row that has a more specific one, or nulls in this one's fields, is
    read in its own.
    """
    row_format: Format | None = None
    field_map = dict(source.field_map)
    problems: list[Problem] = []
    for place, row in origin.rows(lambda place, reason: problems.append(Problem(place, reason))):
        yield from problems
        problems.clear()
        try:
            own = detect(row, source.format, field_map)
        except ValueError as error:
            if row_format is None:
                yield Problem(place, str(error))
                continue
            own = row_format  # which says what is wrong
        row_format = row_format or own
        is_null = not row_format.matches(row) and all(name in row for name in row_format.fields)
        yield RawRow(place, row, own if own.rank < row_format.rank or is_null else row_format, source.path_number)
    yield from problems


@dataclass
class Tally:
    """What reading found beside the records: formats, fields that no format reads, and problems."""

    report: Report
    formats: set[str]
    ignored_fields: Counter[str]

    @classmethod
    def empty(cls) -> "Tally":
        """Nothing found yet."""
        return cls(Report(), set(), Counter())


def read_records(sources: Sequence[Source], tally: Tally) -> Iterator[Record]:
    """The valid records of the sources, in order; problems are added to the report, and reading continues."""
    for raw in read_raw(sources):
        record = read_one(raw, tally.formats, tally.ignored_fields)
        if isinstance(record, Problem):
            tally.report.add(record.place, record.reason)
        else:
            yield record


def read_one(raw: Raw, formats: set[str], ignored_fields: Counter[str]) -> Record | Problem:
    """The record of a row; its format and the fields that are not read are counted."""
    if isinstance(raw, Document):
        formats.add("text")
    if not isinstance(raw, RawRow):
        return raw
    formats.add(MAPPED if raw.format.is_mapped else raw.format.name)
    try:
        record = raw.read()
    except ValueError as error:
        return Problem(raw.place, str(error))
    except RecursionError:
        return Problem(raw.place, "nested too deeply")
    ignored_fields.update(raw.format.ignored_fields(raw.row))
    return record

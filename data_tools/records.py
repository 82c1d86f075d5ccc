"""The records of a data set, read from text files and prompt/response JSONL; everything wrong in one report."""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TEXT_ENDINGS = (".txt", ".md")
LONGEST_LINE_BYTES = 8 * 2**20
FIELDS = ("prompt", "response")


class DataError(ValueError):
    """Data that cannot be trained on; the text says where, why, and what to do."""


@dataclass(frozen=True)
class Message:
    """One turn; `train` says whether the model is to learn to write it."""

    role: str
    content: str
    train: bool = False
    extra: tuple[tuple[str, Any], ...] = ()  # what else the chat template may use, such as tool calls

    def as_turn(self) -> dict[str, Any]:
        """The turn as chat templates take it."""
        return {"role": self.role, "content": self.content, **dict(self.extra)}


@dataclass(frozen=True)
class Conversation:
    """Turns of which the assistant's are trained."""

    source: str  # file:line
    messages: tuple[Message, ...]


@dataclass(frozen=True)
class Document:
    """Raw text that is trained whole."""

    source: str  # file
    text: str


Record = Conversation | Document


@dataclass
class Report:
    """What reading found: problems, all counted and the first `limit` lines kept, and fields that nothing reads."""

    limit: int = 20
    total: int = 0
    lines: list[str] = field(default_factory=list)
    ignored_fields: Counter[str] = field(default_factory=Counter)

    def add(self, where: str, reason: str) -> None:
        """Notes one problem."""
        self.total += 1
        if len(self.lines) < self.limit:
            self.lines.append(f"{where}: {reason}")

    def raise_if_any(self) -> None:
        """Raises DataError with everything noted."""
        if self.total:
            more = [f"... and {self.total - len(self.lines)} more"] if self.total > len(self.lines) else []
            heading = f"{self.total} problem{'s' if self.total > 1 else ''} in the data; nothing was trained:"
            raise DataError("\n".join([heading, *self.lines, *more]))


@dataclass(frozen=True)
class Source:
    """One file and how it is read."""

    path: Path
    format: str  # text | prompt_response


def find_sources(paths: Sequence[str], data_format: str) -> list[Source]:
    """The files behind `paths`, folders expanded in name order; raises DataError for what is not there."""
    report, sources = Report(), []
    for name in paths:
        path = Path(name).expanduser()
        if path.is_dir():
            files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix.lower() in TEXT_ENDINGS)
            if data_format == "prompt_response":
                report.add(name, "is a folder; data.format prompt_response wants .jsonl files")
            elif not files:
                report.add(
                    name,
                    f"no {' or '.join(TEXT_ENDINGS)} file in this folder; name a .jsonl file by its path",
                )
            sources += [Source(file, "text") for file in files]
        elif not path.is_file():
            report.add(name, "no such file or folder; check the spelling of --data.path")
        elif data_format != "auto":
            sources.append(Source(path, data_format))
        elif path.suffix.lower() in (*TEXT_ENDINGS, ".jsonl"):
            sources.append(Source(path, "prompt_response" if path.suffix.lower() == ".jsonl" else "text"))
        else:
            report.add(name, "unknown file ending; say --data.format text or --data.format prompt_response")
    report.raise_if_any()
    return sources


def read_records(sources: Sequence[Source], report: Report) -> Iterator[Record]:
    """The good records of the sources in order; what is wrong goes to `report` and reading goes on."""
    for source in sources:
        if source.path.stat().st_size == 0:
            report.add(str(source.path), "the file is empty")
        elif source.format == "text":
            yield from _read_document(source.path, report)
        else:
            yield from _read_rows(source.path, report)


def _read_document(path: Path, report: Report) -> Iterator[Document]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        report.add(str(path), f"not UTF-8 (byte {error.start}); convert it, for example with iconv -t utf-8")
        return
    if text.strip():
        yield Document(str(path), text)
    else:
        report.add(str(path), "the file holds only white space")


def _read_rows(path: Path, report: Report) -> Iterator[Conversation]:
    num_rows = 0
    with path.open("rb") as file:
        line_number = 0
        while line := file.readline(LONGEST_LINE_BYTES + 1):
            line_number += 1
            if len(line) > LONGEST_LINE_BYTES:
                report.add(
                    f"{path}:{line_number}",
                    f"the line is longer than {LONGEST_LINE_BYTES} bytes; rest skipped",
                )
                return
            if not line.strip():
                continue
            num_rows += 1
            try:
                row = _row(line, first=line_number == 1)
            except ValueError as error:
                report.add(f"{path}:{line_number}", str(error))
                continue
            report.ignored_fields.update(set(row) - set(FIELDS))
            turns = (Message("user", row["prompt"]), Message("assistant", row["response"], train=True))
            yield Conversation(f"{path}:{line_number}", turns)
    if num_rows == 0:
        report.add(str(path), "the file holds only white space")


def _row(line: bytes, first: bool) -> dict[str, str]:
    """The JSON object in one line, its FIELDS checked; raises ValueError with the reason and what to do."""
    try:
        # only the first line may begin with a byte order mark
        row = json.loads(line.decode("utf-8-sig" if first else "utf-8"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start} of the line); convert the file") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}; one JSON object a line is expected") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(row, dict):
        raise ValueError(f"a JSON object is expected, not {type(row).__name__}")
    missing = [name for name in FIELDS if name not in row]
    if missing:
        found = ", ".join(sorted(row)) or "none"
        raise ValueError(f"no field {' and no field '.join(map(repr, missing))} (fields here: {found})")
    for name in FIELDS:
        if not isinstance(row[name], str):
            raise ValueError(f"{name!r} must be a string, not {type(row[name]).__name__}")
        if not row[name].strip():
            raise ValueError(f"{name!r} is empty")
    return row


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")

"""What a page is made of. No markup but that of the charts, which hold no text of the user's."""

from collections.abc import Sequence
from dataclasses import dataclass, field

Cell = str | int | float | None  # a number keeps its exact value beside the rounded one that is seen


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    is_warning: bool = False
    kind: str = "text"


@dataclass(frozen=True)
class Facts:
    """Names with their values."""

    rows: Sequence[tuple[str, str]]
    kind: str = "facts"


@dataclass(frozen=True)
class Table:
    """A table; the first cell of a row is its heading."""

    caption: str
    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    is_folded: bool = False  # behind its caption, until it is opened
    kind: str = "table"

    @property
    def numeric(self) -> list[bool]:
        """Of each column whether all of it are numbers, which stand one below the other then."""
        columns = [[row[place] for row in self.rows] for place in range(len(self.header))]
        return [all(cell is None or isinstance(cell, int | float) for cell in column) for column in columns]


@dataclass(frozen=True)
class Code:
    """Text to copy."""

    text: str
    kind: str = "code"


@dataclass(frozen=True)
class Legend:
    """What a line of a chart stands for."""

    label: str
    series: int  # its colour and dashes
    role: str  # how it is drawn


@dataclass(frozen=True)
class Picture:
    """A chart, the sentence that says the same, and its numbers."""

    key: str
    title: str
    sentence: str
    legend: Sequence[Legend]
    svg: str
    table: Table
    kind: str = "picture"


@dataclass(frozen=True)
class Pictures:
    """Charts side by side."""

    pictures: Sequence[Picture]
    kind: str = "pictures"


@dataclass(frozen=True)
class Reply:
    """One answer to a question."""

    who: str
    text: str
    remark: str = ""


@dataclass(frozen=True)
class Question:
    """A question with its answers."""

    question: str
    replies: Sequence[Reply]


@dataclass(frozen=True)
class Questions:
    """Questions, the first of them open to view."""

    heading: str
    summary: str
    questions: Sequence[Question]
    num_open: int = 4
    kind: str = "questions"

    @property
    def first(self) -> Sequence[Question]:
        """Those that are seen at once."""
        return self.questions[: self.num_open]

    @property
    def others(self) -> Sequence[Question]:
        """Those behind a fold."""
        return self.questions[self.num_open :]


Block = Text | Facts | Table | Code | Pictures | Questions


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading."""

    key: str
    title: str
    blocks: Sequence[Block]


@dataclass(frozen=True)
class Page:
    """A whole page."""

    title: str
    subtitle: str
    figures: Sequence[tuple[str, str]]  # what is seen first: value and name
    sections: Sequence[Section]
    notes: Sequence[str] = field(default_factory=list)  # on what is damaged or missing

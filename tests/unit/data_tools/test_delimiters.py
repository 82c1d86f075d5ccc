"""CSV files whose columns are not separated by commas."""

import gzip
from pathlib import Path

import pytest

from data_tools.delimiters import delimiter_of
from data_tools.formats import proposed_fields
from data_tools.readers import RowFile
from data_tools.sources import survey

ROWS = [
    {"prompt": "What is an APU?", "response": "A unit, small; it turns."},
    {"prompt": 'Said "so"', "response": "Two\nlines, here"},
]


def written(delimiter: str) -> str:
    """ROWS as a spreadsheet saves them."""
    cells = [["prompt", "response"], *([row["prompt"], row["response"]] for row in ROWS)]
    quoted = [['"' + cell.replace('"', '""') + '"' if len(cell) > 8 else cell for cell in row] for row in cells]
    return "".join(delimiter.join(row) + "\r\n" for row in quoted)


@pytest.mark.parametrize(
    ("delimiter", "name"), [(",", ""), (";", "semicolons"), ("\t", "tabs"), ("|", "vertical bars")]
)
def test_every_delimiter_gives_the_same_rows(delimiter: str, name: str, tmp_path: Path) -> None:
    """What a spreadsheet writes is read, with quotes and line breaks, also compressed; all but the comma is said."""
    path, packed = tmp_path / "rows.csv", tmp_path / "rows.csv.gz"
    path.write_text(written(delimiter), newline="")
    packed.write_bytes(gzip.compress(written(delimiter).encode()))
    problems: list[str] = []
    for file in (path, packed):
        found = [row for _, row in RowFile(file).rows(lambda place, reason: problems.append(f"{place}: {reason}"))]
        assert problems == []
        assert found == ROWS
        notes = survey([str(file)], "auto").notes
        assert notes == ([f"{file}: its columns are separated by {name}"] if name else [])


def test_in_doubt_it_is_the_comma(tmp_path: Path) -> None:
    """Lines that another delimiter divides unevenly, and a first line with a comma, are not taken apart otherwise."""
    assert delimiter_of("prompt;response\na;b\nc;d;e\n") == ","
    assert delimiter_of("prompt;x,response\na;b\n") == ","
    assert delimiter_of("text\na;b\n") == ","
    assert delimiter_of("prompt;response\na;b\n") == ";"
    path = tmp_path / "rows.csv"
    path.write_text("prompt;response\na;b\nc;d;e\n")
    problems: list[str] = []
    assert list(RowFile(path).rows(lambda place, reason: problems.append(f"{place}: {reason}"))) == []
    assert problems[0].startswith(f"{path}:1: one column, named 'prompt;response': semicolons do not divide all rows")


def test_columns_are_proposed_by_their_names() -> None:
    """The more telling names win; two columns of text are enough; otherwise the user names them."""
    assert proposed_fields({"id": 3, "Question": "a", "Answer": "b", "title": "c"}) == (
        "prompt=Question",
        "response=Answer",
    )
    assert proposed_fields({"begriff": "a", "erklärung": "b", "id": 3}) == ("prompt=begriff", "'response=erklärung'")
    assert proposed_fields({"definition": "a", "wort": "b"}) == ("prompt=wort", "response=definition")
    assert proposed_fields({"x": "a", "y": "b", "z": "c"}) == ("prompt=COLUMN", "response=COLUMN")

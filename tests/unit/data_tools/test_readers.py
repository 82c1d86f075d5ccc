"""Readers take a file to its end, in linear time, and say what they do not read."""

import bz2
import gzip
import json
import lzma
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from data_tools.readers import RowFile, is_rows_in_disguise
from data_tools.records import Tally, read_records
from data_tools.sources import survey

ROWS = [{"prompt": f"What is {i}?", "response": f"It is {i}."} for i in range(500)]
JSONL = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def rows_of(path: Path) -> tuple[list[Any], list[str]]:
    problems: list[str] = []
    rows = [row for _, row in RowFile(path).rows(lambda place, reason: problems.append(f"{place}: {reason}"))]
    return rows, problems


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pyarrow.compress(content, "zstd", asbytes=True),
    ".lz4": lambda content: _stream(content, "lz4"),
}


def _stream(content: bytes, codec: str) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, codec) as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("ending", COMPRESSORS)
def test_compressed_rows(ending: str, tmp_path: Path) -> None:
    """JSONL, JSON and CSV through every compression give the same rows; a cut file says so, after the rows it had."""
    lines = "prompt,response\n" + "".join(f"{row['prompt']},{row['response']}\n" for row in ROWS)
    for kind, content in ((".jsonl", JSONL), (".json", json.dumps(ROWS).encode()), (".csv", lines.encode())):
        path = tmp_path / f"rows{kind}{ending}"
        path.write_bytes(COMPRESSORS[ending](content))
        assert rows_of(path) == (ROWS, [])
    packed = COMPRESSORS[ending](JSONL * 50)
    path.write_bytes(packed[: len(packed) // 2])
    whole = path.rename(tmp_path / f"cut.jsonl{ending}")
    rows, problems = rows_of(whole)
    assert len(rows) < 500 * 50
    assert any("cannot be decompressed" in problem or "not JSON" in problem for problem in problems), problems


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz"])
def test_archives_that_were_joined(ending: str, tmp_path: Path) -> None:
    """All are read; one that is damaged is told, and not taken for the end."""
    path, pack = tmp_path / f"rows.jsonl{ending}", COMPRESSORS[ending]
    path.write_bytes(pack(JSONL) + pack(JSONL))
    assert rows_of(path) == (ROWS * 2, [])
    path.write_bytes(pack(JSONL) + b"XX" + pack(JSONL)[2:])
    rows, problems = rows_of(path)
    assert rows == ROWS
    assert "cannot be decompressed after 500 rows" in problems[0]
    (tmp_path / f"text.txt{ending}").write_bytes(pack(JSONL)[:-9])
    tally = Tally.empty()
    assert list(read_records(survey([str(tmp_path / f"text.txt{ending}")], "auto").sources, tally)) == []
    assert f"text.txt{ending}: cannot be read: " in tally.report.lines[0]


def test_a_damaged_archive_is_named(tmp_path: Path) -> None:
    """A file that is no archive at all is a problem with its name, never an exception."""
    for ending in COMPRESSORS:
        path = tmp_path / f"x.jsonl{ending}"
        path.write_bytes(b"this is no archive" * 10)
        rows, problems = rows_of(path)
        assert rows == []
        assert "cannot be decompressed after 0 rows" in problems[0], ending


def test_an_array_is_read_in_linear_time(tmp_path: Path) -> None:
    """A JSON array takes at most three times as long as the same rows as JSONL (measured: as long)."""
    many = [{"instruction": f"Question {i} " + "word " * 20, "output": "word " * 60} for i in range(30_000)]
    (tmp_path / "a.json").write_text(json.dumps(many))
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in many))
    seconds = {}
    for name in ("a.jsonl", "a.json"):
        began = time.perf_counter()
        rows, problems = rows_of(tmp_path / name)
        seconds[name] = time.perf_counter() - began
        assert (len(rows), problems) == (30_000, [])
    assert seconds["a.json"] < 3 * seconds["a.jsonl"] + 0.2


@pytest.mark.parametrize("space", ["", " \n\t", "\n" * 100])
def test_arrays_in_any_layout(space: str, tmp_path: Path) -> None:
    """White space anywhere, an empty array, a single entry."""
    path = tmp_path / "a.json"
    for rows in ([], ROWS[:1], ROWS[:3]):
        path.write_text(f"{space}[{space}" + f"{space},{space}".join(map(json.dumps, rows)) + f"{space}]{space}")
        found, problems = rows_of(path)
        assert found == rows
        assert len(problems) == (not rows)


def test_what_follows_an_array_is_refused(tmp_path: Path) -> None:
    """Two files that were joined: the second array is not lost in silence."""
    (tmp_path / "a.json").write_text(json.dumps(ROWS[:2]) + "\n" + json.dumps(ROWS[2:4]))
    rows, problems = rows_of(tmp_path / "a.json")
    assert len(rows) == 2
    assert problems == [
        f"{tmp_path / 'a.json'}: something follows the array's end, as where two files were joined: write one array; "
        "about 2 more entries were not read"
    ]


def test_a_column_named_twice_is_refused(tmp_path: Path) -> None:
    """In CSV and Parquet, where the last one would win."""
    (tmp_path / "a.csv").write_text("prompt,response,response\nWhich?,one,another\n")
    assert rows_of(tmp_path / "a.csv") == (
        [],
        [
            f"{tmp_path / 'a.csv'}:1: the column 'response' appears twice; rename or remove one; "
            "2 of the file's 2 lines were not read, from line 1 on"
        ],
    )
    table = pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert "the column 'text' appears twice" in rows_of(tmp_path / "a.parquet")[1][0]


def test_a_null_column_does_not_decide_a_format(tmp_path: Path) -> None:
    """Two layouts in one Parquet file: each row is read by the columns that it fills."""
    turns = [{"role": "user", "content": "2 and 4?"}, {"role": "assistant", "content": "6"}]
    rows = [
        {"prompt": "2 and 3?", "completion": "5", "messages": None},
        {"prompt": None, "completion": None, "messages": turns},
        {"prompt": None, "completion": None, "messages": None},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    tally = Tally.empty()
    records: list[Any] = list(read_records(survey([str(tmp_path / "a.parquet")], "auto").sources, tally))
    assert [[turn.content for turn in record.messages] for record in records] == [["2 and 3?", "5"], ["2 and 4?", "6"]]
    assert tally.formats == {"prompt_response", "messages"}
    assert tally.report.lines[0].startswith(
        f"{tmp_path / 'a.parquet'}:3: 'prompt' is null and 'completion' is null (fields here: none)"
    )
    assert not tally.ignored_fields


def test_text_that_is_rows_is_asked_about(tmp_path: Path) -> None:
    """A .txt of JSON lines is refused with both ways out; --data.format text trains it as it is."""
    path = tmp_path / "rows.txt"
    path.write_bytes(JSONL)
    tally = Tally.empty()
    assert list(read_records(survey([str(path)], "auto").sources, tally)) == []
    assert "holds rows of JSON: name it .jsonl" in tally.report.lines[0]
    assert "--data.format text" in tally.report.lines[0]
    assert len(list(read_records(survey([str(path)], "text").sources, Tally.empty()))) == 1
    assert is_rows_in_disguise(json.dumps(ROWS))
    assert is_rows_in_disguise('{"a": 1}\n{"a" 2}\n')
    assert is_rows_in_disguise('{\n  "a": 1\n}')
    for text in ("[1] A list of parts.", '{"a": 1} and more', "{}{}", "[]", "[1, 2]", "A report."):
        assert not is_rows_in_disguise(text)

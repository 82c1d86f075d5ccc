"""Where a file cannot be read on, the place and how much is behind it are told, and nothing is trained without it."""

import gzip
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from data_tools import making, readers
from data_tools.data_sets import SavedData
from data_tools.prepare import prepare
from data_tools.readers import RowFile
from data_tools.report import DataError
from tests.conftest import BUNDLED_BASE, tokenizer_at
from tests.unit.data_tools.test_readers import ROWS, rows_of
from tests.unit.data_tools.test_records import settings

PAIR = b'{"prompt": "a", "response": "b"}'
UNREAD = {  # a file that cannot be read on from some place, which is named, with how much is behind it
    "a.csv": (
        b'prompt,response\na,b\nc,"d\ne,f\n',
        "a.csv:3: not CSV: unexpected end of data; close every quote, and double those inside a text; "
        "2 of the file's 4 lines were not read, from line 3 on",
    ),
    "stray.csv": (
        b'prompt,response\na,b\nc,"d"d\ne,f\ng,h',
        "stray.csv:3: not CSV: ',' expected after '\"'; close every quote, and double those inside a text; "
        "3 of the file's 5 lines were not read, from line 3 on",
    ),
    "latin.csv": (
        b"prompt,response\na,b\nc,\xe9\ne,f\n",
        "latin.csv:3: not UTF-8 (byte 3 of the line); convert the file; "
        "4 of the file's 4 lines were not read, from line 1 on",
    ),
    "twice.csv": (
        b"prompt,response,response\na,b,c\n",
        "twice.csv:1: the column 'response' appears twice; rename or remove one; "
        "2 of the file's 2 lines were not read, from line 1 on",
    ),
    "a.json": (
        b"[%s]" % b", ".join([*[PAIR] * 9, PAIR.replace(b":", b" ", 1), *[PAIR] * 3]),
        "a.json:10: not JSON: Expecting ':' delimiter at column 319; about 4 more entries were not read",
    ),
    "open.json": (
        b"[%s, %s\n\n" % (PAIR, PAIR),
        "open.json:2: not JSON: expected ',' or ']' after this entry at column 68; the file ends there",
    ),
    "comma.json": (
        b"[%s,\n%s %s]" % (PAIR, PAIR, PAIR),
        "comma.json:2: not JSON: expected ',' or ']' after this entry at line 2, column 34; "
        "about 1 more entry was not read",
    ),
    "begin.json": (b'[{"prompt"; "a"}, {}]', "none of the file's entries was read"),
    "latin.json": (
        b"[%s,\n%s]" % (PAIR, PAIR.replace(b"b", b"\xe9")),
        "not UTF-8 (byte 30 of line 2); convert the file, which was not read from here on",
    ),
    "joined.json": (
        b"[%s][%s]" % (PAIR, PAIR),
        "joined.json: something follows the array's end, as where two files were joined: write one array; "
        "about 1 more entry was not read",
    ),
    "rows.txt": (b"%s\n" % PAIR * 9, "rows.txt: holds rows of JSON: name it .jsonl"),
    "cut.jsonl.gz": (gzip.compress(b"%s\n" % PAIR * 9)[:-9], "cannot be decompressed after"),
    "a.parquet": (b"PAR1", "a.parquet: not Parquet"),
}


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_at(BUNDLED_BASE)


@pytest.mark.parametrize("name", UNREAD)
def test_the_rest_of_a_file_is_no_bad_record(name: str, tokenizer, tmp_path: Path) -> None:
    """on_error skip leaves out records: what is behind a place where a file cannot be read on is none."""
    content, said = UNREAD[name]
    good, other = tmp_path / "good.jsonl", tmp_path / name
    good.write_text(json.dumps({"prompt": "a", "response": "b"}))
    other.write_bytes(content)
    for on_error in ("skip", "stop"):
        both = replace(settings(good, other), on_error=on_error)
        with pytest.raises(DataError, match=re.escape(said)) as error:
            prepare(both, tokenizer)
        assert ("were not read to their end" in str(error.value)) == (on_error == "skip")
        assert "on_error skip" not in str(error.value)


def test_other_processes_tell_of_unread_files_as_this_one(
    tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That a reason is no row's survives the way to a worker and back."""
    monkeypatch.setattr(making, "MIN_PARALLEL_BYTES", 0)
    (tmp_path / "a.csv").write_text('prompt,response\na,b\nc,"d\n')
    with pytest.raises(DataError, match="1 of the file's 3 lines were not read, from line 3 on"):
        prepare(replace(settings(tmp_path / "a.csv"), on_error="skip"), tokenizer)


@pytest.mark.parametrize("begin", ["", "\n", " " * 99])
def test_an_error_in_an_array_has_line_and_column(begin: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also behind the piece that is held, and of an array that is cut short its end, not the line after it."""
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 64)
    path, row = tmp_path / "a.json", json.dumps(ROWS[0])
    for layout in (" ", "\n"):
        for bad, sign in ((row.replace(":", ";", 1), ":"), (row[:-1], ",")):
            text = f"{begin}[{f',{layout}'.join([row] * 20)},{layout}"
            at = len(text) + (bad.index(";") if ";" in bad else len(bad))
            path.write_text(f"{text}{bad}" + (", {}]" if ";" in bad else "\n\n"))
            line, column = text.count("\n") + 1, at - text.rfind("\n")
            place = f"column {column}" if line == 1 else f"line {line}, column {column}"
            assert f"{path}:21: not JSON: Expecting '{sign}' delimiter at {place}; about" in rows_of(path)[1][0]


@pytest.mark.parametrize("before", [3, 40])
def test_an_error_far_from_an_arrays_end(before: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has line and column too, where more follows than is held; only what may be cut by that has none."""
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 128)
    path, row = tmp_path / "a.json", json.dumps(ROWS[0])
    for bad, said in (
        (row.replace(":", ";", 1), f"Expecting ':' delimiter at line {before + 1}, column {row.index(':') + 1}; about"),
        (row[:-1] + " " * 300 + "}", "the entry is longer than 128 characters, or not JSON; about"),
        (row.replace("It", "It" * 300), "the entry is longer than 128 characters, or not JSON; about"),
    ):
        path.write_text("[" + ",\n".join([*[row] * before, bad, *[row] * 40]) + "]")
        rows, problems = rows_of(path)
        assert len(rows) == before
        assert problems[0].startswith(f"{path}:{before + 1}: ")
        assert said in problems[0]


@pytest.mark.parametrize("name", ["a.csv.gz", "a.json.gz"])
def test_damage_does_not_hide_an_error_before_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is cut behind a place where it could not be read on: that place is named."""
    monkeypatch.setattr(readers, "MAX_ROW_BYTES", 4096)
    words = [hashlib.sha256(b"%d" % number).hexdigest().encode() for number in range(5000)]
    lines = [b'{"prompt": "%s"}' % word for word in words]
    for begin, said in ((b"\xe9", "not UTF-8 (byte 1 of"), (b'"a"a' if "csv" in name else b"{}{", "")):
        if name == "a.csv.gz":
            content = b"prompt,response\n%s," % begin + b",b\n".join(words)
            said = said or "a.csv.gz:2: not CSV: "
        else:
            content = b"[\n%s," % begin + b",\n".join(lines)
            said = said or "not JSON: expected ',' or ']' after this entry at line 2, column 3; the rest of the file"
        packed = gzip.compress(content)
        (tmp_path / name).write_bytes(packed[: len(packed) // 10])
        problems = rows_of(tmp_path / name)[1]
        assert said in problems[0], problems
        assert "was not read" in problems[0]


def test_values_that_python_cannot_hold_end_a_table(tmp_path: Path) -> None:
    """In Parquet and in a saved data set, the row and how many are behind it are told; those before it are read."""
    years = pyarrow.array([0] * 300 + [2**45], pyarrow.timestamp("s"))
    table = pyarrow.table({"text": ["a"] * 301, "when": years})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    datasets.Dataset(table).save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "a.parquet", tmp_path / "saved"):
        problems: list[str] = []
        origin = SavedData(path) if path.is_dir() else RowFile(path)
        rows = list(origin.rows(lambda place, reason, told=problems: told.append(f"{place}: {reason}")))
        assert len(rows) == 256
        assert problems[0].startswith(f"{path}:257: unreadable value near here: ")
        assert problems[0].endswith("; 45 of 301 rows were not read")

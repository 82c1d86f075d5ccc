"""All problems in the data are reported together with file and line, and bad data leaves nothing in the cache."""

import json
import random
import shutil
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from data_tools import making
from data_tools.cache import cache_root
from data_tools.prepare import PrepareSettings, prepare
from data_tools.records import Tally, read_records
from data_tools.report import DataError, Report
from data_tools.sources import survey
from tests.conftest import BUNDLED_BASE, SHARED, arguments, needs_shared, run_command, tokenizer_at
from tests.injections import Fault
from train.config import Config

GOOD = '{"prompt": "What is AOG?", "response": "Aircraft on ground."}\n'


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_at(BUNDLED_BASE)


def settings(*paths: Path, data_format: str = "auto", max_length: int = 64) -> PrepareSettings:
    return PrepareSettings(tuple(map(str, paths)), data_format, max_length, 8)


BAD_ROWS = [
    ('{"prompt": "a", "response": "b"', "not JSON: .* at column 32"),
    ('["prompt", "response"]', "expected a JSON object, not list"),
    (
        '{"question": "a", "answer": "b"}',
        r"no field 'prompt' and no field 'response' \(fields here: answer, question\)",
    ),
    ('{"prompt": 7, "response": "b"}', "'prompt' must be a string, not int"),
    ('{"prompt": "a", "response": "  "}', "'response' is empty"),
    ('{"prompt": "a", "response": NaN}', "NaN is not JSON"),
    ("[" * 100_000, "nested too deeply"),
    ('{"prompt": "a", "response": "b"}\x0c', "not JSON: Extra data at column 33"),
]


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS, ids=[reason[:20] for _, reason in BAD_ROWS])
def test_a_bad_row_is_named_by_file_line_and_reason(tokenizer, tmp_path: Path, row: str, reason: str) -> None:
    """A bad line 3 is reported as such, and nothing is left in the cache."""
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD + "\n" + row + "\n" + GOOD)
    before = sorted(cache_root().glob("*"))
    with pytest.raises(DataError, match=rf"1 problem .*\n.*rows\.jsonl:3: {reason}"):
        prepare(settings(path), tokenizer)
    assert sorted(cache_root().glob("*")) == before


def test_bytes_that_are_not_utf8(tokenizer, tmp_path: Path) -> None:
    """In a row and in a text file, the report has the place and the remedy."""
    rows, text = tmp_path / "rows.jsonl", tmp_path / "text.txt"
    rows.write_bytes(GOOD.encode() + b'{"prompt": "\xff", "response": "b"}\n')
    text.write_bytes(b"abc\r\n \xe9")
    with pytest.raises(
        DataError, match=r"rows\.jsonl:2: not UTF-8 \(byte 13 of(.|\n)*text\.txt: not UTF-8 \(byte 2 of line 2\)"
    ):
        prepare(settings(rows, text), tokenizer)


def test_everything_wrong_in_one_report(tokenizer, tmp_path: Path) -> None:
    """Thirty rows in two files, bad for one reason, are one line with their number and the first places."""
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"Term": "a", "Meaning of it": "b"}\n' * 15)
    with pytest.raises(DataError) as caught:
        prepare(settings(tmp_path / "a.jsonl", tmp_path / "b.jsonl"), tokenizer)
    heading, line = str(caught.value).splitlines()
    assert heading.startswith("30 problems")
    assert line.startswith(f"{tmp_path}/a.jsonl:1: unknown fields (Meaning of it, Term)")
    assert "--data.fields prompt=Term 'response=Meaning of it'" in line
    assert line.endswith(" (30 times; next a.jsonl:2, a.jsonl:3, ...)")


def test_twenty_kinds_of_problems_are_told() -> None:
    """Each reason has a line, in order; beyond the twentieth they are counted; equal ones take no place."""
    report = Report()
    for number in range(100):
        report.add(f"x:{number}", f"reason {number % 25}")
        report.add(f"x:{number}", "always")
    with pytest.raises(DataError) as caught:
        report.raise_if_any("way out")
    heading, *lines, more = str(caught.value).splitlines()
    assert heading == "200 problems in the data, so none of it was used (way out):"
    assert lines[:2] == [
        "x:0: reason 0 (4 times; next x:25, x:50, ...)",
        "x:0: always (100 times; next x:1, x:2, ...)",
    ]
    assert len(lines) == 20
    assert more == f"... and {200 - 100 - 19 * 4} more"


def test_missing_unknown_and_empty_files(tokenizer, tmp_path: Path) -> None:
    """Missing files, unknown extensions, folders without data, and empty or blank files are each named."""
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "blank.txt").write_text(" \n")
    (tmp_path / "table.xyz").write_text("x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(DataError) as caught:
        prepare(settings(tmp_path / "gone.jsonl", tmp_path / "table.xyz", tmp_path / "folder"), tokenizer)
    for part in (
        "3 problems",
        "gone.jsonl: no such file",
        "table.xyz: unknown file extension",
        "folder: contains no .txt, .md",
    ):
        assert part in str(caught.value)
    with pytest.raises(DataError, match=r"empty\.jsonl: the file is empty\n.*blank\.txt: .*only white space"):
        prepare(settings(tmp_path / "empty.jsonl", tmp_path / "blank.txt"), tokenizer)


def test_a_byte_order_mark_and_windows_lines_are_read(tmp_path: Path) -> None:
    """Files written by editors on Windows are read."""
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode() * 2)
    tally = Tally.empty()
    records = list(read_records(survey([str(path)], "auto").sources, tally))
    assert tally.report.total == 0
    assert [record.source.rsplit(":", 1)[1] for record in records] == ["1", "2"]


def test_dropped_rows_and_ignored_fields_are_counted(tokenizer, tmp_path: Path) -> None:
    """Rows longer than max_length are dropped and counted, ignored fields too; if all are too long, it is an error."""
    path = tmp_path / "rows.jsonl"
    long_row = json.dumps({"prompt": "why", "response": "because " * 200, "id": 7})
    path.write_text(GOOD + long_row + "\n")
    prepared = prepare(settings(path), tokenizer)
    assert (prepared.statistics.num_records, prepared.statistics.num_samples, prepared.statistics.num_dropped) == (
        2,
        1,
        1,
    )
    assert prepared.statistics.ignored_fields == {"id": 1}
    path.write_text(long_row + "\n")
    with pytest.raises(DataError, match=r"longer than data\.max_length = 64"):
        prepare(settings(path), tokenizer)


def test_the_fingerprint_covers_bytes_settings_and_template(tokenizer, tmp_path: Path) -> None:
    """The same bytes at another path keep the fingerprint; another byte, length or template changes it."""
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_text(GOOD * 2)
    two.write_text(GOOD * 2)
    first = prepare(settings(one), tokenizer)
    assert prepare(settings(two), tokenizer).fingerprint == first.fingerprint
    two.write_text(GOOD + GOOD.replace("AOG", "AOg"))
    assert prepare(settings(two), tokenizer).fingerprint != first.fingerprint
    assert prepare(settings(one, max_length=32), tokenizer).fingerprint != first.fingerprint
    other = tokenizer_at(BUNDLED_BASE)
    other.chat_template = other.chat_template + " "
    assert prepare(settings(one), other).fingerprint != first.fingerprint


@needs_shared
def test_the_real_glossary_and_reports(tmp_path: Path) -> None:
    """All 105 rows of the real glossary and all 11 real reports are read without a problem."""
    tally = Tally.empty()
    paths = [str(SHARED / "glossary" / "training_dataset.jsonl"), str(SHARED / "wildfire")]
    records = list(read_records(survey(paths, "auto").sources, tally))
    assert (len(records), tally.report.total) == (116, 0)


def test_bad_records_can_be_skipped_and_are_named(tokenizer, tmp_path: Path) -> None:
    """on_error skip keeps good rows and names bad ones; on_error stop does not use its cache."""
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD + "{broken\n" + GOOD.replace("AOG", "ATP") + '{"prompt": "a"}\n')
    skipping = replace(settings(path), on_error="skip")
    statistics = prepare(skipping, tokenizer).statistics
    assert (statistics.num_samples, statistics.num_skipped) == (2, 2)
    assert [line.split(": ")[0].rsplit(":", 1)[1] for line in statistics.skipped] == ["2", "4"]
    with pytest.raises(DataError, match="2 problems"):
        prepare(settings(path), tokenizer)
    path.write_text("{broken\n")
    with pytest.raises(DataError, match="1 problem"):
        prepare(skipping, tokenizer)


@pytest.mark.slow
def test_an_interrupted_preparation_is_made_again(pairs: Path, config: Config) -> None:
    """A run killed before its samples are published leaves no prepared folder, and the next run prepares them."""
    (pairs.parent / "other.jsonl").write_text(GOOD * 3)
    words = arguments(replace(config, data=replace(config.data, path=(str(pairs.parent / "other.jsonl"),))))
    before = {folder for folder in cache_root().glob("*") if not folder.name.startswith(".tmp-")}
    killed = run_command(words, Fault("rename", 1, "before"))
    assert killed.returncode == -signal.SIGKILL
    assert {folder for folder in cache_root().glob("*") if not folder.name.startswith(".tmp-")} == before
    assert run_command(words).returncode == 0


def test_parallel_preparation_gives_the_same_samples(
    tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several processes prepare the same samples in the same order, and name bad rows by their lines."""
    rows = [{"prompt": f"What is {i}?", "response": "It is " + "so " * (i % 50) + f"{i}."} for i in range(1000)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"prompt": "x", "response": 5}\n')
    serial = prepare(replace(settings(path), on_error="skip", max_length=32), tokenizer)
    content = serial.dataset.to_list()
    shutil.rmtree(next(cache_root().glob(f"{serial.fingerprint}-*")))
    monkeypatch.setattr(making, "MIN_PARALLEL_BYTES", 0)
    parallel = prepare(replace(settings(path), on_error="skip", max_length=32), tokenizer)
    assert parallel.dataset.to_list() == content
    assert parallel.statistics == serial.statistics
    assert parallel.statistics.skipped[0].startswith(f"{path}:1001: ")


def mutations(seed: int, count: int) -> Iterator[bytes]:
    """Good rows with random bytes changed, inserted, removed, repeated or cut off."""
    rng = random.Random(seed)
    turns = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}\n'
    for _ in range(count):
        content = bytearray(rng.choice([turns, GOOD]).encode() * 2)
        for _ in range(rng.randint(1, 3)):
            position = rng.randrange(len(content) + 1) - 1 if content else 0
            kind = rng.randrange(5)
            if kind == 0 and content:
                content[position] = rng.randrange(rng.choice([128, 256]))
            elif kind == 1:
                content[position:position] = rng.choice(
                    [b'"', b"{", b"}", b"\\u0000", b"\\ud800", b"\x00", b"\xff", b"\n"]
                )
            elif kind == 2:
                del content[position : position + rng.randint(1, 9)]
            elif kind == 3:
                content += content[position:]
            else:
                del content[position:]
        yield bytes(content)


def test_two_hundred_mutations_are_read_or_refused(tokenizer, tmp_path: Path) -> None:
    """Any bytes give samples, or a DataError that names the file; never another exception."""
    path = tmp_path / "mutant.jsonl"
    refusals = []
    for content in mutations(seed=5, count=200):
        path.write_bytes(content)
        try:
            assert prepare(settings(path), tokenizer).statistics.num_samples > 0
        except DataError as error:
            refusals.append(str(error))
    assert 50 < len(refusals) < 200
    assert all("mutant.jsonl" in refusal or "longer than" in refusal for refusal in refusals)


def test_what_a_fingerprint_covers_is_told_apart_and_stays_small(tokenizer, tmp_path: Path) -> None:
    """One short hash a path however many files are in it, and one for all paths behind the hundredth."""
    folder, row = tmp_path / "many", '{"prompt": "What is %d?", "response": "A number."}\n'
    folder.mkdir()
    for number in range(150):
        (folder / f"{number}.jsonl").write_text(row % number)
    first = prepare(settings(folder), tokenizer).parts
    assert len(first["content"]) == 1
    (folder / "7.jsonl").write_text(row % 1007)
    second = prepare(settings(folder), tokenizer).parts
    assert {name for name in first if first[name] != second[name]} == {"content"}
    other = tokenizer_at(BUNDLED_BASE)
    other.chat_template += " "
    assert {name for name in first if prepare(settings(folder), other).parts[name] != second[name]} == {"chat template"}
    each = PrepareSettings(tuple(str(folder / f"{number}.jsonl") for number in range(150)))
    named = prepare(each, tokenizer).parts["content"]
    assert [name for name, _ in named[99:]] == [str(folder / "99.jsonl"), "50 more paths"]
    (folder / "149.jsonl").write_text(row % 2149)
    changed = prepare(each, tokenizer).parts["content"]
    assert [a == b for a, b in zip(named, changed, strict=True)] == [True] * 100 + [False]

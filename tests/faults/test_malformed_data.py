"""Malformed data is refused by file, line and reason, in bounded time and memory."""

import csv
import io
import json
import os
import random
import re
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_tools.prepare import PrepareSettings, prepare
from data_tools.report import DataError
from tests.conftest import tokenizer_at
from tests.tally import Tally
from train.commands.handloop import main as command
from train.run.exits import ExitCode

GOOD = '{"prompt": "What is AOG?", "response": "Aircraft on ground."}\n'
TURNS = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]}\n'
LAST = "the last line truncated"


def turns(*entries: object) -> str:
    """A row of messages."""
    return json.dumps({"messages": list(entries)}) + "\n"


def turn(role: str, content: object = "text", **more: object) -> dict[str, object]:
    """One message."""
    return {"role": role, "content": content, **more}


# name -> (third line of a file with good lines, expected reason; empty if the line is good)
CASES: dict[str, tuple[bytes, str]] = {
    "invalid UTF-8": (b'{"prompt": "\xff", "response": "b"}\n', "not UTF-8 .byte 13 of the line"),
    "byte order mark inside": (b"\xef\xbb\xbf" + GOOD.encode(), "not JSON"),
    "Windows line end": (GOOD.replace("\n", "\r\n").encode(), ""),
    LAST: (GOOD[:30].encode(), "not JSON: .* at column"),
    "blank": (b" \t\n", ""),
    "NUL": (b"\x00" + GOOD.encode(), "not JSON"),
    "a line of 50 MB": (b'{"prompt": "' + b"x" * 50_000_000 + b'"}\n', "the line is longer than"),
    "nested 10,000 deep": (b"[" * 10_000 + b"]" * 10_000 + b"\n", "nested too deeply"),
    "a field twice": (b'{"prompt": "a", "prompt": "b", "response": "c"}\n', "the field 'prompt' appears twice"),
    "NaN": (b'{"prompt": "a", "response": NaN}\n', "NaN is not JSON"),
    "a wrong type": (b'{"prompt": {"a": 1}, "response": "b"}\n', "'prompt' must be a string, not dict"),
    "a missing field": (b'{"prompt": "a"}\n', "no field 'response'"),
    "half a surrogate pair": (b'{"prompt": "\\ud800", "response": "b"}\n', "half of a surrogate pair"),
    "an integer of 5,000 digits": (b'{"prompt": ' + b"1" * 5000 + b"}\n", "Exceeds the limit"),
}
# The same for files of messages.
MESSAGES: dict[str, tuple[bytes, str]] = {
    "no messages": (turns().encode(), "a list of at least one turn"),
    "an unknown role": (turns(turn("root"), turn("assistant")).encode(), "turn 1: unknown role 'root'"),
    "all masked": (turns(turn("user"), turn("assistant", train=False)).encode(), "has no assistant turn to train"),
    "special tokens": (turns(turn("user", "<|end|><|assistant|>"), turn("assistant")).encode(), ""),
}


def tell(*words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit code and the output of a `handloop` command."""
    code = command([*words, "--profile", "demo", "--data.max_length", "256", "--data.validation_fraction", "0"])
    return code, "".join(capsys.readouterr())


@pytest.mark.fault("T21")
def test_malformed_lines(tally: Tally, caught: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A malformed line is exit 78 with file, line and reason, or skipped and counted; good lines are read."""
    assert len(CASES) + len(MESSAGES) == 18
    for number, (name, (row, reason)) in enumerate([*CASES.items(), *MESSAGES.items()]):
        good = GOOD if name in CASES else TURNS
        path = caught / f"{number}.jsonl"
        path.write_bytes(good.encode() * 2 + row + good.encode() * (name != LAST))
        began = time.monotonic()
        code, said = tell("preview", "--data.path", str(path), capsys=capsys)
        wanted = re.search(rf"^{re.escape(str(path))}:3: .*{reason}", said, re.MULTILINE)
        stopped = (code == ExitCode.BAD_INPUT and "1 problem " in said and wanted) if reason else code == 0
        settings = PrepareSettings((str(path),), max_length=256, on_error="skip")
        statistics = prepare(settings, tokenizer_at()).statistics
        num_good = 2 if name == LAST else 3 if reason or name == "blank" else 4
        skipped = (statistics.num_samples, statistics.num_skipped) == (num_good, int(bool(reason)))
        tally.check(stopped and skipped and time.monotonic() - began < 10, f"{name}: {code} {said[-200:]} {statistics}")
    (caught / "empty.jsonl").touch()
    code, said = tell("preview", "--data.path", str(caught / "empty.jsonl"), capsys=capsys)
    tally.check(code == ExitCode.BAD_INPUT and "empty.jsonl: the file is empty" in said, f"an empty file: {said}")


def parquet(**columns: object) -> bytes:
    """A Parquet file with one good row and these additional columns."""
    buffer = io.BytesIO()
    pq.write_table(pa.table({"prompt": ["a"], "response": ["b"], **columns}), buffer)
    return buffer.getvalue()


NOT_TEXT = pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff\xfe"]).buffers())
# name -> (extension, content, expected reason)
TABLES: dict[str, tuple[str, bytes, str]] = {
    "not UTF-8 at once": (".json", b"\xff[]", ":1: not UTF-8 .byte 1 of line 1"),
    "not UTF-8 later": (".json", b'[{"prompt": "a", "response": "\xff"}]', ":1: not UTF-8 .byte 31 of line 1"),
    "not an array": (".json", b"{}", ": expected a JSON array of objects"),
    "an array cut off": (".json", b'[{"prompt": "a", "response": "b"}', ":1: not JSON: expected ',' or ']'"),
    "another type in an array": (".json", b"[7]", ":1: expected a JSON object, not int"),
    "nested 10,000 deep": (".json", b"[" * 10_000, ":1: nested too deeply"),
    "a cell too many": (".csv", b"prompt,response\na,b,c\n", ":2: expected 2 columns"),
    "an open quote": (".csv", b'prompt,response\na,"b\n', ":2: not CSV: unexpected end of data"),
    "a column not UTF-8": (".csv", b"prompt,\xff\na,b\n", ":1: not UTF-8 .byte 8 of the line"),
    "no Parquet": (".parquet", b"PAR1" * 9, ": not Parquet"),
    "Parquet cut off": (".parquet", parquet()[:-9], ": not Parquet"),
    "text not UTF-8": (".parquet", parquet(note=NOT_TEXT), ":1: unreadable value near here: 'utf-8'"),
    "year 38,000": (
        ".parquet",
        parquet(when=pa.array([2**60], pa.timestamp("us"))),
        ":1: unreadable value",
    ),
}


@pytest.mark.fault("T21")
def test_malformed_tables(tally: Tally, caught: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Malformed JSON arrays, CSV and Parquet are exit 78 with file, row and reason."""
    for number, (name, (ending, content, reason)) in enumerate(TABLES.items()):
        path = caught / f"{number}{ending}"
        path.write_bytes(content)
        code, said = tell("preview", "--data.path", str(path), capsys=capsys)
        wanted = re.search(rf"^{re.escape(str(path))}{reason}", said, re.MULTILINE)
        tally.check(code == ExitCode.BAD_INPUT and wanted, f"{name}: {code} {said[-300:]}")


def mutate(rng: random.Random, content: bytes) -> bytes:
    """Makes one to four changes: sets, removes, repeats or moves bytes, or inserts difficult pieces."""
    pieces = [bytes([byte]) for byte in b'"{}[],-\n\x00\xff']
    pieces += [b"\\u0000", b"\\ud800", b"1e999", b"null"]
    changed = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at, length = rng.randrange(len(changed) + 1), rng.randint(1, 12)
        kind = rng.choice(("set", "put", "cut", "double", "move", "end"))
        if kind == "set" and at < len(changed):
            changed[at] = rng.randrange(256)
        elif kind == "put":
            changed[at:at] = rng.choice(pieces)
        elif kind == "cut":
            del changed[at : at + length]
        elif kind == "double":
            changed[at:at] = changed[at : at + 10 * length]
        elif kind == "move":
            part = changed[at : at + length]
            del changed[at : at + length]
            where = rng.randrange(len(changed) + 1)
            changed[where:where] = part
        elif kind == "end" and rng.random() < 0.3:
            del changed[at:]
    return bytes(changed)


def table(ending: str) -> bytes:
    """Three good rows as a file of this kind."""
    rows = [{"prompt": f"What is {n}?", "response": f"It is \u00fc{n}."} for n in range(3)]
    if ending == ".parquet":
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows), buffer)
        return buffer.getvalue()
    if ending == ".csv":
        text = io.StringIO()
        writer = csv.DictWriter(text, ["prompt", "response"])
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode()
    return json.dumps(rows).encode() if ending == ".json" else "".join(json.dumps(row) + "\n" for row in rows).encode()


def read_or_refuse(path: Path, tokenizer: Any) -> str:
    """How reading this file, with on_error stop and skip, breaks a promise; empty if it breaks none."""
    settings = PrepareSettings((str(path),), max_length=64)
    try:
        stopped = prepare(settings, tokenizer).statistics
    except DataError as error:
        lines = str(error).splitlines()
        listed = [line for line in lines[1:] if not line.startswith("... and ")]
        if not (all(line.startswith(str(path)) for line in listed) and (listed or "longer than" in lines[0])):
            return f"said {error}"
        stopped = None
    try:
        skipped = prepare(replace(settings, on_error="skip"), tokenizer).statistics
    except DataError:
        return "" if stopped is None else "read by stop and refused by skip"
    if stopped is None:
        return "" if skipped.num_skipped and skipped.num_samples else f"refused by stop, read by skip: {skipped}"
    return "" if (skipped.num_skipped, skipped.num_samples) == (0, stopped.num_samples) else f"{stopped} {skipped}"


@pytest.mark.fault("T21")
@pytest.mark.parametrize("ending", [".jsonl", ".json", ".csv", ".parquet"])
def test_random_mutations(ending: str, tally: Tally, caught: Path, tokenizer: Any) -> None:
    """Any bytes give samples, or a DataError with the file's name; stop and skip agree on what is good."""
    num_tries = tally.times(200, 2000) if ending == ".jsonl" else tally.times(40, 400)
    first_seed, whole = 20_000, table(ending)
    path = caught / f"mutant{ending}"
    for seed in range(first_seed, first_seed + num_tries):
        content = mutate(random.Random(seed), whole if seed % 2 or ending != ".jsonl" else TURNS.encode() * 2)
        path.write_bytes(content)
        try:
            wrong = read_or_refuse(path, tokenizer)
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
        tally.check(not wrong, f"seed {seed}, {content[:200]!r}: {wrong}")


def in_a_child(work: Callable[[], object], more_bytes: int, seconds: int) -> str:
    """The exception of `work` in a fork with limited memory and time; empty if it raises none."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        signal.alarm(seconds)
        mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + more_bytes, mapped + more_bytes))
        said = ""
        try:
            work()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        os.write(writing, said.encode(errors="replace")[:4000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    status = os.waitpid(child, 0)[1]
    return said if status == 0 else f"ended with status {status}"


def endless(path: Path, beginning: bytes, size: int) -> Path:
    """Writes a sparse file: `beginning`, then zeros without a newline."""
    with path.open("wb") as file:
        file.write(beginning)
        file.truncate(size)
    return path


@pytest.mark.fault("T21")
def test_memory_and_time_are_bounded(tally: Tally, tmp_path: Path) -> None:
    """A line, an entry or a cell of half a gigabyte is refused within 128 MiB of memory and 60 seconds."""
    size = 2**29
    beginnings = {
        ".jsonl": GOOD.encode() + b'{"prompt": "',
        ".json": b'[{"prompt": "',
        ".csv": b'prompt,response\n"a',
    }
    for ending, beginning in beginnings.items():
        path = endless(tmp_path / f"large{ending}", beginning, size)
        source = PrepareSettings((str(path),)).survey().sources[0]

        def read(origin: Any = source.origin) -> None:
            problems: list[str] = []
            list(origin.rows(lambda place, reason: problems.append(f"{place}: {reason}")))
            raise DataError("; ".join(problems))

        said = in_a_child(read, 2**27, 60)
        tally.check(re.match(rf"DataError: {path}(:\d+)?: ", said), f"{ending}: {said[:300]}")
    control = in_a_child(lambda: bytes(2**28), 2**27, 60)
    tally.check(control.startswith("MemoryError"), f"the limit itself: {control}")

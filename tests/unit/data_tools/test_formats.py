"""Every data format and every kind of file gives the same conversations; problems are named with their places."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from data_tools import data_sets, readers
from data_tools.formats import MAPPED
from data_tools.messages import Message
from data_tools.records import Conversation, Document, Tally, read_records
from data_tools.report import DataError
from data_tools.sources import survey
from tests.conftest import SHARED, needs_shared

ASKED = (Message("user", "What is AOG?"), Message("assistant", "Aircraft on ground.", train=True))
BRIEF = Message("system", "Be brief.")
TURNS = [{"role": "user", "content": "What is AOG?"}, {"role": "assistant", "content": "Aircraft on ground."}]
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"term": "AOG"}}}

FORMATS: dict[str, tuple[dict[str, Any], tuple[Message, ...], str]] = {
    "prompt/response": ({"prompt": "What is AOG?", "response": "Aircraft on ground."}, ASKED, "prompt_response"),
    "prompt/completion": ({"prompt": "What is AOG?", "completion": "Aircraft on ground."}, ASKED, "prompt_response"),
    "question/answer": ({"question": "What is AOG?", "answer": "Aircraft on ground."}, ASKED, "prompt_response"),
    "messages": ({"messages": TURNS}, ASKED, "messages"),
    "messages with system": (
        {"messages": [{"role": "system", "content": "Be brief."}, *TURNS]},
        (BRIEF, *ASKED),
        "messages",
    ),
    "text parts": (
        {"messages": [TURNS[0], {"role": "assistant", "content": [{"type": "text", "text": "Aircraft on ground."}]}]},
        ASKED,
        "messages",
    ),
    "alpaca": ({"instruction": "What is AOG?", "input": "", "output": "Aircraft on ground."}, ASKED, "alpaca"),
    "alpaca with input": (
        {"instruction": "Explain.", "input": "AOG", "output": "Aircraft on ground."},
        (Message("user", "Explain.\n\nAOG"), ASKED[1]),
        "alpaca",
    ),
    "sharegpt": (
        {
            "system": "Be brief.",
            "conversations": [
                {"from": "human", "value": "What is AOG?"},
                {"from": "gpt", "value": "Aircraft on ground."},
            ],
        },
        (BRIEF, *ASKED),
        "sharegpt",
    ),
}


def read(*paths: Path | str, data_format: str = "auto", fields: tuple[str, ...] = ()) -> tuple[list[Any], Tally]:
    tally = Tally.empty()
    return list(read_records(survey(list(map(str, paths)), data_format, fields).sources, tally)), tally


@pytest.mark.parametrize("name", FORMATS)
def test_layouts_are_recognised_by_their_fields(name: str, tmp_path: Path) -> None:
    """The same question and answer in every layout; the format is detected, and may be demanded."""
    row, turns, layout = FORMATS[name]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    for wanted in ("auto", layout):
        records, tally = read(path, data_format=wanted)
        assert tally.report.lines == []
        assert records == [Conversation(f"{path}:1", turns)]
        assert tally.formats == {layout}
        assert not tally.ignored_fields


def test_every_kind_of_file_gives_the_same_records(tmp_path: Path) -> None:
    """JSONL, a JSON array, CSV with line breaks in a field, Parquet: equal conversations, each with its place."""
    rows = [{"prompt": f"What is {i}?", "response": f'Line one,\n"two" of {i}.'} for i in range(700)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1))
    text = io.StringIO()
    writer = csv.DictWriter(text, ["prompt", "response"])
    writer.writeheader()
    writer.writerows(rows)
    (tmp_path / "c.csv").write_text(text.getvalue())
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    contents = []
    for name in ("a.jsonl", "b.json", "c.csv", "d.parquet"):
        records, tally = read(tmp_path / name)
        assert tally.report.lines == []
        assert records[1].source.startswith(f"{tmp_path / name}:")
        contents.append([record.messages for record in records])
    assert len(contents[0]) == 700
    assert contents[0] == contents[1] == contents[2] == contents[3]


def test_a_text_column_is_documents(tmp_path: Path) -> None:
    """Rows with a single text field become documents."""
    (tmp_path / "t.jsonl").write_text('{"text": "A report."}\n')
    records, tally = read(tmp_path / "t.jsonl")
    assert records == [Document(f"{tmp_path / 't.jsonl'}:1", "A report.")]
    assert tally.formats == {"text"}


def test_columns_can_be_named(tmp_path: Path) -> None:
    """--data.fields prompt=q response=a reads these columns; a column that is ignored is counted."""
    (tmp_path / "r.jsonl").write_text('{"q": "What is AOG?", "a": "Aircraft on ground.", "id": 1}\n')
    with pytest.raises(AssertionError):
        assert read(tmp_path / "r.jsonl")[0]
    records, tally = read(tmp_path / "r.jsonl", fields=("prompt=q", "response=a"))
    assert records[0].messages == ASKED
    assert dict(tally.ignored_fields) == {"id": 1}
    (tmp_path / "usual.jsonl").write_text('{"prompt": "What is AOG?", "response": "Aircraft on ground."}\n')
    both, tally = read(tmp_path / "r.jsonl", tmp_path / "usual.jsonl", fields=("prompt=q", "response=a"))
    assert [record.messages for record in both] == [ASKED, ASKED]
    assert tally.formats == {MAPPED, "prompt_response"}


def test_turns_can_be_left_untrained(tmp_path: Path) -> None:
    """train: false and weight: 0 mask a turn; tool calls and tool answers are kept."""
    turns = [
        TURNS[0],
        {"role": "assistant", "content": "Hm.", "train": False},
        {"role": "user", "content": "Well?"},
        {"role": "assistant", "content": "No.", "weight": 0},
        {"role": "user", "content": "Look it up."},
        {"role": "assistant", "content": None, "tool_calls": [CALL], "weight": 1},
        {"role": "tool", "content": "Aircraft on ground.", "name": "look_up"},
        {"role": "assistant", "content": "Aircraft on ground."},
    ]
    (tmp_path / "m.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    (record,), tally = read(tmp_path / "m.jsonl")
    assert tally.report.lines == []
    assert [turn.train for turn in record.messages] == [False] * 5 + [True, False, True]
    assert record.messages[5] == Message("assistant", train=True, tool_calls=(CALL,))
    assert record.messages[6] == Message("tool", "Aircraft on ground.", name="look_up")


BAD_MESSAGES: list[tuple[Any, str]] = [
    ([], "must be a list of at least one turn"),
    ("hello", "must be a list of at least"),
    (["hello"], "turn 1: expected an object with role and content, not str"),
    ([{"role": "robot", "content": "x"}], "turn 1: unknown role 'robot'; known: "),
    ([{"role": None, "content": "x"}], "turn 1: unknown role None"),
    ([TURNS[0]], "has no assistant turn to train"),
    ([TURNS[0], {"role": "assistant", "content": " "}], "turn 2: the content is empty"),
    ([TURNS[0], {"role": "assistant", "content": 7}], "turn 2: the content must be a string, not int"),
    ([TURNS[0], {**TURNS[1], "weight": 0.5}], "turn 2: 'weight' must be 0 or 1, not 0.5"),
    ([TURNS[0], {**TURNS[1], "train": "no"}], "turn 2: 'train' must be true or false, not 'no'"),
    ([{**TURNS[0], "train": True}, TURNS[1]], "turn 1: a user turn cannot be trained"),
    ([TURNS[0], {**TURNS[1], "train": False}], "has no assistant turn to train"),
    ([TURNS[0], {"role": "assistant", "content": "\ud83d"}], "turn 2: character 0 is half of a surrogate pair"),
]


@pytest.mark.parametrize(("messages", "reason"), BAD_MESSAGES, ids=[reason[:40] for _, reason in BAD_MESSAGES])
def test_bad_conversations_are_named_by_line_and_turn(messages: Any, reason: str, tmp_path: Path) -> None:
    """The problem has line, turn and reason; the good row after it is still read."""
    good = json.dumps({"messages": TURNS})
    (tmp_path / "m.jsonl").write_text(f"{good}\n{json.dumps({'messages': messages})}\n{good}\n")
    records, tally = read(tmp_path / "m.jsonl")
    assert len(records) == 2
    assert tally.report.total == 1
    assert tally.report.lines[0].startswith(f"{tmp_path / 'm.jsonl'}:2: ")
    assert reason in tally.report.lines[0]


BAD_FILES = [
    ("a.json", '{"prompt": "a"}', ": expected a JSON array of objects"),
    ("b.json", '[{"prompt": "a", "response": "b"}, {"prompt": ', ":2: not JSON: "),
    ("c.json", '[{"prompt": "a", "response": "b"} {"prompt"', ":1: not JSON: expected ',' or ']'"),
    ("d.csv", "prompt,response\na\n", ":2: expected 2 columns"),
    ("e.csv", 'prompt,response\na,"b\n', ":2: not CSV"),
    ("f.parquet", "PAR1 not really", ": not Parquet"),
    ("g.jsonl", '{"prompt": "a", "response": "b", "prompt": "c"}\n', ":1: the field 'prompt' appears twice"),
    ("h.jsonl", '{"prompt": "a\x00", "response": "b"}\n', ":1: not JSON: Invalid control character"),
    ("i.jsonl", '{"question": "a", "answer": null}\n', ":1: 'answer' is null; there is nothing to train"),
    ("i.jsonl", '{"prompt": "a", "response": "b"}\n{"text": "c"}\n', ":2: no field 'prompt' and no field 'response'"),
]


@pytest.mark.parametrize(("name", "content", "reason"), BAD_FILES, ids=[name for name, _, _ in BAD_FILES])
def test_bad_files_are_named_by_place(name: str, content: str, reason: str, tmp_path: Path) -> None:
    """Whatever is wrong with a file of any kind, the problem has its place."""
    (tmp_path / name).write_text(content)
    _, tally = read(tmp_path / name)
    assert tally.report.total >= 1
    assert f"{tmp_path / name}{reason}" in tally.report.lines[0]


def test_a_line_of_fifty_megabytes_is_skipped(tmp_path: Path) -> None:
    """It is named, never held in memory as a whole, and the row after it is read."""
    path = tmp_path / "long.jsonl"
    good = '{"prompt": "a", "response": "b"}\n'
    path.write_text(good + '{"prompt": "' + "x" * 50_000_000 + '"}\n' + good)
    records, tally = read(path)
    assert len(records) == 2
    assert tally.report.lines == [f"{path}:2: the line is longer than {readers.MAX_ROW_BYTES} bytes"]


def test_folders_and_globs(tmp_path: Path) -> None:
    """Folders and globs are read in name order; a folder with both text and row files is refused."""
    for name in ("b.txt", "a.md", "sub/c.txt", "ignored.pdf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    records, _ = read(tmp_path)
    assert [record.text for record in records] == ["a.md", "b.txt", "sub/c.txt"]
    assert [record.text for record in read(tmp_path / "*.txt")[0]] == ["b.txt"]
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    with pytest.raises(DataError, match="contains both text and row files"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"no \.txt.* file matches"):
        read(tmp_path / "*.xyz")


def test_hub_data_sets_go_through_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    """owner/name:split is loaded by the datasets library; one that cannot be loaded is a problem with its name."""
    asked = []

    def load(name: str, split: str) -> datasets.Dataset:
        asked.append((name, split))
        return datasets.Dataset.from_list([{"question": "What is AOG?", "answer": "Aircraft on ground."}])

    monkeypatch.setattr(data_sets.datasets, "load_dataset", load)
    records, _ = read("somebody/glossary:validation", "somebody/glossary")
    assert [record.messages for record in records] == [ASKED, ASKED]
    assert [record.path_number for record in records] == [0, 1]
    assert set(asked) == {("somebody/glossary", "validation"), ("somebody/glossary", "train")}

    def refuse(name: str, split: str) -> None:
        raise ConnectionError("the hub cannot be reached")

    monkeypatch.setattr(data_sets.datasets, "load_dataset", refuse)
    _, tally = read("somebody/nothing")
    assert tally.report.lines == [
        f"somebody/nothing: no such file or folder; looked for {Path('somebody/nothing').absolute()}, "
        "and the hub data set cannot be loaded: the hub cannot be reached"
    ]


@needs_shared
def test_real_data_sets_of_three_kinds() -> None:
    """Every row of GSM8K, of Alpaca records and of the glossary is read in the right format."""
    for path, data_format, count in (
        ("gsm8k/train_2000.jsonl", "prompt_response", 2000),
        ("instruct_alpaca_800.json", "alpaca", 800),
        ("glossary/training_dataset.jsonl", "prompt_response", 105),
    ):
        records, tally = read(SHARED / path)
        assert tally.formats == {data_format}
        assert (len(records), tally.report.total) == (count, 0)

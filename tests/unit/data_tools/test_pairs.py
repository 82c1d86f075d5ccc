"""Single rows that other trainers' data has: read as what they are, or refused with what to do."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from data_tools.formats import detect
from data_tools.messages import Message
from data_tools.records import Conversation, Document, Tally, read_records
from data_tools.sources import survey
from tests.unit.data_tools.jinja import THINKS, WHOLE, answer, marked, rendered, user

TURNS = [{"role": "user", "content": "Which term?"}]
SAID = [{"role": "assistant", "content": "AOG."}]
OURS = (Message("user", "Which term?"), Message("assistant", "AOG.", train=True))


def read(row: dict[str, Any]) -> tuple[Message, ...]:
    found = detect(row, "auto", {}).read(row)
    assert not isinstance(found, str)
    return found.messages


def records(path: Path) -> list[Conversation | Document]:
    tally = Tally.empty()
    found = list(read_records(survey([str(path)], "auto").sources, tally))
    assert tally.report.total == 0, tally.report.lines
    return found


@pytest.mark.parametrize("response", ["AOG.", SAID, json.dumps(SAID), json.dumps(SAID[0])])
@pytest.mark.parametrize("prompt", [TURNS, json.dumps(TURNS), json.dumps(TURNS[0])])
def test_turns_as_text_on_either_side(prompt: Any, response: Any) -> None:
    """A list, JSON text of one, or a single turn as JSON text; and an answer of text."""
    assert read({"prompt": prompt, "response": response}) == OURS


MAILS = '[{"from": "a@b.org", "to": "c", "content": "x"}]'


@pytest.mark.parametrize(
    "prompt", [MAILS, MAILS[1:-1], '{"value": 5}', '[{"name": "Bob", "role": "engineer"}]', "[1, 2]", "{not JSON"]
)
def test_json_of_other_things_is_text(prompt: str) -> None:
    """Also an answer about turns, behind a question of text."""
    assert read({"prompt": prompt, "response": "b"})[0] == Message("user", prompt)
    assert read({"prompt": "Write turns.", "response": json.dumps(TURNS)})[1].content == json.dumps(TURNS)


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"prompt": str(TURNS), "response": str(SAID)},
        "'prompt' is a list of turns as Python prints it; write it as JSON",
    ),
    ({"prompt": str(TURNS * 2).replace("}, {", "}\n {"), "response": "b"}, "as Python prints it"),
    ({"prompt": json.dumps([*TURNS, {"role": "Alice", "content": "x"}]), "response": "b"}, "unknown role 'Alice'"),
    ({"prompt": [], "response": "b"}, "'prompt' is an empty list; there is nothing to train"),
    ({"prompt": "a", "completion": "b", "label": False}, "an answer that was not wanted .KTO.*--data.on_error skip"),
    ({"chosen": SAID, "rejected": SAID}, "a row of preferences.*rename that column to 'messages'$"),
    (
        {"question": "a", "chosen": "b", "rejected": "c"},
        "write --data.fields prompt=question response=chosen",
    ),
    ({"prompt": TURNS, "response": "b", "history": [["c", "d"]]}, "earlier turns in 'history' and others in 'prompt'"),
]


@pytest.mark.parametrize(("row", "reason"), REFUSED, ids=[reason[:40] for _, reason in REFUSED])
def test_what_is_refused(row: dict[str, Any], reason: str) -> None:
    """With what to do."""
    with pytest.raises(ValueError, match=reason):
        read(row)


def test_what_other_columns_say_of_a_pair() -> None:
    """Earlier turns are read beside any pair; a wanted answer of a KTO row is trained."""
    said = [Message("user", "c"), Message("assistant", "d", train=True)]
    assert read({"prompt": "a", "response": "b", "history": [["c", "d"]]})[:2] == tuple(said)
    assert read({"prompt": "a", "completion": "b", "label": True})[1].content == "b"


def test_a_row_is_read_in_the_most_specific_format_that_it_has(tmp_path: Path) -> None:
    """Whatever the first row of the file was; one that has less than the first is refused, as before."""
    rows = [
        {"input": "i", "output": "o"},
        {"instruction": "Translate.", "input": "i", "output": "o"},
        {"messages": [*TURNS, *SAID], "input": "i", "output": "o"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    contents = [[m.content for m in each.messages] for each in records(path) if isinstance(each, Conversation)]
    assert contents == [["i", "o"], ["Translate.\n\ni", "o"], ["Which term?", "AOG."]]
    path.write_text(json.dumps({"messages": [], "text": "t"}) + "\n" + json.dumps({"messages": [*TURNS, *SAID]}) + "\n")
    first, second = records(path)
    assert isinstance(first, Document)
    assert isinstance(second, Conversation)


def test_a_map_is_an_object(tmp_path: Path) -> None:
    """Arrow's maps, which Python has as lists of pairs, in a tool's definition."""
    fields = pyarrow.map_(pyarrow.string(), pyarrow.struct([("type", pyarrow.string())]))
    tool = pyarrow.struct([("name", pyarrow.string()), ("parameters", pyarrow.struct([("properties", fields)]))])
    tools = [[{"name": "f", "parameters": {"properties": [("x", {"type": "string"})]}}]]
    table = pyarrow.table({"messages": [[*TURNS, *SAID]], "tools": pyarrow.array(tools, pyarrow.list_(tool))})
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(table, path)
    (record,) = records(path)
    assert isinstance(record, Conversation)
    assert record.tools[0]["function"]["parameters"] == {"properties": {"x": {"type": "string"}}}


def test_a_thought_that_begins_a_content() -> None:
    """It goes where the template has reasoning; an empty one is none; two that differ are refused."""
    (sample,) = rendered(WHOLE, user("a"), answer("<think>\nR\n</think>\n\nb")).samples
    assert "⟦[R]\nb<|end|>⟧" in marked(sample)
    (sample,) = rendered(THINKS, user("a"), answer("<think>\n\n</think>\n\nb")).samples
    assert sample == rendered(THINKS, user("a"), answer("b")).samples[0]
    with pytest.raises(ValueError, match="turn 2: it has two different reasonings, one of them in its content"):
        rendered(THINKS, user("a"), answer("<think>x</think>b", reasoning="y"))

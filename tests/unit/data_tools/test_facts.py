"""What is kept of records: what is odd about a text or the order of turns, and which are equal."""

from pathlib import Path

import pytest

from data_tools.facts import CONTROL, MOJIBAKE, role_problem, turn_problem
from data_tools.messages import Message
from tests.unit.data_tools.rows import write
from tests.unit.data_tools.test_audit import audit_of, found


@pytest.mark.parametrize("codec", ["cp1252", "latin-1"])
@pytest.mark.parametrize(
    "text", ["é", "für", "naïve", "it\u2019s", "“quoted”", "5 €", "a \u2013 b", "🎉", "привет", "20 °C"]
)
def test_mojibake_is_recognised(text: str, codec: str) -> None:
    """UTF-8 that was decoded with the wrong codec."""
    garbled = text.encode().decode(codec, "replace")
    assert MOJIBAKE.search(garbled), garbled


@pytest.mark.parametrize(
    "text",
    [
        "São João, «IRMû», “AMANHÔ",
        "« CAFÉ » «CAFÉ»",
        "Ångström Ñandú â",
        "ÐÑ русский",
        "日本語 🎉 naïve 20 °C \u2013 €5",
    ],
)
def test_good_text_is_not_garbage(text: str) -> None:
    """Accents, capitals before closing quotes, other scripts and emoji are no finding."""
    assert not MOJIBAKE.search(text)
    assert not CONTROL.search(text)
    assert not CONTROL.search("tab\t line\r\n")


@pytest.mark.parametrize(
    ("roles", "problem"),
    [
        ("system user assistant", ""),
        ("user assistant tool tool assistant user assistant", ""),
        ("assistant user", "begins with assistant"),
        ("system", "nothing follows the system turn"),
        ("user user assistant", "user after user"),
        ("user system assistant", "system after user"),
        ("user assistant assistant", "assistant after assistant"),
        ("user assistant user", "ends with user"),
    ],
)
def test_order_of_roles(roles: str, problem: str) -> None:
    """System comes first if at all, user and assistant alternate, tools follow the assistant, which comes last."""
    assert role_problem(roles.split()) == problem


def test_rows_with_other_flags_are_no_exact_repeats(tmp_path: Path) -> None:
    """The same turns, of which another is trained: named as what they are, and on one side of a split."""
    turns = [{"role": role, "content": text} for role, text in (("user", "a"), ("assistant", "b")) * 2]
    rows = [{"messages": [*turns[:3], {**turns[3], "train": flag}]} for flag in (True, False)]
    path = write(tmp_path / "rows.jsonl", rows)
    assert found(audit_of(path)) == {"normalised_duplicates": 1}
    folder = tmp_path / "x:y"
    folder.mkdir()
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text("A report.")
    assert audit_of(str(folder)).findings["duplicates"].places == [f"{folder / 'b.txt'} (like {folder / 'a.txt'})"]


def test_a_call_without_a_result_is_named() -> None:
    """By its id, else by its function; at the end of a conversation it is what was to be trained."""
    named, nameless = (({**kind, "function": {"name": "look_up", "arguments": {}}},) for kind in ({"id": "call_7"}, {}))
    user, answer, result = Message("user", "a"), Message("assistant", "b"), Message("tool", "c")
    for calls, name in ((named, "call_7"), (nameless, "look_up")):
        call = Message("assistant", "", tool_calls=calls)
        assert turn_problem([user, call, answer]) == f"tool call {name} of turn 2 has no result"
        assert turn_problem([user, call, result, answer]) == turn_problem([user, call]) == ""

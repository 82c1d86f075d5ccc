"""Turns in every spelling that trainers use become ours, or are refused by name."""

from typing import Any

import pytest

from data_tools.formats import RowConversation, detect
from data_tools.messages import Message, message_of, turns_of

ASKED = {"role": "user", "content": "Which term?"}
ANSWERED = {"role": "assistant", "content": "AOG."}
OURS = (Message("user", "Which term?"), Message("assistant", "AOG.", train=True))


def read(row: dict[str, Any]) -> RowConversation:
    found = detect(row, "auto", {}).read(row)
    assert isinstance(found, RowConversation)
    return found


SPELLINGS: dict[str, tuple[dict[str, Any], Message]] = {
    "parts": ({"role": "assistant", "content": [{"type": "text", "text": "A"}, {"text": "OG."}]}, OURS[1]),
    "strings as parts": ({"role": "assistant", "content": ["A", "OG."]}, OURS[1]),
    "from and value": ({"from": "gpt", "value": "AOG."}, OURS[1]),
    "filled in by Arrow": (
        {**ANSWERED, "tool_calls": None, "name": None, "reasoning_content": "", "train": None, "weight": None},
        OURS[1],
    ),
    "empty lists": ({**ANSWERED, "tool_calls": [], "images": []}, OURS[1]),
    "reasoning_content": (
        {**ANSWERED, "reasoning_content": "Short."},
        Message("assistant", "AOG.", True, reasoning="Short."),
    ),
    "reasoning": ({**ANSWERED, "reasoning": "Short."}, Message("assistant", "AOG.", True, reasoning="Short.")),
    "thinking": ({**ANSWERED, "thinking": "Short."}, Message("assistant", "AOG.", True, reasoning="Short.")),
    "the same reasoning under two names": (
        {**ANSWERED, "thinking": "Short.", "reasoning": "Short."},
        Message("assistant", "AOG.", True, reasoning="Short."),
    ),
    "reasoning as a part": (
        {
            "role": "assistant",
            "content": [{"type": "thinking", "thinking": "Short."}, {"type": "text", "text": "AOG."}],
        },
        Message("assistant", "AOG.", True, reasoning="Short."),
    ),
    "another key": ({**ANSWERED, "mood": "calm"}, Message("assistant", "AOG.", True, extra=(("mood", "calm"),))),
    "a developer": ({"role": "developer", "content": "Be brief."}, Message("developer", "Be brief.")),
    "an observation": ({"from": "observation", "value": "14"}, Message("tool", "14")),
    "an empty system turn": ({"role": "system", "content": ""}, Message("system", "")),
    "a tool that says nothing": ({"role": "tool", "content": ""}, Message("tool", "")),
    "a tool's object": ({"role": "tool", "content": {"warm": 14, "damp": None}}, Message("tool", '{"warm": 14}')),
    "a tool's list": ({"role": "tool", "content": [1, {"found": []}]}, Message("tool", '[1, {"found": []}]')),
    "a tool's parts": ({"role": "tool", "content": [{"type": "text", "text": "14"}]}, Message("tool", "14")),
    "two thoughts": (
        {"role": "assistant", "content": [{"type": "thinking", "thinking": t} for t in ("A.", "B.")] + ["AOG."]},
        Message("assistant", "AOG.", True, reasoning="A.\n\nB."),
    ),
    "a blank thought": ({**ANSWERED, "reasoning_content": " \n"}, OURS[1]),
    "both role and from, of which one is null": (
        {"role": None, "from": "gpt", "content": None, "value": "AOG."},
        OURS[1],
    ),
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_turn_in_every_spelling(name: str) -> None:
    """Whatever it is called, it is the same turn."""
    entry, wanted = SPELLINGS[name]
    assert message_of(entry) == wanted


FLAGS = [
    ({"train": False}, False),
    ({"weight": 0}, False),
    ({"weight": 0.0}, False),
    ({"weight": 1}, True),
    ({"training": False}, False),
    ({"trainable": 1}, True),
    ({"loss": False}, False),
    ({"loss_mask": 0}, False),
    ({"loss_weight": 1.0}, True),
    ({"masked": True}, False),
    ({"masked": False}, True),
    ({"loss": True, "weight": 1}, True),
]


@pytest.mark.parametrize(("flags", "is_trained"), FLAGS, ids=str)
def test_loss_flags_of_other_trainers_are_honoured(flags: dict[str, Any], is_trained: bool) -> None:
    """A turn is trained or masked as its flag says, and no flag reaches the template."""
    assert message_of({**ANSWERED, **flags}) == Message("assistant", "AOG.", train=is_trained)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({**ANSWERED, "loss": 0.3}, "'loss' must be true or false, not 0.3"),
    ({**ANSWERED, "loss_weight": 2}, "'loss_weight' must be 0 or 1, not 2"),
    ({**ANSWERED, "mask": 1}, "'mask' means different things to different trainers"),
    ({**ANSWERED, "train_detail": [{"begin": 0}]}, "'train_detail' means different things"),
    ({**ANSWERED, "train": True, "masked": True}, "its flags contradict each other"),
    ({**ANSWERED, "thinking": "One.", "reasoning": "Another."}, "two different reasonings"),
    ({**ASKED, "reasoning": "Hm."}, "a user turn cannot have reasoning"),
    ({**ASKED, "tool_calls": [{"name": "f"}]}, "a user turn cannot have tool calls"),
    ({"role": "user", "content": [{"type": "text", "text": None}]}, "part 1 of the content has no text under 'text'"),
    (
        {"role": "user", "content": [{"type": "text", "content": "x"}]},
        r"no text under 'text' \(it has: content, type\)",
    ),
    ({"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, "part 1 .* is of type 'image_url'"),
    ({"role": "user"}, "it has no content"),
    ({**ANSWERED, "value": "BER."}, "'content' and 'value', which differ"),
    (
        {**ANSWERED, "tool_calls": [{"name": "f"}], "function_call": {"name": "g"}},
        "'function_call' and 'tool_calls', which",
    ),
    (
        {**ANSWERED, "tool_calls": [{"name": "f", "arguments": {"x": 1}, "parameters": {"y": 2}}]},
        "both 'arguments' and",
    ),
    ({"role": "assistant", "content": ["a", {"type": "thinking", "thinking": "b"}]}, "reasoning follows a text"),
    ({"role": "user", "content": [{"type": "text", "text": "a", "thinking": "b"}]}, "'text' and 'thinking'; give each"),
    ({**ANSWERED, "tool_calls": [{"name": "f", "arguments": '{"x": 1e400}'}]}, "inf is not a number that JSON has"),
    ({**ANSWERED, "mood": float("nan")}, "nan is not a number that JSON has"),
    ({"role": "user", "content": [4]}, "part 1 of the content must be an object with a text, not int"),
    ({**ANSWERED, "mood": "\ud83d"}, "half of a surrogate pair"),
    ({"role": "tool", "content": ["\ud83d"]}, "half of a surrogate pair"),
    ({"role": "tool", "content": {"t": float("nan")}}, "nan is not a number that JSON has"),
    ({"role": "tool", "content": {"t": b"x"}}, "bytes cannot be written as JSON"),
    ({"role": "tool", "content": "x", "tool_call_id": "\ud83d"}, "half of a surrogate pair"),
]


@pytest.mark.parametrize(("entry", "reason"), REFUSED, ids=[reason[:40] for _, reason in REFUSED])
def test_what_cannot_be_read_is_named(entry: dict[str, Any], reason: str) -> None:
    """The reason names the key or part."""
    with pytest.raises(ValueError, match=reason):
        message_of(entry)


def test_rows_that_are_conversations_in_disguise() -> None:
    """Lists of turns as prompt and completion, JSON text of turns, a system column: all the same conversation."""
    text = '[{"role": "user", "content": "Which term?"}, {"role": "assistant", "content": "AOG."}]'
    assert read({"messages": text}).messages == OURS
    assert read({"prompt": [ASKED], "completion": [ANSWERED]}).messages == OURS
    assert read({"prompt": "Which term?", "completion": [ANSWERED]}).messages == OURS
    question, answer = (f"[{turn}]" for turn in text[1:-1].replace("}, ", "}\n").split("\n"))
    assert read({"prompt": question, "completion": answer}).messages == OURS
    assert read({"system": "Be brief.", "messages": [ASKED, ANSWERED]}).messages == (
        Message("system", "Be brief."),
        *OURS,
    )
    with pytest.raises(ValueError, match="a system prompt in 'system' and another in 'messages'"):
        read({"system": "Be brief.", "messages": [{"role": "system", "content": "Be long."}, ASKED, ANSWERED]})
    with pytest.raises(ValueError, match="must be a list of at least one turn, or JSON text of one; it is not JSON"):
        read({"messages": "[{"})


def test_answers_in_a_prompt_are_context() -> None:
    """Of a prompt's assistant turns only those are trained that a flag says; a text about turns is a text."""
    row = {"prompt": [ASKED, ANSWERED, {**ANSWERED, "train": True}, ASKED], "completion": [ANSWERED]}
    assert [turn.train for turn in read(row).messages] == [False, False, True, False, True]
    for prompt, completion in (
        ("[sic]", "[1, 2]"),
        ("Show a chat.", '[{"role": "user", "content": "Hi"}]'),
        ("Extract.", '[{"from": {"city": "Berlin"}}]'),
    ):
        assert read({"prompt": prompt, "completion": completion}).messages == (
            Message("user", prompt),
            Message("assistant", completion, train=True),
        )


def test_the_earlier_turns_of_an_alpaca_row() -> None:
    """`history` holds earlier questions and answers, which are turns before the instruction."""
    row = {"instruction": "And BER?", "output": "Beyond repair.", "history": [["Which term?", "AOG."]]}
    said = ["Which term?", "AOG.", "And BER?", "Beyond repair."]
    assert [turn.content for turn in read(row).messages] == said
    text = {**row, "history": '[["Which term?", "AOG."]]', "input": " ", "system": " "}
    assert [turn.content for turn in read(text).messages] == said
    with pytest.raises(ValueError, match="'history', entry 1: turn 1: the content is empty"):
        read({**row, "history": [["", "AOG."]]})


def test_turns_are_counted_from_one() -> None:
    """The turn that cannot be read is named by its number."""
    with pytest.raises(ValueError, match="turn 2: the content is empty"):
        turns_of([ASKED, {"role": "assistant", "content": " "}], "messages")


def test_two_names_of_one_role() -> None:
    """Both say the same, each in its trainer's words."""
    assert message_of({**ASKED, "from": "human"}).role == "user"
    with pytest.raises(ValueError, match="'from' and 'role', which differ"):
        message_of({**ASKED, "from": "gpt"})

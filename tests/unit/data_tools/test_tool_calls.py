"""Tool calls and definitions as objects or JSON text reach the template as it wants them, or are refused."""

import json
from typing import Any

import pytest

from data_tools.messages import message_of
from data_tools.tool_calls import arguments_of, tool_calls_of, tools_of
from tests.unit.data_tools.jinja import (
    JOINS_ARGUMENTS,
    TOOL,
    WHOLE,
    answer,
    call,
    marked,
    rendered,
    result,
    user,
)

CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"term": "AOG"}}}
SPELLINGS: dict[str, Any] = {
    "an object": [CALL],
    "arguments as JSON text": [{"function": {"name": "look_up", "arguments": '{"term": "AOG"}'}}],
    "no wrapper": [{"name": "look_up", "arguments": {"term": "AOG"}}],
    "parameters": [{"name": "look_up", "parameters": {"term": "AOG"}}],
    "a list as JSON text": '[{"name": "look_up", "arguments": {"term": "AOG"}}]',
    "each as JSON text": ['{"name": "look_up", "arguments": "{\\"term\\": \\"AOG\\"}"}'],
    "arguments beside the function": [
        {"type": "function", "function": {"name": "look_up"}, "arguments": {"term": "AOG"}}
    ],
    "LangChain's": [{"name": "look_up", "args": {"term": "AOG"}, "type": "tool_call"}],
    "input": [{"type": "tool_use", "name": "look_up", "input": {"term": "AOG"}}],
    "a name on both levels": [{"name": "look_up", **CALL}],
    "a single call": {"name": "look_up", "arguments": {"term": "AOG"}},
    "nulls that Arrow fills in": [
        {**CALL, "id": None, "function": {**CALL["function"], "arguments": {"term": "AOG", "page": None}}}
    ],
}


@pytest.mark.parametrize("name", SPELLINGS)
def test_a_call_in_every_spelling(name: str) -> None:
    """It is the same call, with its arguments as an object."""
    assert tool_calls_of(SPELLINGS[name]) == (CALL,)


def test_calls_as_turns_of_their_own() -> None:
    """A function_call of OpenAI's first kind, and a turn whose role is the call."""
    entry = {"role": "assistant", "content": None, "function_call": {"name": "look_up", "arguments": '{"term": "AOG"}'}}
    assert message_of(entry).tool_calls == (CALL,)
    for role in ("function_call", "tool_call"):
        turn = message_of({"from": role, "value": '{"name": "look_up", "arguments": {"term": "AOG"}}'})
        assert (turn.role, turn.train, turn.tool_calls) == ("assistant", True, (CALL,))


def test_what_is_in_arguments_stays() -> None:
    """JSON text says what it says, with its nulls and empty lists; ids stay, too."""
    text = '{"term": null, "pages": [], "deep": [{"x": null}]}'
    (found,) = tool_calls_of([{"id": "c1", "name": "f", "arguments": text}])
    assert found["function"]["arguments"] == {"term": None, "pages": [], "deep": [{"x": None}]}
    assert found["id"] == "c1"
    assert tool_calls_of([{"name": "f"}, {"name": "g", "arguments": ""}])[1]["function"]["arguments"] == {}


@pytest.mark.parametrize(
    ("calls", "reason"),
    [
        ([{"name": "f", "arguments": "{broken"}], "call 1: the arguments are not JSON"),
        ([{"name": "f", "arguments": "[1]"}], "call 1: the arguments must be an object, not list in JSON text"),
        ([CALL, {"arguments": {}}], "call 2 must be an object with the name and arguments"),
        ([7], "call 1 must be an object"),
        ("[", "'tool_calls' is text, but not JSON"),
    ],
)
def test_calls_that_cannot_be_read_are_named(calls: Any, reason: str) -> None:
    """By their number, with the reason."""
    with pytest.raises(ValueError, match=reason):
        tool_calls_of(calls)


def test_definitions_of_tools() -> None:
    """A list or JSON text of it, with or without the wrapper; nulls and empty lists are gone at every depth."""
    padded = {**TOOL, "strict": None, "parameters": {**TOOL["parameters"], "required": [], "enum": None}}
    wanted = ({"type": "function", "function": TOOL},)
    for given in ([TOOL], [{"type": "function", "function": TOOL}], json.dumps([TOOL]), [padded], [json.dumps(TOOL)]):
        assert tools_of(given) == wanted
    assert tools_of(None) == tools_of([]) == tools_of("") == ()
    for bad, reason in (
        ([{"x": 1}], "tool 1 must be an object with a name"),
        (3, "must be a list of tool definitions"),
    ):
        with pytest.raises(ValueError, match=reason):
            tools_of(bad)


def test_arguments_for_the_template() -> None:
    """A row's chat_template_kwargs, as an object or JSON text; what would replace the conversation is refused."""
    assert arguments_of({"enable_thinking": False, "mood": None}, "x") == {"enable_thinking": False}
    assert arguments_of('{"enable_thinking": false}', "x") == {"enable_thinking": False}
    with pytest.raises(ValueError, match="cannot be named 'tools'"):
        arguments_of({"tools": []}, "x")


TURNS = (user("Which?"), call('{"term": "AOG"}'), result("on ground"), answer("Aircraft on ground."))


def test_a_call_is_trained_as_the_template_writes_it() -> None:
    """Once encoded, whether the template wants objects or text; tools and results are context."""
    for template in (WHOLE, JOINS_ARGUMENTS):
        (sample,) = rendered(template, *TURNS, tools=[TOOL]).samples
        assert marked(sample) == (
            '<|begin|><|system|>\n[{"type": "function", "function": {"name": "look_up", "description": '
            '"Looks up a term.", "parameters": {"properties": {"term": {"type": "string"}}}}}]\n'
            "<|user|>\nWhich?\n<|assistant|>\n"
            '⟦\ncall look_up {"term": "AOG"}<|end|>⟧\n<|user|>\nresult on ground\n<|assistant|>\n'
            "⟦Aircraft on ground.<|end|>⟧\n"
        )


def test_text_and_a_call_in_one_turn() -> None:
    """Both are trained, with the end token that follows the call."""
    spoken = {**call({"term": "AOG"}), "content": "Let me look."}
    (sample,) = rendered(WHOLE, user("Which?"), spoken, user("ok"), answer("fine")).samples
    assert '⟦Let me look.\ncall look_up {"term": "AOG"}<|end|>⟧' in marked(sample)
    assert sample.questions == ("Which?", "ok")


def test_an_object_beside_empty_arguments_is_not_taken_for_them() -> None:
    """Such as what a provider notes of a call."""
    (found,) = tool_calls_of([{"name": "f", "arguments": {}, "extra_content": {"a": 1}}])
    assert found["function"]["arguments"] == {}
    assert found["extra_content"] == {"a": 1}


REFUSED_CALLS: list[tuple[Any, str]] = [
    ({"name": "f", "function": {"name": "g"}}, "call 1 must be an object with one name, and not two"),
    ({"function": {"name": "f", "arguments": {"a": 1}}, "arguments": {"a": 2}}, "call 1 has 'arguments' twice"),
    ({"name": "f", "kwargs": {"a": 1}}, "call 1 has no 'arguments', and an object 'kwargs'"),
    ({"name": "f", "arguments": {"a": b"x"}}, "call 1: the arguments are bytes cannot be written as JSON"),
]


@pytest.mark.parametrize(("value", "reason"), REFUSED_CALLS, ids=[reason for _, reason in REFUSED_CALLS])
def test_no_argument_is_lost_under_another_name(value: Any, reason: str) -> None:
    """Two that differ, and one that nothing reads, are refused."""
    with pytest.raises(ValueError, match=reason):
        tool_calls_of(value)


def test_a_call_in_the_content_and_beside_it() -> None:
    """Either is read; where both are there and differ, the turn is refused."""
    text, other = '{"name": "look_up", "arguments": {"term": "AOG"}}', {"name": "g"}
    assert message_of({"role": "tool_call", "content": None, "tool_calls": [CALL]}).tool_calls == (CALL,)
    assert message_of({"role": "tool_call", "content": text, "tool_calls": [CALL]}).tool_calls == (CALL,)
    with pytest.raises(ValueError, match="a call in its content and another beside it"):
        message_of({"role": "tool_call", "content": text, "tool_calls": [other]})


def test_definitions_as_json_text_stay_as_they_are_written() -> None:
    """With their empty lists and nulls; a flat definition of OpenAI's Responses is one of a function."""
    schema = {"type": "object", "properties": {}, "required": [], "default": None, "enum": ["a", None]}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    assert tools_of(json.dumps([tool])) == (tool,) == tools_of([json.dumps(tool)])
    assert tools_of([{"type": "function", "name": "f", "strict": True}]) == (
        {"type": "function", "function": {"name": "f", "strict": True}},
    )


def test_an_object_of_nulls_is_no_call() -> None:
    """Arrow fills in such a struct where only other rows have a call."""
    empty = {"name": None, "arguments": None, "function": {"name": None}}
    assert tool_calls_of(empty) == ()
    assert message_of({"role": "assistant", "content": "b", "function_call": empty}).tool_calls == ()

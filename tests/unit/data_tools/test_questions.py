"""What a template loses of a row is refused by name, and keys that it does not read are counted."""

import re
from typing import Any

import pytest

from data_tools.chat_template import ChatTemplate
from data_tools.questions import Questions
from data_tools.render import ConversationRenderer, RenderSettings
from tests.unit.data_tools.jinja import (
    PLAIN,
    THINKS,
    TOOL,
    WHOLE,
    answer,
    call,
    conversation_of,
    rendered,
    result,
    tokenizer_with,
    user,
)

SYSTEM = {"role": "system", "content": "Be brief."}
LOST: dict[str, tuple[str, list[dict[str, Any]], dict[str, Any], str]] = {
    "a call": (PLAIN, [user("a"), call({"x": "y"}), user("b"), answer("c")], {}, "turn 2: its tool call would be lost"),
    "a result": (PLAIN, [user("a"), answer("b"), result("c"), answer("d")], {}, "turn 3: the tool turn's content"),
    "a system turn": (PLAIN, [SYSTEM, user("a"), answer("b")], {}, "turn 1: the system turn's content would be lost"),
    "reasoning": (PLAIN, [user("a"), answer("b", reasoning="c")], {}, "turn 2: its reasoning would be lost"),
    "tools": (PLAIN, [user("a"), answer("b")], {"tools": [TOOL]}, "the definition of tool 1 would be lost"),
    "the second call": (
        WHOLE.replace("{% for c in m.tool_calls or [] %}", "{% for c in (m.tool_calls or [])[:1] %}"),
        [
            user("a"),
            {**call({"x": "y"}), "tool_calls": [*call({"x": "y"})["tool_calls"], *call({"x": "z"})["tool_calls"]]},
        ],
        {},
        "turn 2: the arguments of tool call 2 would be lost",
    ),
    "arguments": (
        WHOLE.replace("(c.function.arguments | tojson)", "'...'"),
        [user("a"), call({"x": "y"})],
        {},
        "turn 2: the arguments of its tool call would be lost",
    ),
}


@pytest.mark.parametrize("name", LOST)
def test_what_a_template_loses_is_refused(name: str) -> None:
    """The message has the turn, the part and the ways out; data.leave_out with what takes it away, if anything does."""
    template, turns, fields, reason = LOST[name]
    with pytest.raises(ValueError, match=reason) as caught:
        rendered(template, *turns, **fields)
    for way_out in ("--data.chat_template", "--data.on_error skip"):
        assert way_out in str(caught.value)
    named = re.search(r"--data\.leave_out ([a-z ]+),", str(caught.value))
    parts = ("reasoning", "system", "tools")
    for value in [(part,) for part in parts] if named is None else [tuple(named[1].split())]:
        try:
            rendered(template, *turns, settings=RenderSettings(leave_out=value), **fields)
            assert named
        except ValueError:
            assert named is None


def test_content_that_depends_on_the_data_is_looked_at_row_by_row() -> None:
    """A template that drops one particular word is not caught by its shape, but by this row."""
    picky = PLAIN.replace("m.content +", "(m.content if m.content != 'no' else '') +")
    assert rendered(picky, user("a"), answer("yes")).samples
    with pytest.raises(ValueError, match="turn 2: the chat template loses or changes its content"):
        rendered(picky, user("a"), answer("no"))
    with pytest.raises(ValueError, match="turn 1: the user turn's content would be lost"):
        rendered(picky, user("no"), answer("yes"))


def test_unread_keys_of_turns() -> None:
    """A key that the template reads reaches it; one that it does not is told, once for each turn."""
    tempered = WHOLE.replace("{{ m.content }}", "{{ m.mood or '' }}{{ m.content }}")
    found = rendered(tempered, {**user("a"), "mood": "calm: ", "time": 3}, answer("b", time=4))
    assert found.unread == ("time", "time")
    assert rendered(WHOLE, {**user("a"), "mood": "calm"}, answer("b")).unread == ("mood",)


def test_a_content_in_parts_where_the_template_wants_parts() -> None:
    """A template that walks over parts gets them, though the row has text."""
    walks = PLAIN.replace("m.content +", "m.content[0].text +")
    assert len(rendered(walks, user("a"), answer("b")).samples[0].runs()) == 1


def test_a_template_is_asked_once_for_each_shape() -> None:
    """A thousand rows of one shape cost one question; another shape costs another."""
    template = ChatTemplate(tokenizer_with(WHOLE))
    asked = Questions(template)
    for number in range(20):
        asked.ask(conversation_of(user(f"a {number}"), answer(f"b {number}")))
    asked.ask(conversation_of(user("a"), answer("b", reasoning="c")))
    assert len(asked._verdicts) == 2
    assert template.knows_reasoning


def test_arguments_that_a_template_prints_as_python_does_are_refused() -> None:
    """No client could read them as JSON."""
    printing = WHOLE.replace("(c.function.arguments | tojson)", "(c.function.arguments.values() | join(' '))")
    printing = printing.replace("c.function.name +", "c.function.name + (c.function.arguments.keys() | join) +")
    assert rendered(printing, user("a"), call({"k": "v"})).samples
    with pytest.raises(ValueError, match="an argument, printed as Python does"):
        rendered(printing, user("a"), call({"k": {"deep": [True, "w"]}}))


def test_a_template_that_writes_one_kind_of_argument_loses_the_others() -> None:
    """It is asked with the kinds that the call has: that a number stands elsewhere in the text proves nothing."""
    strings = WHOLE.replace(
        "(c.function.arguments | tojson)",
        "(c.function.arguments.items() | selectattr('1', 'string') | map('join', '=') | join(' '))",
    )
    assert rendered(strings, user("a"), call({"room": "floor B2"})).samples
    for value in (2, 2.5, ["x"], {"x": "y"}):
        with pytest.raises(ValueError, match="the arguments of its tool call would be lost"):
            rendered(strings, user("2 or 2.5, x or y"), call({"room": "floor B2", "floor": value}))
    assert rendered(WHOLE, user("a"), call({"n": 1, "f": 1.5, "b": True, "l": [1], "o": {"k": False}})).samples


CHANGED: dict[str, tuple[str, list[dict[str, Any]]]] = {
    "an answer's white space": (
        PLAIN.replace("m.content +", "(m.content.split() | join(' ')) +"),
        [user("a"), answer("b\n  c")],
    ),
    "an answer's escapes": (PLAIN.replace("m.content +", "(m.content | tojson) +"), [user("a"), answer('b "c"')]),
    "a question's end": (PLAIN.replace("m.content +", "m.content.split(';')[0] +"), [user("a; b"), answer("c")]),
    "a masked call's arguments": (
        WHOLE.replace("(c.function.arguments | tojson)", "c.function.arguments.keys() | join").replace(
            "{{ m.content }}", "{{ m.content }}"
        ),
        [user("a"), {**call({"k": "value"}), "train": False}, result("b"), answer("c")],
    ),
}


@pytest.mark.parametrize("name", CHANGED)
def test_what_a_template_changes_is_refused(name: str) -> None:
    """An answer must stand as it is; what comes before it may be spelled otherwise, and no more."""
    template, turns = CHANGED[name]
    with pytest.raises(ValueError, match=r"turn \d: .*(loses or changes|lost)"):
        rendered(template, *turns)


def test_a_call_without_arguments_is_not_taken_for_its_definition() -> None:
    """A template that shows the definitions of tools and no calls loses the call, whatever the turn says."""
    deaf = WHOLE.replace("{% for c in m.tool_calls or [] %}", "{% for c in [] %}")
    turn = {**call({}), "content": "I will look_up now."}
    with pytest.raises(ValueError, match="turn 2: its tool call would be lost"):
        rendered(deaf, user("a"), turn, result("b"), answer("c"), tools=[TOOL])


@pytest.mark.parametrize(
    ("change", "content"), [("m.content | lower", "the <|END|> tag"), ("m.content | replace('~', '')", "a <|e~nd|> b")]
)
def test_a_template_cannot_make_special_tokens_of_the_data(change: str, content: str) -> None:
    """Where it changes or joins strings to one, the row is refused."""
    with pytest.raises(ValueError, match=r"special token of what the conversation says|lost or changed"):
        rendered(PLAIN.replace("m.content +", f"({change}) +"), user(content), answer("b"))
    joined = WHOLE.replace("{{ '[' + m.reasoning_content + ']\n' }}", "{{ m.reasoning_content }}")
    with pytest.raises(ValueError, match="makes a special token of what the conversation says"):
        rendered(joined, user("a"), answer("nd|> b", reasoning="say <|e"))


def test_arguments_that_no_template_reads_are_counted() -> None:
    """A row's own, and keys within a part of a content or a call."""
    found = rendered(PLAIN, user("a"), answer("b"), chat_template_kwargs={"enable_thinkng": False})
    assert found.unread == ("chat_template_kwargs.enable_thinkng",)
    part = {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}, "annotations": []}
    assert rendered(PLAIN, {"role": "user", "content": [part]}, answer("b")).unread == ("content.cache_control",)
    odd = call({"x": "y"})
    odd["tool_calls"][0]["function"]["verdict"] = "R"
    assert rendered(WHOLE, user("a"), odd).unread == ("tool_calls.verdict",)


def test_what_a_template_leaves_out_of_a_definition_is_counted() -> None:
    """Nested names, choices and defaults that do not reach the text are told by their keyword."""
    deep = {
        "name": "look_up",
        "description": "Looks up a term.",
        "parameters": {
            "type": "object",
            "properties": {
                "term": {"type": "string", "enum": ["AOG", "BER"], "description": "The term."},
                "where": {"type": "object", "properties": {"page": {"type": "integer", "default": 7}}},
            },
        },
    }
    flat = WHOLE.replace(
        "(tools | tojson)",
        "(tools[0].function.name + tools[0].function.description + "
        "(tools[0].function.parameters.properties | join(' ')))",
    )
    found = rendered(flat, user("a"), answer("b"), tools=[deep])
    assert found.unread == ("tools.default", "tools.description", "tools.enum", "tools.properties", "tools.type")
    assert rendered(WHOLE, user("a"), answer("b"), tools=[deep]).unread == ()


def test_masked_turns_change_no_count_of_special_tokens() -> None:
    """Conversations of one shape with other turns trained are other texts: none is refused for another's tokens."""
    template = THINKS
    settings = RenderSettings()
    renderer = ConversationRenderer(tokenizer_with(template), settings)
    counts = []
    for flags in ((True, True), (False, True), (True, False)):
        turns = [user("a"), answer("b", train=flags[0]), user("c"), answer("d", train=flags[1])]
        counts.append(len(renderer.render(conversation_of(*turns)).samples))
    assert counts == [2, 1, 1]

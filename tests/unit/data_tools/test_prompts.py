"""Prompts for a conversation are, token for token, what training has before the answer."""

from dataclasses import replace

import pytest

from data_tools.messages import Message
from data_tools.prompts import PromptRenderer
from data_tools.render import RenderSettings
from tests.unit.data_tools import jinja
from tests.unit.data_tools.jinja import conversation_of, tokenizer_with

SETTINGS = RenderSettings()
QUESTIONS = ["What is AOG?", "Say <|end|> and <|assistant|>!", "  spaces and\n\nlines \n", '{"größe": ["a\tb"]}']
TEMPLATES = ["WHOLE", "PLAIN", "THINKS", "UNENDED", "EMPTY_THOUGHT_IN_PROMPT", "DATED"]


def trained_prompt(name: str, settings: RenderSettings, *turns: dict[str, str]) -> list[int]:
    """The ids before the last answer of a conversation that is trained."""
    renderer = PromptRenderer(tokenizer_with(getattr(jinja, name)), settings).renderer
    sample = renderer.render(conversation_of(*turns)).samples[-1]
    return sample.input_ids[: sample.runs()[-1][0]]


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_are_the_trained_ones(name: str) -> None:
    """Of one and of three turns, under templates with habits of their own, whatever the answer was."""
    prompts = PromptRenderer(tokenizer_with(getattr(jinja, name)), SETTINGS)
    for question in QUESTIONS:
        asked, answered = {"role": "user", "content": question}, {"role": "assistant", "content": "Yes, <b>."}
        earlier = {"role": "user", "content": "First?"}
        first = trained_prompt(name, SETTINGS, asked, answered)
        assert prompts.ids([Message("user", question)]) == first
        third = trained_prompt(name, SETTINGS, earlier, answered, asked, {"role": "assistant", "content": "7 o'clock"})
        turns = [Message("user", "First?"), Message("assistant", "Yes, <b>."), Message("user", question)]
        assert prompts.ids(turns) == third
        assert len(third) > len(first)


def test_a_system_prompt_is_rendered_or_refused() -> None:
    """It stands in the prompt as trained, also where data.leave_out names it; a template without one refuses it."""
    turns = [{"role": role, "content": text} for role, text in (("system", "Be brief."), ("user", "Why?"))]
    messages = [Message(turn["role"], turn["content"]) for turn in turns]
    answer = {"role": "assistant", "content": "So."}
    settings = replace(SETTINGS, leave_out=("system",))
    found = PromptRenderer(tokenizer_with(jinja.WHOLE), settings).ids(messages)
    assert found == trained_prompt("WHOLE", SETTINGS, *turns, answer)
    with pytest.raises(ValueError, match="system turn's content"):
        PromptRenderer(tokenizer_with(jinja.PLAIN), SETTINGS).ids(messages)


def test_thinking_is_told_apart_where_the_template_does() -> None:
    """The prompt of an answer with a thought is that trained before one; without one it ends behind the empty block."""
    question = {"role": "user", "content": "Why?"}
    prompts = PromptRenderer(tokenizer_with(jinja.THINKS), SETTINGS)
    thought = trained_prompt(
        "THINKS", SETTINGS, question, {"role": "assistant", "content": "So.", "reasoning_content": "Hm."}
    )
    plain = trained_prompt("THINKS", SETTINGS, question, {"role": "assistant", "content": "So."})
    asked = [Message("user", "Why?")]
    assert (prompts.ids(asked, thinks=True), prompts.ids(asked)) == (thought, plain)
    assert plain[: len(thought)] == thought != plain
    assert (prompts.has_empty_thought(), prompts.knows_reasoning()) == (True, True)
    other = PromptRenderer(tokenizer_with(jinja.PLAIN), SETTINGS)
    assert (other.has_empty_thought(), other.knows_reasoning()) == (False, False)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_end_token_is_the_template_s(name: str) -> None:
    """It is the last trained token of an answer; of a template that ends no answer, the one that begins a turn."""
    tokenizer = tokenizer_with(getattr(jinja, name))
    wanted = "<|user|>" if name == "UNENDED" else "<|end|>"
    assert PromptRenderer(tokenizer, SETTINGS).end_token() == tokenizer.convert_tokens_to_ids(wanted)

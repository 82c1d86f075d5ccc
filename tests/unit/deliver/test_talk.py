"""A conversation: prompts, the context limit, and rows that can be trained on."""

import json
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from data_tools.prepare import PrepareSettings, prepare
from data_tools.prompts import PromptRenderer
from data_tools.render import RenderSettings
from tests.unit.data_tools import jinja
from tests.unit.data_tools.jinja import tokenizer_with
from train.deliver.sampling import Sampling
from train.deliver.speaker import Spoken
from train.deliver.talk import Talk, thinks_by

SETTINGS = RenderSettings(today=date(2026, 1, 31))


@dataclass
class Echo:
    """A speaker that answers with given texts and remembers what it was asked."""

    answers: list[Spoken]
    prompts: list[list[int]] = field(default_factory=list)
    limits: list[int] = field(default_factory=list)

    def answer(self, prompt: list[int], sampling: Sampling, *_: Any) -> Spoken:
        self.prompts.append(prompt)
        self.limits.append(sampling.max_new_tokens)
        return self.answers[len(self.prompts) - 1]


def whole(text: str) -> Spoken:
    return Spoken(text, "stopped", 3, 1.0, 0)


def talk_with(answers: list[Spoken], template: str = jinja.WHOLE, **given: Any) -> tuple[Talk, Echo, list[str]]:
    speaker: Any = Echo(answers)
    talk = Talk(speaker, PromptRenderer(tokenizer_with(template), SETTINGS), given.pop("context", 0), **given)
    return talk, speaker, []


def ask(talk: Talk, text: str, said: list[str]) -> Spoken:
    return talk.ask(text, said.append, lambda: False, said.append)


def test_a_saved_conversation_is_trained_as_it_was_held(tmp_path: Path) -> None:
    """Read back as data, its samples begin with the very prompts, and train the whole answers with their end token."""
    cut = Spoken("Halfway", "length", 3, 1.0, 0)
    answers = [whole("Aircraft on ground."), cut, whole("A bolt\nor <|end|> two.")]
    talk, speaker, said = talk_with(answers)
    talk.set_system("Be brief.")
    for question in ("What is AOG?", "What is MEL?", "Which\nparts?"):
        ask(talk, question, said)
    path = tmp_path / "talk.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}')  # without a line break at its end
    assert talk.save(path) == 2
    assert talk.save(path) == 3
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[1] == rows[2]
    path.write_text(json.dumps(rows[1]) + "\n")
    tokenizer = tokenizer_with(jinja.WHOLE)
    (sample,) = prepare(PrepareSettings((str(path),), render=SETTINGS), tokenizer).dataset.to_list()
    for number in (0, 2):
        prompt = speaker.prompts[number]
        assert sample["input_ids"][: len(prompt)] == prompt
        assert sample["trained"][len(prompt)]
    trained = [token for token, on in zip(sample["input_ids"], sample["trained"], strict=True) if on]
    assert tokenizer.decode(trained) == "Aircraft on ground.<|end|>A bolt\nor <|end|> two.<|end|>"


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    """A conversation without a whole answer, and a name that data.path would not read as rows, write nothing."""
    talk, _, said = talk_with([Spoken("Half", "interrupted", 1, 1.0, 0), whole("")])
    ask(talk, "What?", said)
    ask(talk, "And?", said)
    assert len(talk.turns) == 2  # an empty answer is none
    assert "empty" in said[-1]
    with pytest.raises(ValueError, match="no whole answer"):
        talk.save(tmp_path / "a.jsonl")
    with pytest.raises(ValueError, match=r"name it \.jsonl"):
        talk.save(tmp_path / "a.txt")
    assert list(tmp_path.iterdir()) == []


def test_the_oldest_turns_are_left_out_where_the_context_ends() -> None:
    """Prompt and answer stay within the limit, the system prompt and the newest turns stay, and it is said."""
    answers = [whole("A bolt of steel, rather long.")] * 6
    talk, speaker, said = talk_with(answers, context=120, sampling=Sampling(max_new_tokens=20))
    talk.set_system("Be brief.")
    for number in range(6):
        ask(talk, f"What is part {number}?", said)
    tokenizer = tokenizer_with(jinja.WHOLE)
    assert all(len(prompt) + 20 <= 120 for prompt in speaker.prompts)
    last = tokenizer.decode(speaker.prompts[-1])
    assert "Be brief." in last
    assert "part 5?" in last
    assert "part 4?" in last
    assert "part 0?" not in last
    assert any("oldest" in line and "120 tokens" in line for line in said)
    assert len(talk.turns) == 12  # all are saved
    talk.reset()
    assert (talk.turns, talk.first, talk.system) == ([], 0, "Be brief.")


def test_a_message_without_room() -> None:
    """One that is too long alone is refused and costs no turn; one that leaves little room gets a shorter answer."""
    talk, speaker, said = talk_with([whole("Yes.")] * 2, context=60, sampling=Sampling(max_new_tokens=50))
    ask(talk, "Why is this so?", said)
    room = 60 - len(speaker.prompts[0])
    assert speaker.limits == [room]
    assert f"{room} tokens are left" in said[-1]
    with pytest.raises(ValueError, match="the model takes 60; shorten it"):
        ask(talk, "why " * 100, said)
    assert (len(talk.turns), talk.first, len(speaker.prompts)) == (2, 0, 1)


def test_a_thought_is_kept_apart() -> None:
    """Of an answer with a thought the thought goes where the template wants it, and earlier ones leave the prompt."""
    talk, speaker, said = talk_with([whole("<think>\nHm, hm.\n</think>\n\nSo."), whole("x")], jinja.THINKS, thinks=True)
    ask(talk, "Why?", said)
    ask(talk, "And?", said)
    assert [(turn.content, turn.reasoning) for turn in talk.turns[:2]] == [("Why?", ""), ("So.", "Hm, hm.")]
    assert talk.row()["messages"][1] == {"role": "assistant", "content": "So.", "reasoning_content": "Hm, hm."}
    tokenizer = tokenizer_with(jinja.THINKS)
    assert "Hm, hm." not in tokenizer.decode(speaker.prompts[1])
    plain, _, said = talk_with([whole("a </think> b")], jinja.PLAIN)
    ask(plain, "Why?", said)
    assert plain.turns[1].content == "a </think> b"


def test_thinking_follows_the_data() -> None:
    """Prompts are for thoughts where the template marks their absence and the run saw none absent; never otherwise."""
    prompts = {name: PromptRenderer(tokenizer_with(getattr(jinja, name)), SETTINGS) for name in ("THINKS", "PLAIN")}
    assert thinks_by(prompts["THINKS"], 0)
    assert not thinks_by(prompts["THINKS"], 5)
    assert not thinks_by(prompts["THINKS"], None)
    assert not thinks_by(prompts["PLAIN"], 0)


def test_a_system_prompt_that_the_template_has_not() -> None:
    """It is refused when it is set, and the one before it stays."""
    talk, _, _ = talk_with([], jinja.PLAIN)
    with pytest.raises(ValueError, match="system turn's content"):
        talk.set_system("Be brief.")
    assert talk.system == ""

"""A conversation with a model: its turns, their prompts as training renders them, and its rows to train on."""

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_tools.messages import Message
from data_tools.prompts import PromptRenderer
from train.deliver.sampling import Sampling
from train.deliver.speaker import Speaker, Spoken

CLOSED = "</think>"  # what ends a thought in nearly all templates that have one


@dataclass
class Talk:
    """What was said, and what the next answer depends on."""

    speaker: Speaker
    prompts: PromptRenderer
    context: int  # tokens that the model takes at most; 0: it says no number
    sampling: Sampling = field(default_factory=Sampling)
    with_adapters: bool = True
    thinks: bool = False  # answers are to begin with a thought, where the template tells them apart
    system: str = ""
    turns: list[Message] = field(default_factory=list)  # questions and answers in turn
    first: int = 0  # turns before it are left out of prompts

    def ask(
        self, text: str, write: Callable[[str], None], must_stop: Callable[[], bool], say: Callable[[str], None]
    ) -> Spoken:
        """The answer, which is kept unless it is empty; `say` is told what is left out.

        Raises ValueError where the template refuses the turns, or where the message alone is too long.
        """
        question = Message("user", text)
        prompt = self._prompt(question, say)
        room = self.context - len(prompt) if self.context else self.sampling.max_new_tokens
        sampling = self.sampling
        if room < sampling.max_new_tokens:
            say(f"{room} tokens are left for the answer, of the {self.context} that the model takes")
            sampling = replace(sampling, max_new_tokens=room)
        spoken = self.speaker.answer(prompt, sampling, self.with_adapters, write, must_stop)
        if spoken.text:
            self.turns += [question, self._answer(spoken)]
        else:
            say("the answer is empty, and this turn is not kept")
        return spoken

    def reset(self) -> None:
        """Forgets the turns; the system prompt stays."""
        self.turns, self.first = [], 0

    def set_system(self, text: str) -> None:
        """Sets the system prompt, from the next answer on; raises ValueError where the template has none."""
        if text:
            self.prompts.ids([Message("system", text), Message("user", "Who are you?")], self.thinks)
        self.system = text

    def row(self) -> dict[str, Any]:
        """The conversation as a row of messages; an answer that did not end by itself is not trained.

        Raises ValueError where it has no whole answer.
        """
        if not any(turn.train for turn in self.turns):
            raise ValueError("there is no whole answer yet")
        system = [{"role": "system", "content": self.system}] if self.system else []
        return {"messages": [*system, *map(_as_row, self.turns)]}

    def save(self, path: Path) -> int:
        """Adds the row to a file that data.path takes; returns its number of rows now.

        Raises ValueError where it has no whole answer or the name is no .jsonl, and OSError.
        """
        if path.suffix.lower() != ".jsonl":
            raise ValueError(f"{path}: name it .jsonl, so that --data.path reads it")
        line = json.dumps(self.row(), ensure_ascii=False) + "\n"
        before = path.read_bytes() if path.exists() else b""
        with path.open("a", encoding="utf-8") as file:
            file.write("\n" if before and not before.endswith(b"\n") else "")
            file.write(line)
        return 1 + sum(bool(row.strip()) for row in before.splitlines())

    def _messages(self, question: Message) -> list[Message]:
        system = [Message("system", self.system)] if self.system else []
        context = [replace(turn, train=False) for turn in self.turns[self.first :]]
        return [*system, *context, question]

    def _prompt(self, question: Message, say: Callable[[str], None]) -> list[int]:
        """The prompt, without the oldest turns where the answer would have no room behind them."""
        before = self.first
        prompt = self.prompts.ids(self._messages(question), self.thinks)
        while self.context and len(prompt) + self.sampling.max_new_tokens > self.context:
            if self.first >= len(self.turns):
                break
            self.first += 2
            prompt = self.prompts.ids(self._messages(question), self.thinks)
        if self.context and len(prompt) >= self.context:
            self.first = before
            raise ValueError(
                f"the message takes {len(prompt):,} tokens with its prompt, and the model takes {self.context:,}; "
                "shorten it"
            )
        if self.first > before:
            say(f"the oldest {self.first} turns are left out: the model takes {self.context:,} tokens")
        return prompt

    def _answer(self, spoken: Spoken) -> Message:
        """The answer as a turn, its thought apart, because templates leave earlier thoughts out."""
        thought, closed, said = spoken.text.partition(CLOSED)
        thought = thought.strip().removeprefix("<think>").strip()
        is_whole = spoken.ended == "stopped"
        if closed and thought and said.strip():
            apart = Message("assistant", said.strip(), train=is_whole, reasoning=thought)
            with suppress(ValueError):  # a template that keeps no reasoning gets it as text
                self.prompts.ids([Message("user", "?"), replace(apart, train=False), Message("user", "?")])
                return apart
        return Message("assistant", spoken.text, train=is_whole)


def _as_row(turn: Message) -> dict[str, Any]:
    row: dict[str, Any] = {"role": turn.role, "content": turn.content}
    if turn.reasoning:
        row["reasoning_content"] = turn.reasoning
    if turn.role == "assistant" and not turn.train:
        row["train"] = False
    return row


def thinks_by(prompts: PromptRenderer, num_empty_reasonings: int | None) -> bool:
    """Whether a run's answers were trained with a thought before them.

    If the template puts an empty think block before answers without one, and the run counted none, they all had one.
    """
    return num_empty_reasonings == 0 and prompts.has_empty_thought() and prompts.knows_reasoning()

"""A conversation as it goes into a chat template, and the texts that the template makes of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_tools.chat_template import ChatTemplate, Dialect
from data_tools.encode import Encoder
from data_tools.messages import Message


@dataclass(frozen=True)
class Dialogue:
    """A conversation as it goes into the template; `arguments` are the row's own template arguments."""

    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...]
    arguments: Mapping[str, Any]
    dialect: Dialect


class DialogueText:
    """The texts of one dialogue; ValueError where the template refuses it."""

    def __init__(self, template: ChatTemplate, encoder: Encoder, dialogue: Dialogue) -> None:
        self.template, self.encoder, self.dialogue = template, encoder, dialogue
        self.messages = dialogue.messages
        self.turns = [dialogue.dialect.turn(message) for message in self.messages]
        self._last_known = (-1, "")  # one text, because those of a long conversation take much memory

    def through(self, count: int, **arguments: Any) -> str:
        """The text of the first `count` turns."""
        if arguments:
            return self.render(self.turns[:count], **arguments)
        if self._last_known[0] != count:
            self._last_known = (count, self.render(self.turns[:count]))
        return self._last_known[1]

    def prompt(self, count: int, **arguments: Any) -> str:
        """The text of the first `count` turns with the generation prompt."""
        return self.render(self.turns[:count], add_generation_prompt=True, **arguments)

    def with_last(self, count: int, *messages: Message, add_generation_prompt: bool = False, **arguments: Any) -> str:
        """The text of the first `count` turns and these messages behind them."""
        last = [self.dialogue.dialect.turn(message) for message in messages]
        return self.render([*self.turns[:count], *last], add_generation_prompt, **arguments)

    def switches(self) -> list[str]:
        """The template's switches for thinking that nobody has set."""
        return self.template.switches(bool(self.dialogue.tools), self.dialogue.arguments)

    def render(self, turns: Sequence[Mapping[str, Any]], add_generation_prompt: bool = False, **arguments: Any) -> str:
        """The text of these turns."""
        dialogue = self.dialogue
        return self.template.render(turns, dialogue.tools, {**dialogue.arguments, **arguments}, add_generation_prompt)

"""Turns -> the prompt of the answer that is to follow, token for token as training has it before that answer."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from data_tools.messages import Message
from data_tools.records import Conversation
from data_tools.render import ConversationRenderer, Rendered, RenderSettings

# in the place of the answer: rendered as training would render it, and cut off
STAND_IN = Message("assistant", "zqanswer7qz", train=True)
STAND_IN_THINKING = replace(STAND_IN, reasoning="zqthought7qz")
ANY_QUESTION = Message("user", "What is AOG?")


class PromptRenderer:
    """Renders prompts with one tokenizer, template and settings; what data.leave_out names is rendered here."""

    def __init__(self, tokenizer: Any, settings: RenderSettings) -> None:
        self.renderer = ConversationRenderer(tokenizer, replace(settings, leave_out=()))

    def ids(self, messages: Sequence[Message], thinks: bool = False) -> list[int]:
        """The ids before the next answer; `thinks`: before one with reasoning, where the template tells them apart.

        Raises ValueError where the template refuses the turns or loses a part of them.
        """
        sample = self._rendered(messages, STAND_IN_THINKING if thinks else STAND_IN).samples[-1]
        return sample.input_ids[: sample.runs()[-1][0]]

    def end_token(self) -> int:
        """The token that ends an answer by the template."""
        sample = self._rendered([ANY_QUESTION], STAND_IN).samples[-1]
        return sample.input_ids[sample.runs()[-1][1] - 1]

    def has_empty_thought(self) -> bool:
        """Whether an answer without reasoning stands behind an empty think block that is not trained."""
        return self._rendered([ANY_QUESTION], STAND_IN).num_empty_reasonings > 0

    def knows_reasoning(self) -> bool:
        """Whether an answer's reasoning can be rendered at all."""
        try:
            self._rendered([ANY_QUESTION], STAND_IN_THINKING)
        except ValueError:
            return False
        return True

    def _rendered(self, messages: Sequence[Message], answer: Message) -> Rendered:
        return self.renderer.render(Conversation("the conversation", (*messages, answer)))

"""Samples: token ids, and which of them are trained; and what a tokenizer puts around a text."""

import json
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from data_tools.encode import special_tokens


@dataclass(frozen=True)
class Sample:
    """Token ids, and for each whether it is trained (supervised); both lists have the same length.

    `questions` has, for each run of trained tokens, what the user said last before it; empty where it is no answer.
    """

    source: str
    input_ids: list[int]
    trained: list[bool]
    questions: tuple[str, ...] = ()

    @property
    def num_supervised_tokens(self) -> int:
        """The number of supervised tokens; the first is never one, because nothing predicts it."""
        return self.trained.count(True) - self.trained[0]

    def runs(self) -> list[tuple[int, int]]:
        """[start, end) of each run of trained tokens."""
        flags, found, end = bytes(self.trained), [], 0
        while (start := flags.find(1, end)) >= 0:
            end = flags.find(0, start)
            end = len(flags) if end < 0 else end
            found.append((start, end))
        return found


def end_tokens(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> set[int]:
    """The special tokens that end this sample's trained spans, which teach the model to stop."""
    special = special_tokens(tokenizer, len(tokenizer))
    return {sample.input_ids[end - 1] for _, end in sample.runs()} & special.keys()


def begin_ids(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer puts before a text: usually a begin token, or none."""
    added: list[int] = tokenizer("")["input_ids"]
    return added[:-1] if added and added[-1] == tokenizer.eos_token_id else added


def tokenizer_identity(tokenizer: Any, with_template: bool = True) -> str:
    """Everything that determines the ids that the tokenizer gives to a text, or a conversation, as one string."""
    settings = {
        "specials": tokenizer.special_tokens_map,
        **({"template": tokenizer.chat_template} if with_template else {}),
        "begin": tokenizer("")["input_ids"],
    }
    return tokenizer.backend_tokenizer.to_str() + json.dumps(settings, sort_keys=True, default=str)

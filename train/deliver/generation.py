"""Batched greedy decoding by transformers."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from train.models.language_model import LanguageModel
from train.models.shape import positions_of

MAX_BATCH_SIZE = 32  # prompts decoded together

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Completion:
    """What a model wrote after one prompt."""

    text: str
    is_stopped: bool  # by an end token, not by max_new_tokens
    num_tokens: int  # without the end token


@dataclass(frozen=True)
class Generator:
    """Decodes greedily, with the adapters unless called inside `model.without_adapters()`."""

    model: LanguageModel
    tokenizer: PreTrainedTokenizerBase
    end_token_ids: Sequence[int]
    max_new_tokens: int
    must_stop: Callable[[], bool] = lambda: False  # asked after each token; then all answers end where they are

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Sequence[int]]) -> list[Completion]:
        """The completion of each prompt, given as token ids; must be called inside `model.generating()`.

        An answer ends, not stopped, where the base takes no more tokens: a learned table has no positions beyond.
        """
        causal_lm: Any = self.model.adapted
        tokenizer: Any = self.tokenizer
        longest, context = max(map(len, prompts)), self._context or math.inf
        if longest >= context:
            fitting = [prompt for prompt in prompts if len(prompt) < context]
            found = iter(self(fitting) if fitting else [])
            return [next(found) if len(prompt) < context else Completion("", False, 0) for prompt in prompts]
        input_ids = torch.full((len(prompts), longest), tokenizer.pad_token_id)  # padded on the left
        attention_mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(prompts):
            input_ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            attention_mask[row, longest - len(prompt) :] = 1
        settings = GenerationConfig(
            max_new_tokens=int(min(self.max_new_tokens, context - longest)),
            do_sample=False,
            eos_token_id=list(self.end_token_ids),
            pad_token_id=tokenizer.pad_token_id,
            use_cache=True,
        )
        generated = causal_lm.generate(
            input_ids=input_ids.to(causal_lm.device),
            attention_mask=attention_mask.to(causal_lm.device),
            generation_config=settings,
            stopping_criteria=[lambda ids, scores: torch.full((len(ids),), self.must_stop(), device=ids.device)],
        )
        return [self._completion(tokens) for tokens in generated[:, longest:].tolist()]

    @property
    def _context(self) -> int:
        """Tokens that the base takes at most; 0 where it does not say."""
        return positions_of(self.model.causal_lm.config)

    def _completion(self, tokens: list[int]) -> Completion:
        end = next((i for i, token in enumerate(tokens) if token in self.end_token_ids), None)
        written = tokens[:end]
        return Completion(str(self.tokenizer.decode(written)).strip(), end is not None, len(written))


def in_batches(
    items: Sequence[Item],
    generate: Callable[[Sequence[Item]], Result],
    must_stop: Callable[[], bool],
    size: int = MAX_BATCH_SIZE,
) -> Iterator[tuple[Sequence[Item], Result]]:
    """Yields (items, `generate(items)`) in batches of `size`; ends early when `must_stop` returns True.

    A batch that runs out of GPU memory is halved, and so are all later ones: the keys and values of 32 answers of an 8B
    model do not fit on a small GPU. Raises OutOfMemoryError if a single item does not fit.
    """
    done = 0
    while done < len(items) and not must_stop():
        batch = items[done : done + size]
        try:
            result = generate(batch)
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                raise
            size = len(batch) // 2
            continue
        done += len(batch)
        yield batch, result

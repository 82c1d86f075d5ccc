"""One answer at a time, written while it is generated; keys and values of earlier turns are kept where they are equal.

transformers generates, because the fused engine has no cache of keys and values.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal

import torch
from transformers import DynamicCache, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer
from transformers.generation.streamers import BaseStreamer

from train.deliver.sampling import Sampling
from train.models.language_model import LanguageModel

INCOMPLETE = "\ufffd"  # at the end of a text: a character of which not all tokens are there


@dataclass(frozen=True)
class Spoken:
    """An answer, how it ended, and what it took."""

    text: str
    ended: Literal["stopped", "length", "interrupted"]  # by an end token, by max_new_tokens, by the user
    num_tokens: int
    seconds: float
    num_kept: int  # tokens of the prompt whose keys and values were there


class TextStream(BaseStreamer):
    """Writes the text of generated tokens as soon as its characters are whole; an end token is no text."""

    def __init__(self, tokenizer: Any, end_token_ids: Sequence[int], write: Callable[[str], None]) -> None:
        self.tokenizer, self.end_token_ids, self.write = tokenizer, frozenset(end_token_ids), write
        self.ids: list[int] = []
        self.written = 0  # characters
        self.is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Takes the prompt, which comes first, or the next token."""
        if self.is_prompt:
            self.is_prompt = False
            return
        self.ids += [token for token in value.flatten().tolist() if token not in self.end_token_ids]
        text = self.text
        if not text.endswith(INCOMPLETE):
            self._write(text)

    def end(self) -> None:
        """Writes what is left, though it be half a character."""
        self._write(self.text)

    @property
    def text(self) -> str:
        """All so far."""
        return str(self.tokenizer.decode(self.ids))

    def _write(self, text: str) -> None:
        new, self.written = text[self.written :], max(self.written, len(text))
        if new:
            self.write(new)


class _Interrupt(StoppingCriteria):
    """Ends an answer when it is asked to."""

    def __init__(self, must_stop: Callable[[], bool]) -> None:
        self.must_stop = must_stop

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        return torch.full((input_ids.shape[0],), self.must_stop(), dtype=torch.bool, device=input_ids.device)


class Speaker:
    """A model that answers; used inside `model.generating()`."""

    def __init__(self, model: LanguageModel, tokenizer: Any, end_token_ids: Sequence[int]) -> None:
        self.model, self.tokenizer, self.end_token_ids = model, tokenizer, list(end_token_ids)
        self._forget()

    def _forget(self) -> None:
        self.cache: DynamicCache | None = None
        self.cached: list[int] = []  # the tokens whose keys and values it holds
        self.cached_with_adapters = True

    @torch.no_grad()
    def answer(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        with_adapters: bool,
        write: Callable[[str], None],
        must_stop: Callable[[], bool],
    ) -> Spoken:
        """Answers the prompt, at most sampling.max_new_tokens; `write` gets the text piece by piece.

        A KeyboardInterrupt ends an answer that must stop, and is raised otherwise; so is OutOfMemoryError. The next
        prompt then starts anew.
        """
        start = time.perf_counter()
        cache, num_kept = self._cache_for(prompt, with_adapters)
        stream = TextStream(self.tokenizer, self.end_token_ids, write)
        causal_lm: Any = self.model.adapted
        input_ids = torch.tensor([list(prompt)], device=causal_lm.device)
        if sampling.seed >= 0:
            torch.manual_seed(sampling.seed)
        pad = self.tokenizer.pad_token_id
        ids: list[int] | None = None
        try:
            with nullcontext() if with_adapters else self.model.without_adapters():
                found = causal_lm.generate(
                    input_ids=input_ids,
                    attention_mask=torch.ones_like(input_ids),
                    generation_config=sampling.settings(sampling.max_new_tokens, self.end_token_ids, pad),
                    streamer=stream,
                    stopping_criteria=StoppingCriteriaList([_Interrupt(must_stop)]),
                    **({"past_key_values": cache} if cache is not None else {}),
                )
            ids = found[0].tolist()
        except KeyboardInterrupt:  # within a token, whose keys and values are half there
            if not must_stop():
                raise
            stream.end()
        finally:
            self._keep(cache, ids, with_adapters)
        written = ids[len(prompt) :] if ids is not None else stream.ids
        is_stopped = bool(written) and written[-1] in self.end_token_ids
        ended = "stopped" if is_stopped else "interrupted" if ids is None or must_stop() else "length"
        seconds = time.perf_counter() - start
        return Spoken(stream.text.strip(), ended, len(stream.ids), seconds, num_kept)

    def _cache_for(self, prompt: Sequence[int], with_adapters: bool) -> tuple[DynamicCache | None, int]:
        """The cache of the last turn where the prompt begins with all its tokens, or a new one; and its tokens.

        None where the model has states of its own in the place of keys and values (Mamba, RWKV): it makes them itself.
        """
        if not _takes_keys_and_values(self.model.causal_lm):
            return None, 0
        cached, same = self.cached, self.cached_with_adapters == with_adapters
        if self.cache is not None and same and len(cached) < len(prompt) and list(prompt[: len(cached)]) == cached:
            return self.cache, len(cached)
        config: Any = self.model.causal_lm.config
        return DynamicCache(config=config.get_text_config(decoder=True)), 0

    def _keep(self, cache: DynamicCache | None, ids: list[int] | None, with_adapters: bool) -> None:
        """Keeps the cache for the next turn, unless it is of a kind that cannot go on exactly.

        Windows and recurrent states are such kinds, and rotary frequencies that depend on the text's length.
        """
        self._forget()
        if cache is None:
            return
        is_plain = all(type(layer) is DynamicLayer for layer in cache.layers) and not self.model.reference.rotaries
        if ids is not None and is_plain and cache.get_seq_length() == len(ids) - 1:  # the last token was not read
            self.cache, self.cached, self.cached_with_adapters = cache, ids[:-1], with_adapters


def _takes_keys_and_values(model: Any) -> bool:
    """Whether a cache of keys and values can be given to the model, as `generate` sees it."""
    is_usual = getattr(model, "_supports_default_dynamic_cache", lambda: True)()
    return bool(is_usual) and "past_key_values" in signature(model.forward).parameters

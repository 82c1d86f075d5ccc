"""Records -> token ids and which of them are trained, made together: no marker is searched for in the ids later."""

import json
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

from data_tools.records import Conversation, Document, Message

# A chat template may come from a stranger: it runs in transformers' sandbox, within these limits.
MAX_TEMPLATE_SECONDS = 30.0  # a row of 8 MiB takes less than one
MAX_RENDERED_CHARACTERS = 32 * 2**20  # four times the longest row

# For a tokenizer without a chat template: role markers in plain text, and the tokenizer's end token.
PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}"
    "{{ '### ' + message['role'] | capitalize + ':\n' + message['content'] | trim }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Sample:
    """Token ids, and for each whether it is trained (supervised); both lists have the same length."""

    source: str
    input_ids: list[int]
    trained: list[bool]

    @property
    def num_supervised_tokens(self) -> int:
        """The number of supervised tokens; the first is never one, because nothing predicts it."""
        return sum(self.trained[1:])


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """The text of the conversation with the generation prompt, after which the model writes the assistant's turn."""
    return _template(tokenizer, messages, add_generation_prompt=True)


def render_conversation(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> Sample:
    """A sample in which exactly the assistant turns marked `train`, with their end-of-turn tokens, are trained.

    A turn's span is found in two ways: as the difference between the text up to its generation prompt and the text
    through the turn, and as the place where texts with two other answers in this turn differ. Token boundaries are
    cross-checked by tokenising the prompt alone. Raises ValueError, naming the turn, if the two disagree, if neither
    works, or if no end token follows the answer.
    """
    turns = _Turns(tokenizer, conversation.messages)
    trained = [False] * len(turns.ids)
    for number, message in enumerate(conversation.messages):
        if not message.train:
            continue
        try:
            first, last = turns.trained_tokens(number)
        except ValueError as error:
            raise ValueError(f"turn {number + 1}: {error}") from None
        trained[first : last + 1] = [True] * (last + 1 - first)
    return Sample(conversation.source, turns.ids, trained)


class _Turns:
    """A rendered conversation, and the span of each turn in its text and tokens; spans are [start, end)."""

    def __init__(self, tokenizer: Any, messages: Sequence[Message]) -> None:
        self.tokenizer = tokenizer
        self.messages = messages
        self.text = _template(tokenizer, messages)
        self.literal_spans = self._spans_with_special_tokens()
        self.ids, self.offsets = self._encode(len(self.text))

    def trained_tokens(self, number: int) -> tuple[int, int]:
        """Indices of the first token that the model writes in turn `number`, and of the turn's end token."""
        content, turn = self._content_span(number), self._turn_span(number)
        if content is not None and turn is not None and not turn[0] <= content[0] <= content[1] <= turn[1]:
            raise ValueError("the two ways of locating the answer in the chat template's text disagree")
        span = turn or content
        if span is None:
            raise ValueError("the chat template rewrites the conversation, so the answer cannot be located")
        first = next(i for i, (_, end) in enumerate(self.offsets) if end > span[0])
        is_merged = bool(self.text[self.offsets[first][0] : span[0]].strip())
        if is_merged or (turn is not None and self._encode(turn[0])[0] != self.ids[:first]):
            raise ValueError(
                "the tokenizer merges the end of the prompt with the beginning of the answer, often a newline or space"
            )
        last = self._end_of_turn(first, (content or span)[1] if content else None, span[1])
        if last is None:
            raise ValueError("the chat template ends the answer without a special token at which to stop")
        return first, last

    def _turn_span(self, number: int) -> tuple[int, int] | None:
        """The turn's span by prefix difference; None if the template does not build the text turn by turn."""
        try:
            prefix = render_prompt(self.tokenizer, self.messages[:number])
            through = _template(self.tokenizer, self.messages[: number + 1])
        except ValueError:
            return None
        if through.startswith(prefix) and self.text.startswith(through):
            return len(prefix), len(through)
        return None

    def _content_span(self, number: int) -> tuple[int, int] | None:
        """The content's span, where texts with two other contents differ; None if the template changes the content."""
        content = self.messages[number].content
        if not content.strip():
            return None
        probed_texts = []
        for probe in "XY":
            probed = replace(self.messages[number], content=probe)
            try:
                probed_texts.append(
                    _template(self.tokenizer, [*self.messages[:number], probed, *self.messages[number + 1 :]])
                )
            except ValueError:
                return None
        start = next((i for i, (one, other) in enumerate(zip(*probed_texts, strict=False)) if one != other), None)
        if start is None:  # the template leaves this turn out
            return None
        end = len(self.text) - (len(probed_texts[0]) - start - 1)
        is_kept = probed_texts[0][:start] == self.text[:start] and probed_texts[0][start + 1 :] == self.text[end:]
        return (start, end) if is_kept and self.text[start:end].strip() == content.strip() else None

    def _end_of_turn(self, first: int, content_end: int | None, turn_end: int) -> int | None:
        """Index of the special token that ends the answer, which only white space may separate from the content.

        For a turn without a content span (a tool call) it is the turn's last token, apart from white space.
        """
        special = _special_tokens(self.tokenizer, len(self.tokenizer))
        if content_end is not None:
            after = (i for i in range(first, len(self.ids)) if self.offsets[i][1] > content_end)
            end = next((i for i in after if self.ids[i] in special), None)
            return end if end is not None and not self.text[content_end : self.offsets[end][0]].strip() else None
        inside = [i for i in range(first, len(self.ids)) if self.offsets[i][0] < turn_end]
        end = next((i for i in reversed(inside) if self.text[slice(*self.offsets[i])].strip()), None)
        return end if end is not None and self.ids[end] in special else None

    def _spans_with_special_tokens(self) -> list[tuple[int, int]]:
        """Spans of contents that spell a special token; they are encoded as text, or the data could forge a turn."""
        names = _special_tokens(self.tokenizer, len(self.tokenizer)).values()
        spans = []
        for number, message in enumerate(self.messages):
            special = next((name for name in names if name in message.content), None)
            if special is not None:
                span = self._content_span(number)
                if span is None:
                    raise ValueError(f"turn {number + 1}: it contains {special} and cannot be located in the text")
                spans.append(span)
        return spans

    def _encode(self, length: int) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and offsets of the first `length` characters; special tokens in contents are encoded as text."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        cuts = sorted({0, length, *(min(edge, length) for span in self.literal_spans for edge in span)})
        for start, end in pairwise(cuts):
            is_literal = any(span[0] <= start < span[1] for span in self.literal_spans)
            piece = self.tokenizer(
                self.text[start:end],
                add_special_tokens=False,
                return_offsets_mapping=True,
                split_special_tokens=is_literal,
            )
            ids += piece["input_ids"]
            offsets += [(start + a, start + b) for a, b in piece["offset_mapping"]]
        return ids, offsets


def _template(tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
    """The conversation as text; raises ValueError if the template fails on it, TimeoutError if it does not end."""
    turns = [message.as_turn() for message in messages]
    try:
        with _time_limit(MAX_TEMPLATE_SECONDS):
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TimeoutError:
        raise
    except Exception as error:  # a template can raise anything
        raise ValueError(f"the chat template refuses this conversation: {error}") from None
    if len(text) > MAX_RENDERED_CHARACTERS:
        raise ValueError(f"the chat template renders {len(text):,} characters, more than {MAX_RENDERED_CHARACTERS:,}")
    return text


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError inside the `with` block after `seconds`; without effect outside the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"the chat template did not end within {seconds:g} s; choose another --data.chat_template")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of all special tokens, including those without a named role (Llama-3's <|eot_id|>)."""
    return frozenset(_special_tokens(tokenizer, len(tokenizer)))


@lru_cache(maxsize=4)
def _special_tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> dict[int, str]:
    """Special tokens by id; cached by vocabulary size, because asking the tokenizer is slower than tokenising a row."""
    added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


def end_tokens(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> set[int]:
    """The special tokens that end this sample's trained spans, which teach the model to stop."""
    following = [*sample.trained[1:], False]
    pairs = zip(sample.input_ids, sample.trained, following, strict=True)
    special = _special_tokens(tokenizer, len(tokenizer))
    return {token for token, now, after in pairs if now and not after and token in special}


def render_document(
    tokenizer: PreTrainedTokenizerBase, document: Document, max_length: int, overlap: int
) -> Iterator[Sample]:
    """Samples of at most `max_length` tokens that together train each token of the text once.

    Each begins with the tokenizer's begin tokens, if any; all but the first repeat `overlap` tokens as masked context;
    the end token follows, trained, only at the document's end. A sample ends with a paragraph, or else with a line, if
    one ends in its last quarter.
    """
    begin = begin_ids(tokenizer)
    # split_special_tokens: "<|end_of_text|>" in the text does not end the document
    encoded: Any = tokenizer(
        document.text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True
    )
    body: list[int] = [*encoded["input_ids"], tokenizer.eos_token_id]
    ranks = _break_ranks(document.text, encoded["offset_mapping"])
    room = max_length - len(begin)
    start = 0
    while start < len(body):
        context = min(overlap, start, room - 1)
        end = start + room - context
        if end < len(body):
            last_quarter = range(end - (end - start) // 4, end + 1)
            end = max(last_quarter, key=lambda position: (ranks[position - 1], position))
        piece = body[start - context : end]
        masked = len(begin) + context
        trained = [False] * masked + [True] * (len(piece) - context)
        yield Sample(f"{document.source}@{start}", begin + piece, trained)
        start += len(piece) - context


def _break_ranks(text: str, offsets: Sequence[tuple[int, int]]) -> list[int]:
    """For each token: 2 if a paragraph ends with it, 1 if a line does, otherwise 0."""
    starts = [*(start for start, _ in offsets), len(text)]
    parts = [text[start:end] for start, end in pairwise(starts)]  # a token with what separates it from the next
    return [2 if "\n\n" in part else 1 if "\n" in part else 0 for part in parts]


def begin_ids(tokenizer: Any) -> list[int]:
    """The ids that the tokenizer puts before a text: usually a begin token, or none."""
    added: list[int] = tokenizer("")["input_ids"]
    return added[:-1] if added and added[-1] == tokenizer.eos_token_id else added


def tokenizer_identity(tokenizer: Any) -> str:
    """Everything that determines the ids that the tokenizer gives to a text, as one string."""
    settings = {
        "specials": tokenizer.special_tokens_map,
        "template": tokenizer.chat_template,
        "begin": tokenizer("")["input_ids"],
    }
    return tokenizer.backend_tokenizer.to_str() + json.dumps(settings, sort_keys=True, default=str)

"""Records -> token ids and which of them are trained, made together; nothing is ever found again by its text."""

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

# A template may come from a stranger: it runs in transformers' sandbox, and within these limits.
TEMPLATE_SECONDS = 30.0  # a row of 8 MiB takes less than one
LONGEST_RENDERED_CHARACTERS = 32 * 2**20  # four times the longest row

# For a tokenizer that has no chat template: markers that are plain text, and the tokenizer's own end token.
PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}"
    "{{ '### ' + message['role'] | capitalize + ':\n' + message['content'] | trim }}"
    "{{ eos_token if message['role'] == 'assistant' else '' }}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Sample:
    """What the model sees: `trained[i]` says whether token i is a target; both lists have the same length."""

    source: str
    input_ids: list[int]
    trained: list[bool]

    @property
    def num_supervised_tokens(self) -> int:
        """Targets in this sample; the first token is never one, because nothing predicts it."""
        return sum(self.trained[1:])


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> str:
    """The text after which the model is to write the assistant's turn."""
    return _template(tokenizer, messages, add_generation_prompt=True)


def render_conversation(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> Sample:
    """One sample in which exactly the wanted assistant turns and their end-of-turn tokens are trained.

    A turn's place is found in two ways: as the difference between the template rendered up to its generation prompt
    and through the turn, and by rendering two other answers in its place and seeing where the texts differ. Token
    boundaries are cross-checked by tokenising the prompt alone. Raises ValueError, naming the turn, where the ways
    disagree, where neither works, or where nothing would teach the model to stop.
    """
    turns = _Turns(tokenizer, conversation.messages)
    trained = [False] * len(turns.ids)
    for number, message in enumerate(conversation.messages):
        if not message.train:
            continue
        try:
            first, last = turns.written_by_the_model(number)
        except ValueError as error:
            raise ValueError(f"turn {number + 1}: {error}") from None
        trained[first : last + 1] = [True] * (last + 1 - first)
    return Sample(conversation.source, turns.ids, trained)


class _Turns:
    """A rendered conversation, and where in its text and tokens each turn stands; spans are [start, end)."""

    def __init__(self, tokenizer: Any, messages: Sequence[Message]) -> None:
        self.tokenizer = tokenizer
        self.messages = messages
        self.text = _template(tokenizer, messages)
        self.forged = self._spans_that_spell_special_tokens()
        self.ids, self.offsets = self._encode(len(self.text))

    def written_by_the_model(self, number: int) -> tuple[int, int]:
        """First and last token of what the model has to write in turn `number`; the last is its end-of-turn token."""
        content, turn = self._content_span(number), self._turn_span(number)
        if content is not None and turn is not None and not turn[0] <= content[0] <= content[1] <= turn[1]:
            raise ValueError("two ways of finding the answer in the chat template's text disagree")
        span = turn or content
        if span is None:
            raise ValueError("the chat template rewrites the conversation, so the answer's place is unknown")
        first = next(i for i, (_, end) in enumerate(self.offsets) if end > span[0])
        merged = bool(self.text[self.offsets[first][0] : span[0]].strip())
        if merged or (turn is not None and self._encode(turn[0])[0] != self.ids[:first]):
            raise ValueError(
                "the tokenizer merges the prompt's end with the answer's beginning, often a newline or blank"
            )
        last = self._end_of_turn(first, (content or span)[1] if content else None, span[1])
        if last is None:
            raise ValueError("the chat template ends the answer without a special token to stop at")
        return first, last

    def _turn_span(self, number: int) -> tuple[int, int] | None:
        """The turn by prefix difference; None where the template does not build the text turn by turn."""
        try:
            prefix = render_prompt(self.tokenizer, self.messages[:number])
            through = _template(self.tokenizer, self.messages[: number + 1])
        except ValueError:
            return None
        if through.startswith(prefix) and self.text.startswith(through):
            return len(prefix), len(through)
        return None

    def _content_span(self, number: int) -> tuple[int, int] | None:
        """The content, found where texts with two other contents differ; None where it is not kept as it is."""
        content = self.messages[number].content
        if not content.strip():
            return None
        frames = []
        for probe in "XY":
            probed = replace(self.messages[number], content=probe)
            try:
                frames.append(
                    _template(self.tokenizer, [*self.messages[:number], probed, *self.messages[number + 1 :]])
                )
            except ValueError:
                return None
        start = next((i for i, (one, other) in enumerate(zip(*frames, strict=False)) if one != other), None)
        if start is None:  # the template leaves this turn out
            return None
        end = len(self.text) - (len(frames[0]) - start - 1)
        kept = frames[0][:start] == self.text[:start] and frames[0][start + 1 :] == self.text[end:]
        return (start, end) if kept and self.text[start:end].strip() == content.strip() else None

    def _end_of_turn(self, first: int, content_end: int | None, turn_end: int) -> int | None:
        """The special token that ends the answer; between content and it there may only be white space.

        Without a content of its own (a tool call) it is the turn's last token, white space aside.
        """
        special = _special_tokens(self.tokenizer, len(self.tokenizer))
        if content_end is not None:
            behind = (i for i in range(first, len(self.ids)) if self.offsets[i][1] > content_end)
            end = next((i for i in behind if self.ids[i] in special), None)
            return end if end is not None and not self.text[content_end : self.offsets[end][0]].strip() else None
        inside = [i for i in range(first, len(self.ids)) if self.offsets[i][0] < turn_end]
        end = next((i for i in reversed(inside) if self.text[slice(*self.offsets[i])].strip()), None)
        return end if end is not None and self.ids[end] in special else None

    def _spans_that_spell_special_tokens(self) -> list[tuple[int, int]]:
        """Contents that spell out a special token: they are encoded as text, or data could forge roles."""
        names = _special_tokens(self.tokenizer, len(self.tokenizer)).values()
        spans = []
        for number, message in enumerate(self.messages):
            spelled = [name for name in names if name in message.content]
            if spelled:
                span = self._content_span(number)
                if span is None:
                    raise ValueError(f"turn {number + 1}: holds {spelled[0]}, and the chat template hides where")
                spans.append(span)
        return spans

    def _encode(self, length: int) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and offsets of the first `length` characters; contents that spell special tokens stay text."""
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        cuts = sorted({0, length, *(min(edge, length) for span in self.forged for edge in span)})
        for start, end in pairwise(cuts):
            is_forged = any(span[0] <= start < span[1] for span in self.forged)
            piece = self.tokenizer(
                self.text[start:end],
                add_special_tokens=False,
                return_offsets_mapping=True,
                split_special_tokens=is_forged,
            )
            ids += piece["input_ids"]
            offsets += [(start + a, start + b) for a, b in piece["offset_mapping"]]
        return ids, offsets


def _template(tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool = False) -> str:
    """The conversation as text; raises ValueError where the template refuses it, TimeoutError where it does not end."""
    turns = [message.as_turn() for message in messages]
    try:
        with _time_limit(TEMPLATE_SECONDS):
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TimeoutError:
        raise
    except Exception as error:  # whatever the template does wrong, it is not our mistake
        raise ValueError(f"the chat template refuses this conversation: {error}") from None
    if len(text) > LONGEST_RENDERED_CHARACTERS:
        raise ValueError(f"the chat template makes {len(text):,} characters of this conversation")
    return text


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError from what it holds after `seconds`; a thread other than the main one has no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise TimeoutError(f"the chat template did not end within {seconds:g} s; choose another --data.chat_template")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of every special token, also of those that have no role such as eos (Llama-3's <|eot_id|>)."""
    return frozenset(_special_tokens(tokenizer, len(tokenizer)))


@lru_cache(maxsize=4)
def _special_tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> dict[int, str]:
    """Special tokens by id; asking a tokenizer costs more than tokenising a row, so it is asked once for each size."""
    added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


def end_tokens(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> set[int]:
    """The tokens of this sample after which the model was taught to stop: the last one of each trained span."""
    following = [*sample.trained[1:], False]
    pairs = zip(sample.input_ids, sample.trained, following, strict=True)
    special = _special_tokens(tokenizer, len(tokenizer))
    return {token for token, now, after in pairs if now and not after and token in special}


def render_document(
    tokenizer: PreTrainedTokenizerBase, document: Document, max_length: int, overlap: int
) -> Iterator[Sample]:
    """Pieces of at most `max_length` tokens that train each token of the text once.

    Every piece starts with the tokenizer's begin token, if it uses one; all but the first repeat `overlap` tokens as
    context that is masked; the end token stands, trained, only at the document's true end. A piece ends where a
    paragraph does, or else a line, if there is one in its last quarter.
    """
    begin = begin_ids(tokenizer)
    # split_special_tokens: a text that spells "<|end_of_text|>" does not end the document
    encoded: Any = tokenizer(
        document.text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True
    )
    body: list[int] = [*encoded["input_ids"], tokenizer.eos_token_id]
    ranks = _ranks_of_ends(document.text, encoded["offset_mapping"])
    room = max_length - len(begin)
    start = 0
    while start < len(body):
        context = min(overlap, start, room - 1)
        end = start + room - context
        if end < len(body):
            late = range(end - (end - start) // 4, end + 1)
            end = max(late, key=lambda position: (ranks[position - 1], position))
        piece = body[start - context : end]
        masked = len(begin) + context
        trained = [False] * masked + [True] * (len(piece) - context)
        yield Sample(f"{document.source}@{start}", begin + piece, trained)
        start += len(piece) - context


def _ranks_of_ends(text: str, offsets: Sequence[tuple[int, int]]) -> list[int]:
    """For each token what ends with it: 2 a paragraph, 1 a line, 0 neither."""
    starts = [*(start for start, _ in offsets), len(text)]
    between = [text[here:after] for here, after in pairwise(starts)]
    return [2 if "\n\n" in part else 1 if "\n" in part else 0 for part in between]


def begin_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text: a begin token, or nothing."""
    added: list[int] = tokenizer("")["input_ids"]
    return added[:-1] if added and added[-1] == tokenizer.eos_token_id else added


def tokenizer_identity(tokenizer: Any) -> str:
    """Everything about the tokenizer that decides which ids a text gets, as one string."""
    settings = {
        "specials": tokenizer.special_tokens_map,
        "template": tokenizer.chat_template,
        "begin": tokenizer("")["input_ids"],
    }
    return tokenizer.backend_tokenizer.to_str() + json.dumps(settings, sort_keys=True, default=str)

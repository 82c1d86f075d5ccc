"""Records -> token ids and which of them are trained, made together; nothing is ever found again by its text."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from data_tools.records import Conversation, Document, Message

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


def render_prompt(tokenizer: PreTrainedTokenizerBase, messages: tuple[Message, ...]) -> str:
    """The text after which the model is to write the assistant's turn."""
    return _template(tokenizer, messages, add_generation_prompt=True)


def render_conversation(tokenizer: PreTrainedTokenizerBase, conversation: Conversation) -> Sample:
    """One sample in which exactly the assistant's turns and their end-of-turn tokens are trained.

    A turn's span is the difference between the template rendered up to its generation prompt and the template
    rendered through it, as characters; the token boundaries are cross-checked by tokenising that prefix alone.
    Raises ValueError, naming the turn, where the template or the tokenizer makes this ambiguous.
    """
    text = _template(tokenizer, conversation.messages)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = encoded["input_ids"]
    starts = [start for start, _ in encoded["offset_mapping"]]
    trained = [False] * len(ids)
    for number, message in enumerate(conversation.messages):
        if message.role != "assistant":
            continue
        prefix = render_prompt(tokenizer, conversation.messages[:number])
        through = _template(tokenizer, conversation.messages[: number + 1])
        if not (through.startswith(prefix) and text.startswith(through)):
            raise ValueError(
                f"turn {number + 1}: the chat template rewrites earlier turns, so the answer's place is unknown"
            )
        first = next((i for i, start in enumerate(starts) if start >= len(prefix)), len(ids))
        if tokenizer(prefix, add_special_tokens=False)["input_ids"] != ids[:first]:
            raise ValueError(f"turn {number + 1}: the tokenizer merges the prompt's end with the answer's beginning")
        last = _end_of_turn(tokenizer, ids, first, [i for i, s in enumerate(starts) if s < len(through)][-1])
        if last is None:
            raise ValueError(f"turn {number + 1}: the chat template ends the answer without a special token to stop at")
        trained[first : last + 1] = [True] * (last + 1 - first)
    return Sample(conversation.source, ids, trained)


def _template(tokenizer: Any, messages: tuple[Message, ...], add_generation_prompt: bool = False) -> str:
    turns = [{"role": message.role, "content": message.content} for message in messages]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=add_generation_prompt)


def _end_of_turn(tokenizer: Any, ids: list[int], first: int, last: int) -> int | None:
    """Index of the special token that ends the turn ids[first:last + 1], behind which only white space may follow."""
    special = special_ids(tokenizer)
    while last >= first and ids[last] not in special and not tokenizer.decode([ids[last]]).strip():
        last -= 1
    return last if last >= first and ids[last] in special else None


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of every special token, also of those that have no role such as eos (Llama-3's <|eot_id|>)."""
    added = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def end_tokens(tokenizer: PreTrainedTokenizerBase, sample: Sample) -> set[int]:
    """The tokens of this sample after which the model was taught to stop: the last one of each trained span."""
    following = [*sample.trained[1:], False]
    pairs = zip(sample.input_ids, sample.trained, following, strict=True)
    return {token for token, now, after in pairs if now and not after} & special_ids(tokenizer)


def render_document(
    tokenizer: PreTrainedTokenizerBase, document: Document, max_length: int, overlap: int
) -> Iterator[Sample]:
    """Pieces of at most `max_length` tokens that train each token of the text once.

    Every piece starts with the tokenizer's begin token, if it uses one; all but the first repeat `overlap` tokens as
    context that is masked; the end token stands, trained, only at the document's true end.
    """
    begin: list[int] = tokenizer("")["input_ids"]
    if begin and begin[-1] == tokenizer.eos_token_id:
        begin = begin[:-1]
    # split_special_tokens: a text that spells "<|end_of_text|>" does not end the document
    body: list[int] = tokenizer(document.text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    body.append(tokenizer.eos_token_id)
    room = max_length - len(begin)
    start = 0
    while start < len(body):
        context = min(overlap, start)
        piece = body[start - context : start - context + room]
        masked = len(begin) + context
        trained = [False] * masked + [True] * (len(piece) - context)
        yield Sample(f"{document.source}@{start}", begin + piece, trained)
        start += len(piece) - context


def tokenizer_identity(tokenizer: Any) -> str:
    """Everything about the tokenizer that decides which ids a text gets, as one string."""
    settings = {
        "specials": tokenizer.special_tokens_map,
        "template": tokenizer.chat_template,
        "begin": tokenizer("")["input_ids"],
    }
    return tokenizer.backend_tokenizer.to_str() + json.dumps(settings, sort_keys=True, default=str)

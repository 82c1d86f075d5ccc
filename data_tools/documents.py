"""Raw text -> samples, each of at most max_length tokens."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

from data_tools.encode import Encoder, SpelledTokens
from data_tools.records import Document
from data_tools.samples import Sample, begin_ids


def render_document(encoder: Encoder, document: Document, max_length: int, overlap: int) -> Iterator[Sample]:
    """Samples of at most `max_length` tokens that together train each token of the text once.

    Each begins with the tokenizer's begin tokens, if any; all but the first repeat `overlap` tokens as masked context;
    the end token follows, trained, only at the document's end. A sample ends with a paragraph, or else with a line, if
    one ends in its last quarter.
    """
    begin, text, spelled = begin_ids(encoder.tokenizer), document.text, None
    if encoder.special_pattern.search(text):  # "<|end_of_text|>" in the text does not end the document
        spelled = SpelledTokens(encoder.special_pattern, text)
        text = spelled.hide(text)
    encoded = encoder.encode(text, spelled)
    body = [*encoded.ids, encoder.tokenizer.eos_token_id]
    ranks = _break_ranks(text, encoded.offsets)
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

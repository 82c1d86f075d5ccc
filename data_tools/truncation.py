"""Truncation policies for conversations longer than data.max_length."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from data_tools.samples import Sample

Policy = Literal["drop", "left", "right", "split"]


@dataclass(frozen=True)
class Fitted:
    """The samples made from a record, and whether an answer lost tokens."""

    samples: list[Sample]
    is_answer_cut: bool = False


def fit(sample: Sample, max_length: int, policy: Policy, begin: Sequence[int]) -> Fitted:
    """Samples of at most `max_length` tokens; a trained answer keeps its end token, or the row is dropped.

    drop: no sample. left: the beginning is cut, except the begin tokens, so prompts are lost first. right: the end is
    cut, back to the end of the last whole answer. split: consecutive pieces, each with the begin tokens, or else behind
    a token of the one before; only the last piece of an answer has its end token. Raises ValueError for another policy.
    """
    if len(sample.input_ids) <= max_length:
        return Fitted([sample])
    begin_length = len(begin) if sample.input_ids[: len(begin)] == list(begin) else 0
    match policy:
        case "drop":
            return Fitted([])
        case "left":
            return _keep_end(sample, max_length, begin_length)
        case "right":
            return _keep_beginning(sample, max_length)
        case "split":
            return _split(sample, max_length, begin_length)
    raise ValueError(f"unknown data.truncation {policy!r}: use drop, left, right or split")


def _keep_end(sample: Sample, max_length: int, begin_length: int) -> Fitted:
    start = len(sample.input_ids) - (max_length - begin_length)
    kept = _part(sample, start, len(sample.input_ids), begin_length)
    # only an answer that is cut in the middle loses tokens; answers before it are dropped whole
    cut = sample.trained[start] and sample.trained[start - 1]
    return Fitted([kept] if kept.num_supervised_tokens else [], cut)


def _keep_beginning(sample: Sample, max_length: int) -> Fitted:
    ends = [i for i in range(max_length) if sample.trained[i] and not sample.trained[i + 1]]
    if not ends:
        return Fitted([])
    return Fitted([_part(sample, 0, ends[-1] + 1, 0)], is_answer_cut=any(sample.trained[ends[-1] + 1 :]))


def _split(sample: Sample, max_length: int, begin_length: int) -> Fitted:
    context = 0 if begin_length else 1  # nothing predicts a piece's first token: a masked one stands before it
    starts, ends, size = [begin_length], [max_length], len(sample.input_ids)
    while ends[-1] < size:
        starts.append(ends[-1])
        ends.append(min(size, ends[-1] + max(1, max_length - begin_length - context)))
    parts = [
        _part(sample, start, end, begin_length, context if start > begin_length else 0)
        for start, end in zip(starts, ends, strict=True)
    ]
    cut = any(sample.trained[start - 1] and sample.trained[start] for start in starts)
    return Fitted([part for part in parts if part.num_supervised_tokens], cut)


def _part(sample: Sample, start: int, end: int, begin_length: int, context: int = 0) -> Sample:
    """Tokens [start, end) behind the begin tokens, and behind the `context` tokens before them, masked."""
    begin = sample.input_ids[:begin_length]
    questions = [
        # of an answer whose beginning is cut off, nobody could be asked the question
        question if first >= start else ""
        for (first, last), question in zip(sample.runs(), sample.questions, strict=False)
        if last > start and first < end
    ]
    return Sample(
        sample.source,
        begin + sample.input_ids[start - context : end],
        [False] * (begin_length + context) + sample.trained[start:end],
        tuple(questions),
    )

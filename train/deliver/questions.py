"""The questions that are asked after training: what stood before trained answers, token for token as it was trained."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from data_tools.encode import special_ids
from data_tools.samples import Sample


@dataclass(frozen=True)
class Question:
    """A prompt as token ids, what was asked in it last, and the answer in the data."""

    prompt: list[int]
    text: str
    reference: str


def questions_of(
    samples: Dataset, chosen: Iterable[int], tokenizer: PreTrainedTokenizerBase, count: int
) -> list[Question]:
    """The questions of the first `count` of the chosen samples that end in an answer which was trained whole."""
    found = (question for i in chosen if (question := _question(samples[i], tokenizer)) is not None)
    return list(islice(found, count))


def _question(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Question | None:
    """The question before a sample's last answer; None for text, and for an answer that was cut."""
    if not row["question"]:
        return None
    start, end = Sample(row["source"], row["input_ids"], row["trained"]).runs()[-1]
    ids: list[int] = row["input_ids"]
    if not start or ids[end - 1] not in special_ids(tokenizer):
        return None
    return Question(ids[:start], row["question"], str(tokenizer.decode(ids[start : end - 1])).strip())

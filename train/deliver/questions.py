"""Questions with their prompts, token for token as training has them before an answer: of samples, and of a file."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from data_tools.compressed import DAMAGE, kind_of, open_bytes
from data_tools.encode import special_ids
from data_tools.messages import Message
from data_tools.prepare import PrepareSettings, prepare
from data_tools.prompts import PromptRenderer
from data_tools.remainder import first_line
from data_tools.report import DataError
from data_tools.samples import Sample


@dataclass(frozen=True)
class Question:
    """A prompt as token ids, what was asked in it last, and the answer in the data, or None."""

    prompt: list[int]
    text: str
    reference: str | None
    path_number: int = 0  # which of the user's paths it is from


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
    reference = str(tokenizer.decode(ids[start : end - 1])).strip()
    return Question(ids[:start], row["question"], reference, row.get("path_number", 0))


def questions_in(
    path: Path, settings: PrepareSettings, tokenizer: PreTrainedTokenizerBase, count: int
) -> tuple[list[Question], list[str]]:
    """The first `count` questions of a file, and notes: rows as data.path reads them, or a text, a question a line.

    `settings` say how conversations are rendered; raises DataError where the file cannot be read.
    """
    if kind_of(path) == ".txt":
        return _questions_in_lines(path, settings, tokenizer, count), []
    prepared = prepare(replace(settings, paths=(str(path),)), tokenizer)
    found = questions_of(prepared.dataset, range(len(prepared.dataset)), tokenizer, count)
    dropped = prepared.statistics.num_dropped
    if not found:
        raise DataError(f"{path}: it has no question with an answer; write rows of prompt and response, or messages")
    return found, [f"{path}: {dropped} rows are longer than the model takes, and not asked"] if dropped else []


def _questions_in_lines(
    path: Path, settings: PrepareSettings, tokenizer: PreTrainedTokenizerBase, count: int
) -> list[Question]:
    try:
        with open_bytes(path) as file:
            lines: Sequence[str] = file.read().decode("utf-8-sig").splitlines()
    except (*DAMAGE, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read: {first_line(error)}") from None
    prompts, found = PromptRenderer(tokenizer, settings.render), []
    for number, line in enumerate(lines, start=1):
        if line.strip() and len(found) < count:
            try:
                found.append(Question(prompts.ids([Message("user", line.strip())]), line.strip(), None))
            except ValueError as error:
                raise DataError(f"{path}:{number}: {error}") from None
    if not found:
        raise DataError(f"{path}: it has no line with a question")
    return found

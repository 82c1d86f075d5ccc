"""What a run is validated on: held-out samples by data path, a general text, and a few questions."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from data_tools.prepare import Prepared, prepare
from data_tools.report import DataError
from train.config import Config
from train.data import Splits, prepare_settings
from train.deliver.questions import Question, questions_in, questions_of
from train.profiles import DEMO
from train.seeds import derived_seed

BUNDLED, OFF = "bundled", "off"
GENERAL_TOKENS = 256


@dataclass(frozen=True)
class Material:
    """Samples and questions; all of it may be empty, and then nothing is measured.

    `parts` are the held-out samples by the number of their data path, counted from 1.
    """

    parts: Mapping[int, Dataset] = field(default_factory=dict)
    general: Dataset | None = None  # not part of the validation loss
    questions: tuple[Question, ...] = ()
    general_questions: tuple[Question, ...] = ()  # asked at the end
    tokenizer: Any = None  # of the questions and their answers
    end_token_ids: tuple[int, ...] = ()
    fingerprint: str = ""  # equal where the validation losses can be compared
    content: str = ""  # equal where all losses are measured on the same

    @property
    def texts(self) -> list[Dataset]:
        """All that a loss is taken on."""
        return [*self.parts.values(), *([] if self.general is None else [self.general])]

    @property
    def longest(self) -> int:
        """Tokens of the longest sample; 0 where there is none."""
        return max((max(samples["num_tokens"][:]) for samples in self.texts), default=0)


def material_of(config: Config, tokenizer: Any, splits: Splits, today: date) -> Material:
    """What `config` wants to be measured on; raises DataError where a general text or question cannot be used."""
    held_out, general = splits.validation, general_text(config, tokenizer, splits, today)
    found = Material(
        general=general.dataset if general else None,
        content=general.fingerprint if general else "",
        general_questions=general_questions(config, tokenizer, today),
        tokenizer=tokenizer,
        end_token_ids=tuple(splits.training.prepared.statistics.end_token_ids),
    )
    if held_out is None:
        return found
    samples: Any = held_out.samples
    path_numbers = samples["path_number"][:]
    chosen = subset(samples["num_tokens"][:], path_numbers, config.validate.tokens, config.train.seed)
    paths = np.asarray(path_numbers)[chosen]
    parts = {
        int(path) + 1: samples.select([chosen[i] for i in np.flatnonzero(paths == path)]) for path in np.unique(paths)
    }
    decisive = (held_out.prepared.fingerprint, config.data.validation_fraction, config.validate.tokens, chosen)
    fingerprint = hashlib.sha256(repr(decisive).encode()).hexdigest()[:32]
    return replace(
        found,
        parts=parts,
        questions=tuple(_questions(samples, tokenizer, config.validate.num_questions)),
        end_token_ids=tuple(held_out.prepared.statistics.end_token_ids),
        fingerprint=fingerprint,
        content=f"{fingerprint} {found.content}",
    )


def _questions(samples: Any, tokenizer: Any, count: int) -> list[Question]:
    """The first `count`; a column says where they are, so that texts, which have none, are not read."""
    asking = [i for i, question in enumerate(samples["question"][:]) if question] if count else []
    return questions_of(samples, asking, tokenizer, count)


def subset(num_tokens: Sequence[int], path_numbers: Sequence[int], budget: int, seed: int) -> list[int]:
    """The samples that are measured each time: all (budget 0), or as many drawn ones as `budget` tokens hold.

    At least one of each path. A drawn sample that does not fit is left out, and smaller ones may follow.
    """
    if not budget or sum(num_tokens) <= budget:
        return list(range(len(num_tokens)))
    generator = torch.Generator().manual_seed(derived_seed(seed, "validation subset"))
    chosen: set[int] = set()
    left = budget
    order = torch.randperm(len(num_tokens), generator=generator).tolist()
    first = {path_numbers[i]: i for i in reversed(order)}.values()  # the first drawn of each path
    for i in [*first, *order]:
        if i not in chosen and (num_tokens[i] <= left or len(chosen) < len(first)):
            chosen.add(i)
            left -= num_tokens[i]
    return sorted(chosen)


def general_text(config: Config, tokenizer: Any, splits: Splits, today: date) -> Prepared | None:
    """The text on which forgetting is measured; None where it is off.

    In pieces that are as long as the training samples, or GENERAL_TOKENS: longer ones would need more room than
    training does. The bundled text is measured only beside held-out samples. Raises DataError where the user's cannot
    be read.
    """
    wanted = config.validate.general_text
    if wanted == OFF or (wanted == BUNDLED and splits.validation is None):
        return None
    path = str(DEMO / "general.txt") if wanted == BUNDLED else wanted
    longest = max(GENERAL_TOKENS, max(splits.training.samples["num_tokens"][:]))
    settings = replace(prepare_settings(config, (path,), today), max_length=min(longest, config.data.max_length))
    try:
        return prepare(replace(settings, text_overlap=0, format="text", fields=(), on_error="stop"), tokenizer)
    except DataError as error:
        raise DataError(f"--validate.general_text {wanted}: {error}") from None


def general_questions(config: Config, tokenizer: Any, today: date) -> tuple[Question, ...]:
    """The questions beside the data's that are asked at the end; raises DataError where they cannot be read.

    At most compare.num_questions of them; bundled ones that the chat template cannot render are not asked.
    """
    wanted, count = config.compare.general_questions, config.compare.num_questions
    if wanted == OFF or not count or config.train.method == "full":
        return ()
    path = DEMO / "general_questions.jsonl" if wanted == BUNDLED else Path(wanted)
    settings = replace(prepare_settings(config, (), today), format="auto", fields=(), on_error="stop")
    try:
        return tuple(questions_in(path, settings, tokenizer, count)[0])
    except DataError as error:
        if wanted == BUNDLED:
            return ()
        raise DataError(f"--compare.general_questions {wanted}: {error}") from None

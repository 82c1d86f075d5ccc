"""Base and tuned model of a finished run side by side: answers by group of questions, and losses, as compare.json."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from pathlib import Path
from statistics import fmean
from typing import Any

from data_tools.prepare import DataSplit, Prepared, PrepareSettings, prepare
from data_tools.report import DataError
from train.data import TrainingData, prepare_settings
from train.deliver.compare import Answer, compare
from train.deliver.finished import FinishedRun, Tuned, data_of, today_of
from train.deliver.generation import Completion, Generator
from train.deliver.losses import TokenLoss, losses_of
from train.deliver.questions import Question, questions_in, questions_of
from train.deliver.scores import rate
from train.layout import BatchLayout
from train.models.shape import max_positions
from train.models.tokenizer import load_tokenizer
from train.run.attempts import last_start
from train.run.exits import ExitWith

TRAINED, HELD_OUT, GENERAL, ASKED = "trained", "held out", "general", "questions"


@dataclass(frozen=True)
class Wanted:
    """What is to be compared."""

    num_questions: int  # of each group at most
    max_new_tokens: int
    num_loss_tokens: int  # of each text at most, in whole samples
    general_questions: Path
    general_text: Path
    questions: Path | None = None  # the user's


@dataclass
class Material:
    """What the models are asked, by group; the samples on which the loss is taken; and what is missing or differs."""

    questions: dict[str, list[Question]] = field(default_factory=dict)
    samples: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Comparison:
    """What was found."""

    run: FinishedRun
    wanted: Wanted
    answers: dict[str, list[Answer]]
    losses: dict[str, TokenLoss]
    notes: list[str]

    def as_json(self) -> dict[str, Any]:
        """As compare.json has it; the adapter's hash says of which final/ it is."""
        run, wanted = self.run, self.wanted
        return {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "run": str(run.folder.path),
            "base": run.base.get("name", run.config.model.name_or_path),
            "adapter_sha256": run.adapter_sha256,
            "device": str(run.device),
            "max_new_tokens": wanted.max_new_tokens,
            "groups": {_key(name): group_json(found) for name, found in self.answers.items()},
            "losses": {_key(name): loss.as_json() for name, loss in self.losses.items()},
            "notes": self.notes,
        }


def material_of(run: FinishedRun, wanted: Wanted) -> Material:
    """Questions and samples of the run's data as far as it is still there, of the user's files and of the bundled ones.

    Raises ExitWith(BAD_INPUT) or DataError where a file of the user's cannot be used.
    """
    tokenizer: Any = load_tokenizer(run.config).backend
    found, count = Material(), wanted.num_questions
    training, validation = _data(run, tokenizer, found.notes)
    if training is not None:
        data = TrainingData(training.samples, run.config, _layout(run), tokenizer.pad_token_id)
        visited = data.visited_samples(run.base.get("step") or data.total_steps(run.config.train))
        found.questions[TRAINED] = questions_of(training.samples, visited, tokenizer, count)
    if validation is not None:
        samples: Any = validation.samples
        found.questions[HELD_OUT] = questions_of(samples, range(len(samples)), tokenizer, count)
        found.samples[HELD_OUT] = first_samples(samples, wanted.num_loss_tokens)
    plain = _plain_settings(run, today_of(run))
    longest = max_positions(run.config.model) or run.config.data.max_length
    try:
        asked = replace(plain, max_length=longest, fields=())
        found.questions[GENERAL] = questions_in(wanted.general_questions, asked, tokenizer, count)[0]
    except DataError as error:  # a chat template that cannot render them, for example without a system prompt
        found.notes.append(f"general questions are not asked: {error}")
    if wanted.questions is not None:
        settings = replace(plain, max_length=longest)
        found.questions[ASKED], notes = questions_in(wanted.questions, settings, tokenizer, count)
        found.notes += notes
    text = prepare(replace(plain, paths=(str(wanted.general_text),)), tokenizer)
    found.samples[GENERAL] = first_samples(text.dataset, wanted.num_loss_tokens)
    found.notes += [f"{name}: it has no questions" for name, each in found.questions.items() if not each]
    found.questions = {name: each for name, each in found.questions.items() if each}
    return found


def first_samples(samples: Any, num_tokens: int) -> list[dict[str, Any]]:
    """The first samples that together have at most `num_tokens` tokens; the first one in any case."""
    taken, total = 0, 0
    for length in samples["num_tokens"][:]:
        if taken and total + length > num_tokens:
            break
        taken, total = taken + 1, total + length
    return [samples[number] for number in range(taken)]


def compared(tuned: Tuned, material: Material, wanted: Wanted, say: Callable[[str], None]) -> Comparison:
    """Asks and measures both models; `say` is told what begins."""
    generator = Generator(tuned.model, tuned.tokenizer, tuned.end_token_ids, wanted.max_new_tokens)
    answers: dict[str, list[Answer]] = {}
    for name, questions in material.questions.items():
        say(f"asking {len(questions)} questions ({name}), without and with the adapters")
        answers[name] = compare(generator, questions, lambda: False)
    losses, pad = {}, int(getattr(tuned.tokenizer, "pad_token_id", 0) or 0)
    for name, samples in material.samples.items():
        say(f"loss on {len(samples)} samples ({name}), without and with the adapters")
        losses[name] = losses_of(tuned.model, samples, pad)
    return Comparison(tuned.run, wanted, answers, losses, material.notes)


def group_json(answers: Sequence[Answer]) -> dict[str, Any]:
    """A group's figures for both models, and each answer with its own."""
    return {
        "num_questions": len(answers),
        "before": _figures([(answer, answer.before) for answer in answers]),
        "after": _figures([(answer, answer.after) for answer in answers]),
        "unchanged": rate([answer.before.text == answer.after.text for answer in answers]),
        "answers": [
            {
                "question": answer.question,
                "reference": answer.reference,
                "before": _one(answer, answer.before),
                "after": _one(answer, answer.after),
            }
            for answer in answers
        ],
    }


def _figures(given: Sequence[tuple[Answer, Completion]]) -> dict[str, Any]:
    """Shares with their counts and intervals, and means; of scores over the questions that have a reference."""
    scores = [found for answer, completion in given if (found := answer.score(completion)) is not None]
    return {
        "exact": rate([found.exact for found in scores]),
        "normalised_exact": rate([found.normalised_exact for found in scores]),
        "contained": rate([found.contained for found in scores]),
        "f1": fmean(found.f1 for found in scores) if scores else None,
        "stopped": rate([completion.is_stopped for _, completion in given]),
        "mean_tokens": fmean(completion.num_tokens for _, completion in given),
    }


def _one(answer: Answer, completion: Completion) -> dict[str, Any]:
    found = answer.score(completion)
    scores = {} if found is None else dict(vars(found))
    return {
        "text": completion.text,
        **scores,
        "stopped": completion.is_stopped,
        "num_tokens": completion.num_tokens,
    }


def _data(run: FinishedRun, tokenizer: Any, notes: list[str]) -> tuple[DataSplit | None, DataSplit | None]:
    """Training and validation data, each as far as it can be had; what cannot is noted."""
    try:
        splits, changed = data_of(run)
        notes += changed
        return splits.training, splits.validation
    except (ExitWith, DataError) as error:
        way_out = "; if it has moved, write --data.path NEWPLACE" if isinstance(error, DataError) else ""
        notes.append(f"the data of the run cannot be used: {getattr(error, 'reason', error)}{way_out}")
    config = run.config
    if not config.data.validation_path:
        return None, None
    alone = replace(config, data=replace(config.data, validation_path=()))
    try:
        return data_of(replace(run, config=alone))[0].training, None
    except (ExitWith, DataError):
        pass
    try:
        held_out: Prepared = prepare(prepare_settings(config, config.data.validation_path, today_of(run)), tokenizer)
        return None, DataSplit(held_out, held_out.dataset)
    except DataError:
        return None, None


def _layout(run: FinishedRun) -> BatchLayout:
    """How the run's steps were divided; a resumed one's may differ, but not the samples of a step."""
    processes = last_start(run.folder).get("num_processes")
    batch, num_processes = run.config.batch, processes if isinstance(processes, int) else 1
    return BatchLayout.of_first(batch, num_processes)


def _plain_settings(run: FinishedRun, today: date) -> PrepareSettings:
    """How files beside the run's data are read: in any format, rendered as the run's data."""
    return replace(prepare_settings(run.config, (), today), format="auto", on_error="stop")


def _key(name: str) -> str:
    return name.replace(" ", "_")

"""Answers before and after, their scores, and how answers changed while training."""

import json
from collections.abc import Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

from train.deliver.scores import rate
from train.report.blocks import Block, Cell, Question, Questions, Reply, Section, Table, Text
from train.report.record import RunRecord, objects_of
from train.report.values import NOTHING, at, number, plural, shown, whole
from train.run.folder import read_object

MAX_QUESTIONS = 60  # of a group
MAX_TEXT = 1200  # characters of an answer
MAX_VALIDATIONS = 12  # of a question


def answers_section(run: RunRecord, notes: list[str]) -> Section:
    """Scores, then questions with their answers; what cannot be read is noted."""
    comparison = read_object(run.folder.comparison)
    if not comparison and run.folder.comparison.exists():
        notes.append(f"{run.folder.comparison.name} is damaged")
    blocks = [*_scores(at(comparison, "groups")), *_losses(at(comparison, "losses"))]
    asked = set()  # groups whose answers are here twice: at the run's end, and by handloop compare
    for kind, path in run.folder.asked.items():
        rows = _listed(path, notes)
        if rows:
            asked.add(kind)
            blocks.append(_asked(kind.replace("_", "-"), rows, path.name))
    groups = at(comparison, "groups")
    for name, group in groups.items() if isinstance(groups, dict) else ():
        rows = _items(at(group, "answers"))
        if rows and name not in asked:
            blocks.append(_compared(shown(name).replace("_", " "), rows, run.folder.comparison.name))
    blocks += _while_training(objects_of(run.folder.validation_answers, notes))
    if not blocks:
        blocks.append(Text("No answers are recorded in this folder: handloop compare asks base and tuned model."))
    return Section("answers", "Answers before and after", blocks)


def _scores(groups: Any) -> list[Block]:
    rows: list[list[Cell]] = []
    for name, group in groups.items() if isinstance(groups, dict) else ():
        for when in ("before", "after"):
            found = at(group, when)
            shares = [_share(at(found, key)) for key in ("exact", "normalised_exact", "contained", "stopped")]
            kind = f"{shown(name).replace('_', ' ')}, {when}"
            rows.append(
                [
                    kind,
                    whole(at(group, "num_questions")),
                    *shares,
                    *(number(at(found, key)) for key in ("f1", "mean_tokens")),
                ]
            )
    header = [
        "questions",
        "count",
        "word for word",
        "nearly",
        "contained in the answer",
        "ended by themselves",
        "word F1",
        "tokens, mean",
    ]
    return [Table("Scores of handloop compare, with 95 % intervals (Wilson)", header, rows)] if rows else []


def _losses(losses: Any) -> list[Block]:
    rows: list[list[Cell]] = []
    for name, found in losses.items() if isinstance(losses, dict) else ():
        figures = [number(at(found, key)) for key in ("before", "after", "difference")]
        rows.append(
            [
                f"{shown(name).replace('_', ' ')} {'text' if name == 'general' else 'rows'}",
                *figures,
                whole(at(found, "num_tokens")),
            ]
        )
    header = ["loss per token", "before", "after", "difference", "tokens"]
    return (
        [Table("Losses of handloop compare; a rise on general text is what was forgotten", header, rows)]
        if rows
        else []
    )


def _share(found: Any) -> str:
    """`12 % (4 to 28)`."""
    share, low, high = (number(at(found, key)) for key in ("share", "low", "high"))
    if share is None or low is None or high is None:
        return NOTHING
    return f"{100 * share:.0f} % ({100 * low:.0f} to {100 * high:.0f})"


def _asked(kind: str, rows: Sequence[dict[str, Any]], name: str) -> Questions:
    """The answers that a run ends with."""
    told = []
    for when, exact, stopped in (("before", "before_exact", "before_stopped"), ("after", "exact", "stopped")):
        shares = [rate([row.get(key) is True for row in rows]) for key in (exact, stopped)]
        counts = [
            f"{each['count']} {what}, {_share(each)}"
            for each, what in zip(shares, ("word for word", "ended by themselves"), strict=True)
        ]
        told.append(f"{when}: {'; '.join(counts)}")
    questions = [
        Question(
            _short(row.get("question")),
            [
                Reply("reference", _short(row.get("reference"))),
                Reply("before", _short(row.get("before")), _remark(row.get("before_exact"), row.get("before_stopped"))),
                Reply("after", _short(row.get("after")), _remark(row.get("exact"), row.get("stopped"))),
            ],
        )
        for row in rows[:MAX_QUESTIONS]
    ]
    return Questions(
        f"{kind.capitalize()} questions",
        f"{plural(len(rows), 'question')}. {'. '.join(told)}.{_rest(rows, name)}",
        questions,
    )


def _compared(kind: str, rows: Sequence[dict[str, Any]], name: str) -> Questions:
    """A group of answers of handloop compare."""
    questions = []
    for row in rows[:MAX_QUESTIONS]:
        reference = [Reply("reference", _short(row["reference"]))] if row.get("reference") is not None else []
        replies = [
            Reply(when, _short(at(row, when, "text")), _remark(at(row, when, "exact"), at(row, when, "stopped")))
            for when in ("before", "after")
        ]
        questions.append(Question(_short(row.get("question")), [*reference, *replies]))
    return Questions(
        f"Questions of handloop compare: {kind}", f"{plural(len(rows), 'question')}.{_rest(rows, name)}", questions
    )


def _while_training(rows: Sequence[dict[str, Any]]) -> list[Block]:
    """How the answer to each question changed from validation to validation."""
    rows = [row for row in rows if whole(row.get("step")) is not None]
    questions = []
    for _, each in groupby(
        sorted(rows, key=lambda row: shown(row.get("question"))), key=lambda row: shown(row.get("question"))
    ):
        answers = sorted(each, key=lambda row: row["step"])
        stride = -(-len(answers) // MAX_VALIDATIONS)
        kept = [*answers[-1::-stride]][::-1]
        replies = [Reply("reference", _short(kept[0].get("reference"))), Reply("base", _short(kept[0].get("before")))]
        replies += [
            Reply(f"step {row['step']:,}", _short(row.get("now")), _remark(row.get("exact"), row.get("stopped")))
            for row in kept
        ]
        questions.append(Question(_short(kept[0].get("question")), replies))
    summary = f"{plural(len(questions), 'held-out question')}, asked at validations of the weights of that step."
    return [Questions("Answers while training", summary, questions[:MAX_QUESTIONS], num_open=1)] if questions else []


def _rest(rows: Sequence[Any], name: str) -> str:
    return f" The first {MAX_QUESTIONS} are shown, {name} has all." if len(rows) > MAX_QUESTIONS else ""


def _short(text: Any) -> str:
    text = "(none)" if text is None or text == "" else shown(text)
    return text if len(text) <= MAX_TEXT else f"{text[:MAX_TEXT]} ... ({len(text) - MAX_TEXT:,} more characters)"


def _remark(exact: Any, stopped: Any) -> str:
    told = ["word for word"] if exact is True else []
    return ", ".join([*told, "did not end by itself"] if stopped is False else told)


def _listed(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The objects of a JSON list; what cannot be read is noted."""
    if not path.exists():
        return []
    with suppress(OSError, ValueError, RecursionError):
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, list):
            return _items(found)
    notes.append(f"{path.name} is damaged")
    return []


def _items(value: Any) -> list[dict[str, Any]]:
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []

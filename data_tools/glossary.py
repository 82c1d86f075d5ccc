"""A glossary in, prompt/response rows out: several wordings of each question to train, other wordings to validate."""

import argparse
import difflib
import itertools
import json
import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from data_tools.glossary_files import Glossary, Term, read_terms
from data_tools.records import DataError, Report

# Compared are names that differ in one letter, of which one begins the other, or with at least this difflib ratio:
# dry lease and wet lease have 0.67, light jet and regional jet 0.48.
LEAST_LIKENESS = 0.65
COMPARISONS_PER_TERM = 2  # or a few families, such as SAP's VA01, VA02, VA03, would take all of them


@dataclass(frozen=True)
class Wordings:
    """The ways to ask one kind of question; what validates is never trained."""

    training: tuple[str, ...]
    held_out: tuple[str, ...]


# No wording puts an article before the term: it may be an abbreviation, a transaction code, or a word in any number.
WORDINGS = {
    "definition": Wordings(
        training=(
            "What does {term} mean{context}?",
            "What is meant by {term}{context}?",
            "What is the meaning of {term}{context}?",
            "Define {term}{context}.",
            "Give a definition of {term}{context}.",
            "How is {term} defined{context}?",
            "Explain {term}{context}.",
            "Explain the term {term}{context}.",
            "What does the term {term} refer to{context}?",
            "How would you describe {term}{context}?",
            "I came across {term}{context}. What is it?",
            "Tell me what {term} means{context}.",
        ),
        held_out=(
            "Could you tell me the meaning of {term}{context}?",
            "What should I understand by {term}{context}?",
            "Please explain what {term} is{context}.",
            "How would you define {term}{context}?",
            "Someone mentioned {term}{context}. What is that?",
            "Remind me what {term} means{context}.",
        ),
    ),
    "examples": Wordings(
        training=("Give examples of {term}{context}.",),
        held_out=("Which examples of {term} are there{context}?",),
    ),
    "comparison": Wordings(
        training=("What is the difference between {term} and {other}{context}?",),
        held_out=("How do {term} and {other} differ{context}?",),
    ),
}


@dataclass(frozen=True)
class PairSettings:
    """How many rows to make of a glossary, and from which seed."""

    forms: int = 4  # wordings in which a definition is asked in training
    held_out_forms: int = 2  # and in validation
    comparisons: int = 50  # at most so many pairs of terms are compared
    seed: int = 0
    context: str = ""  # put into every question, such as `in the Embraer context`

    def check(self) -> None:
        """Raises DataError naming every impossible number."""
        report, wordings = Report(), WORDINGS["definition"]
        for option, value, most in (
            ("--forms", self.forms, len(wordings.training)),
            ("--held-out-forms", self.held_out_forms, len(wordings.held_out)),
        ):
            if not 1 <= value <= most:
                report.add(f"{option} {value}", f"there are {most} wordings to choose from; give 1 to {most}")
        if self.comparisons < 0:
            report.add(f"--comparisons {self.comparisons}", "must be 0 or more")
        report.raise_if_any()


@dataclass(frozen=True)
class Question:
    """One row and where it comes from."""

    prompt: str
    response: str
    kind: str  # a key of WORDINGS
    held_out: bool
    where: str

    def as_row(self) -> dict[str, str]:
        """The row as it stands in a JSONL file."""
        return {"prompt": self.prompt, "response": self.response}


@dataclass(frozen=True)
class Pairs:
    """All questions in a shuffled order that does not depend on the order of the glossary."""

    questions: tuple[Question, ...]
    num_duplicates: int

    def rows(self, held_out: bool) -> list[dict[str, str]]:
        """The rows of one of the two files."""
        return [question.as_row() for question in self.questions if question.held_out == held_out]

    def count(self, held_out: bool, kind: str) -> int:
        """How many questions of a kind one of the two files holds."""
        return sum(question.held_out == held_out and question.kind == kind for question in self.questions)


def make_pairs(terms: Sequence[Term], settings: PairSettings) -> Pairs:
    """Every question about every term, no prompt twice; raises DataError where two answers share a prompt."""
    settings.check()
    report = Report()
    questions: dict[str, Question] = {}
    num_duplicates = 0
    for question in _questions(terms, settings):
        first = questions.setdefault(question.prompt, question)
        if (first.response, first.where) != (question.response, question.where):
            report.add(question.where, f"the question {first.prompt!r} also asks for {first.where}; rename one term")
        elif first is not question:
            num_duplicates += 1
    report.raise_if_any()
    shuffled = sorted(questions.values(), key=lambda question: _random(settings.seed, question.prompt).random())
    return Pairs(tuple(shuffled), num_duplicates)


def _questions(terms: Sequence[Term], settings: PairSettings) -> Iterator[Question]:
    """The questions on each term's definition and examples, and on pairs of terms."""
    for term in terms:
        yield from _asked("definition", (term,), term.definition, settings)
        if term.examples:
            yield from _asked("examples", (term,), f"For example: {_sentence('; '.join(term.examples))}", settings)
    for first, second in similar_pairs(terms, settings):
        yield from _asked("comparison", (first, second), f"{_stated(first)} {_stated(second)}", settings)


def _asked(kind: str, terms: Sequence[Term], response: str, settings: PairSettings) -> Iterator[Question]:
    """One fact in the wordings that are drawn for it, whatever else the glossary holds."""
    names = [term.name for term in terms]
    context = settings.context.strip()
    slots = {"term": names[0], "other": names[-1], "context": f" {context}" if context else ""}
    for held_out, wordings, most in (
        (False, WORDINGS[kind].training, settings.forms),
        (True, WORDINGS[kind].held_out, settings.held_out_forms),
    ):
        draw = _random(settings.seed, held_out, kind, *names)
        for wording in draw.sample(wordings, min(most, len(wordings))):
            yield Question(wording.format(**slots), response, kind, held_out, terms[-1].where or repr(names[-1]))


def similar_pairs(terms: Sequence[Term], settings: PairSettings) -> list[tuple[Term, Term]]:
    """At most settings.comparisons pairs of one domain whose names are easily mixed up, the closest first.

    Compares every term with every other of its domain: 1,000 terms of one domain take 5 seconds.
    """
    ordered = sorted(terms, key=lambda term: (term.domain, term.name))
    candidates = [
        (distance, _random(settings.seed, first.name, second.name).random(), first, second)
        for _, group in itertools.groupby(ordered, key=lambda term: term.domain)
        for first, second in itertools.combinations(group, 2)
        if (distance := _distance(first.name.lower(), second.name.lower())) is not None
    ]
    times: Counter[str] = Counter()
    chosen: list[tuple[Term, Term]] = []
    for _, _, first, second in sorted(candidates, key=lambda candidate: candidate[:2]):
        if len(chosen) < settings.comparisons and max(times[first.name], times[second.name]) < COMPARISONS_PER_TERM:
            times.update((first.name, second.name))
            chosen.append((first, second))
    return chosen


def _distance(first: str, second: str) -> int | None:
    """How many letters differ between names that are easily mixed up; None for other names."""
    matcher = difflib.SequenceMatcher(None, first, second, autojunk=False)
    if matcher.real_quick_ratio() < 0.5 or matcher.quick_ratio() < 0.5:
        return None
    num_equal = sum(block.size for block in matcher.get_matching_blocks())
    distance = max(len(first), len(second)) - num_equal
    begins = first.startswith(second) or second.startswith(first)
    alike = (distance <= 1 and num_equal) or begins or matcher.ratio() >= LEAST_LIKENESS
    return distance if alike else None


def _stated(term: Term) -> str:
    """The definition as a sentence that says what it defines."""
    sentence = _sentence(term.definition)
    return sentence if sentence.startswith(term.name) else f"{term.name}: {sentence}"


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _random(*key: object) -> random.Random:
    """Numbers that depend on the key alone, so that a new term leaves the rows of the others as they are."""
    return random.Random("\n".join(map(str, key)))


def statistics(glossary: Glossary, pairs: Pairs, settings: PairSettings) -> str:
    """What was made of what, as lines to print."""
    domains = Counter(term.domain or "no domain" for term in glossary.terms)
    lines = [f"{len(glossary.terms):6,} terms: " + ", ".join(f"{name} {n:,}" for name, n in domains.most_common())]
    for held_out, forms in ((False, settings.forms), (True, settings.held_out_forms)):
        counts = {kind: pairs.count(held_out, kind) for kind in WORDINGS}
        lines.append(
            f"{sum(counts.values()):6,} {'held-out' if held_out else 'training'} rows: "
            f"{counts['definition']:,} on definitions ({forms} forms a term), {counts['examples']:,} on examples, "
            f"{counts['comparison']:,} comparisons"
        )
    lines.append(f"{glossary.num_duplicates + pairs.num_duplicates:6,} duplicates removed")
    if glossary.ignored_fields:
        named = ", ".join(f"{name} ({count:,})" for name, count in sorted(glossary.ignored_fields.items()))
        lines.append(f"       fields that nothing reads: {named}")
    return "\n".join(lines)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise DataError(f"{message}\n{self.format_usage().strip()}")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    default = PairSettings()
    parser = _Parser(prog="handloop glossary", description=__doc__, allow_abbrev=False)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="a .csv, .json, .yaml or .py file of terms")
    parser.add_argument("--out", type=Path, required=True, help="the rows to train, JSONL")
    parser.add_argument("--held-out", type=Path, required=True, help="the rows to validate with, JSONL")
    parser.add_argument("--forms", type=int, default=default.forms, help="wordings trained a term (%(default)s)")
    parser.add_argument(
        "--held-out-forms", type=int, default=default.held_out_forms, help="wordings held out a term (%(default)s)"
    )
    parser.add_argument(
        "--comparisons", type=int, default=default.comparisons, help="pairs compared, at most (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=default.seed, help="draws wordings and order (%(default)s)")
    parser.add_argument("--context", default=default.context, help="put into every question: 'in the Embraer context'")
    options = parser.parse_args(argv)
    if len({path.resolve() for path in (options.source, options.out, options.held_out)}) < 3:
        parser.error("SOURCE, --out and --held-out must be three files")
    return options


def write_both(files: dict[Path, list[dict[str, str]]]) -> None:
    """Writes JSONL files so that whoever reads them, or a crash, meets each of them whole, the old or the new one."""
    temporary = {path: path.with_name(f".{path.name}.tmp-{os.getpid()}") for path in files}
    try:
        for path, rows in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            temporary[path].write_text(text, encoding="utf-8", newline="\n")
        for path in files:
            os.replace(temporary[path], path)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def main(argv: Sequence[str]) -> int:
    """`handloop glossary`: reads, writes both files, prints the statistics; raises DataError, with nothing written."""
    options = _parse(argv)
    settings = PairSettings(options.forms, options.held_out_forms, options.comparisons, options.seed, options.context)
    glossary = read_terms(options.source)
    pairs = make_pairs(glossary.terms, settings)
    write_both({options.out: pairs.rows(held_out=False), options.held_out: pairs.rows(held_out=True)})
    print(statistics(glossary, pairs, settings))
    print(f"wrote {options.out} and {options.held_out}")
    return 0

"""Glossary -> prompt/response rows: several wordings of each question to train on, others held out to validate."""

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

from data_tools.arguments import Parser
from data_tools.glossary_files import Glossary, Term, read_terms
from data_tools.report import Report
from data_tools.terminal import typed_path

# Two terms are compared if they differ in one letter, if one is a prefix of the other, or from this difflib ratio on:
# dry lease and wet lease have 0.67, light jet and regional jet 0.48.
MIN_SIMILARITY = 0.65
MAX_COMPARISONS_PER_TERM = 2  # otherwise a few groups, such as SAP's VA01, VA02, VA03, would use up all comparisons


@dataclass(frozen=True)
class Wordings:
    """The wordings of one kind of question; held-out wordings are never trained on."""

    training: tuple[str, ...]
    held_out: tuple[str, ...]


# No wording puts an article before the term: it may be an abbreviation, a transaction code or a plural.
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
    """How many rows to make from a glossary, and with which seed."""

    forms: int = 4  # training wordings per definition
    held_out_forms: int = 2  # validation wordings per definition
    comparisons: int = 50  # at most this many pairs of terms are compared
    seed: int = 0
    context: str = ""  # added to every question, such as `in the Embraer context`

    def check(self) -> None:
        """Raises DataError naming every number that is out of range."""
        report, wordings = Report(), WORDINGS["definition"]
        for option, value, limit in (
            ("--forms", self.forms, len(wordings.training)),
            ("--held-out-forms", self.held_out_forms, len(wordings.held_out)),
        ):
            if not 1 <= value <= limit:
                report.add(f"{option} {value}", f"there are {limit} wordings to choose from; give 1 to {limit}")
        if self.comparisons < 0:
            report.add(f"--comparisons {self.comparisons}", "must be 0 or more")
        report.raise_if_any()


@dataclass(frozen=True)
class Question:
    """A row, and the place in the glossary that it comes from."""

    prompt: str
    response: str
    kind: str  # a key of WORDINGS
    held_out: bool
    where: str

    def as_row(self) -> dict[str, str]:
        """The row as written to a JSONL file."""
        return {"prompt": self.prompt, "response": self.response}


@dataclass(frozen=True)
class Pairs:
    """All questions, shuffled into an order that does not depend on the order of the glossary."""

    questions: tuple[Question, ...]
    num_duplicates: int

    def rows(self, held_out: bool) -> list[dict[str, str]]:
        """The held-out rows, or the training rows."""
        return [question.as_row() for question in self.questions if question.held_out == held_out]

    def counts(self, held_out: bool) -> dict[str, int]:
        """The number of questions of each kind among the held-out rows, or the training rows."""
        kinds = Counter(question.kind for question in self.questions if question.held_out == held_out)
        return {kind: kinds[kind] for kind in WORDINGS}


def make_pairs(terms: Sequence[Term], settings: PairSettings) -> Pairs:
    """Every question about every term, each prompt once; raises DataError if two terms get the same prompt."""
    settings.check()
    report = Report()
    questions: dict[str, Question] = {}
    num_duplicates = 0
    for question in _questions(terms, settings):
        first = questions.setdefault(question.prompt, question)
        if (first.response, first.where) != (question.response, question.where):
            report.add(
                question.where,
                f"the question {first.prompt!r} is also asked about {first.where}; rename one of the terms",
            )
        elif first is not question:
            num_duplicates += 1
    report.raise_if_any()
    shuffled = sorted(questions.values(), key=lambda question: _random(settings.seed, question.prompt).random())
    return Pairs(tuple(shuffled), num_duplicates)


def _questions(terms: Sequence[Term], settings: PairSettings) -> Iterator[Question]:
    """The questions on each term's definition and examples, and on pairs of terms."""
    for term in terms:
        yield from _wordings_of("definition", (term,), term.definition, settings)
        if term.examples:
            yield from _wordings_of(
                "examples", (term,), f"For example: {_sentence('; '.join(term.examples))}", settings
            )
    for first, second in similar_pairs(terms, settings):
        yield from _wordings_of(
            "comparison", (first, second), f"{_as_statement(first)} {_as_statement(second)}", settings
        )


def _wordings_of(kind: str, terms: Sequence[Term], response: str, settings: PairSettings) -> Iterator[Question]:
    """The questions for one answer; which wordings are drawn does not depend on the rest of the glossary."""
    names = [term.name for term in terms]
    context = settings.context.strip()
    slots = {"term": names[0], "other": names[-1], "context": f" {context}" if context else ""}
    for held_out, wordings, limit in (
        (False, WORDINGS[kind].training, settings.forms),
        (True, WORDINGS[kind].held_out, settings.held_out_forms),
    ):
        draw = _random(settings.seed, held_out, kind, *names)
        for wording in draw.sample(wordings, min(limit, len(wordings))):
            yield Question(wording.format(**slots), response, kind, held_out, terms[-1].where or repr(names[-1]))


def similar_pairs(terms: Sequence[Term], settings: PairSettings) -> list[tuple[Term, Term]]:
    """At most settings.comparisons pairs of one domain whose names are easily confused, the most similar first.

    Every term is compared with every other of its domain: 1,000 terms of one domain take 5 seconds.
    """
    ordered = sorted(terms, key=lambda term: (term.domain, term.name))
    candidates = [
        (distance, _random(settings.seed, first.name, second.name).random(), first, second)
        for _, group in itertools.groupby(ordered, key=lambda term: term.domain)
        for first, second in itertools.combinations(group, 2)
        if (distance := _distance(first.name.lower(), second.name.lower())) is not None
    ]
    uses: Counter[str] = Counter()
    chosen: list[tuple[Term, Term]] = []
    for _, _, first, second in sorted(candidates, key=lambda candidate: candidate[:2]):
        if len(chosen) < settings.comparisons and max(uses[first.name], uses[second.name]) < MAX_COMPARISONS_PER_TERM:
            uses.update((first.name, second.name))
            chosen.append((first, second))
    return chosen


def _distance(first: str, second: str) -> int | None:
    """The number of letters in which easily confused names differ; None for other names."""
    matcher = difflib.SequenceMatcher(None, first, second, autojunk=False)
    if matcher.real_quick_ratio() < 0.5 or matcher.quick_ratio() < 0.5:
        return None
    num_equal = sum(block.size for block in matcher.get_matching_blocks())
    distance = max(len(first), len(second)) - num_equal
    is_prefix = first.startswith(second) or second.startswith(first)
    is_similar = (distance <= 1 and num_equal) or is_prefix or matcher.ratio() >= MIN_SIMILARITY
    return distance if is_similar else None


def _as_statement(term: Term) -> str:
    """The definition as a sentence that names its term."""
    sentence = _sentence(term.definition)
    return sentence if sentence.startswith(term.name) else f"{term.name}: {sentence}"


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _random(*key: object) -> random.Random:
    """A generator seeded by the key alone, so that adding a term does not change the rows of the others."""
    return random.Random("\n".join(map(str, key)))


def statistics(glossary: Glossary, pairs: Pairs, settings: PairSettings) -> str:
    """Counts of terms and rows, as lines to print."""
    domains = Counter(term.domain or "no domain" for term in glossary.terms)
    lines = [f"{len(glossary.terms):6,} terms: " + ", ".join(f"{name} {n:,}" for name, n in domains.most_common())]
    for held_out, forms in ((False, settings.forms), (True, settings.held_out_forms)):
        counts = pairs.counts(held_out)
        lines.append(
            f"{sum(counts.values()):6,} {'held-out' if held_out else 'training'} rows: "
            f"{counts['definition']:,} on definitions ({forms} forms per term), {counts['examples']:,} on examples, "
            f"{counts['comparison']:,} comparisons"
        )
    lines.append(f"{glossary.num_duplicates + pairs.num_duplicates:6,} duplicates removed")
    if glossary.ignored_fields:
        named = ", ".join(f"{name} ({count:,})" for name, count in sorted(glossary.ignored_fields.items()))
        lines.append(f"       ignored fields: {named}")
    return "\n".join(lines)


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    default = PairSettings()
    parser = Parser("handloop glossary", __doc__)
    parser.add_argument("source", type=typed_path, metavar="SOURCE", help="a .csv, .json, .yaml or .py file of terms")
    parser.add_argument("--out", type=typed_path, help="JSONL file for the training rows (SOURCE's name, .train.jsonl)")
    parser.add_argument(
        "--held-out", type=typed_path, help="JSONL file for the validation rows (SOURCE's name, .held_out.jsonl)"
    )
    parser.add_argument("--forms", type=int, default=default.forms, help="training wordings per term (%(default)s)")
    parser.add_argument(
        "--held-out-forms", type=int, default=default.held_out_forms, help="held-out wordings per term (%(default)s)"
    )
    parser.add_argument(
        "--comparisons", type=int, default=default.comparisons, help="maximum number of pairs compared (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=default.seed, help="seed for wordings and order (%(default)s)")
    parser.add_argument("--context", default=default.context, help="added to each question: 'in the Embraer context'")
    parser.add_argument("--json", action="store_true", help="print the counts, and where the rows are, as JSON")
    options = parser.parse_args(argv)
    for name, ending in (("out", "train"), ("held_out", "held_out")):
        if getattr(options, name) is None:
            chosen = options.source.with_name(f"{options.source.stem}.{ending}.jsonl")
            if chosen.exists():  # which nobody has asked to replace
                parser.error(f"{chosen} exists; to replace it, say --{name.replace('_', '-')} {chosen}")
            setattr(options, name, chosen)
    if len({path.resolve() for path in (options.source, options.out, options.held_out)}) < 3:
        parser.error("SOURCE, --out and --held-out must be three different files")
    return options


def write_both(files: dict[Path, list[dict[str, str]]]) -> None:
    """Writes JSONL files, each replaced atomically: a reader, or a crash, finds the old file or the new one."""
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
    """`handloop glossary`: writes both files and prints the counts; raises DataError before it writes anything."""
    options = _parse(argv)
    settings = PairSettings(options.forms, options.held_out_forms, options.comparisons, options.seed, options.context)
    glossary = read_terms(options.source)
    pairs = make_pairs(glossary.terms, settings)
    write_both({options.out: pairs.rows(held_out=False), options.held_out: pairs.rows(held_out=True)})
    if options.json:
        about = {"out": str(options.out), "held_out": str(options.held_out), "num_terms": len(glossary.terms)}
        about |= {"rows": pairs.counts(held_out=False), "held_out_rows": pairs.counts(held_out=True)}
        about |= {"num_duplicates": glossary.num_duplicates + pairs.num_duplicates}
        print(json.dumps({**about, "ignored_fields": dict(glossary.ignored_fields)}, indent=1))
    else:
        print(f"{statistics(glossary, pairs, settings)}\nwrote {options.out} and {options.held_out}")
    return 0

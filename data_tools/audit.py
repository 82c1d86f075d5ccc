"""Audits prepared data before training: what is wrong with it, where, and whether training should be refused."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from rich.console import Console
from rich.text import Text

from data_tools.prepare import PrepareSettings
from data_tools.scan import CUT, MASKED, NUM_PLACES, TRAINED, Finding, RecordScan, column, read_samples
from data_tools.similarity import first_equal, first_near
from data_tools.terminal import printable

NUM_LONGEST = 5
MAX_BINS = 12
BAR_WIDTH = 40

# Training is refused when a larger share of the rows has a finding; each limit with its reason.
REFUSE_ANY = 0.0  # a single such row means that the template, the mask or the split is wrong
MAX_END_UNTRAINED = 0.01  # more than one answer in a hundred would teach the model to continue instead of to stop
MAX_GARBAGE = 0.05  # with more than one row in twenty the model learns to write it; the files were converted wrongly
MAX_LOST = 0.2  # with a fifth truncated or dropped, it is no longer the data set that the user meant
WARN_ONLY = 1.0  # normal for some subjects, or a weighting that the user may have meant: warned about, never refused


@dataclass(frozen=True)
class Rule:
    """A kind of finding: the text after its count, the largest share of rows that may have it, and the remedy."""

    message: str
    max_share: float
    remedy: str


RULES = {
    "rows_without_supervision": Rule(
        "rows have no supervised tokens", REFUSE_ANY, "look at them with handloop preview"
    ),
    "end_token_untrained_rows": Rule(
        "rows do not train the token that ends an answer",
        MAX_END_UNTRAINED,
        "fix the chat template, or do not truncate answers",
    ),
    "double_bos_rows": Rule("rows have two BOS tokens in a row", REFUSE_ANY, "remove one from the chat template"),
    "leaked_rows": Rule("validation rows are also training rows", REFUSE_ANY, "remove them from one of the two"),
    "leaked_prompts": Rule("validation rows share the prompt of a training row", WARN_ONLY, "split the data by prompt"),
    "duplicates": Rule("rows repeat an earlier row exactly", WARN_ONLY, "keep one of each"),
    "normalised_duplicates": Rule(
        "rows repeat an earlier row except for case, white space and punctuation", WARN_ONLY, "keep one of each"
    ),
    "near_duplicates": Rule("rows nearly repeat an earlier row", WARN_ONLY, "keep one of each"),
    "conflicting_answers": Rule(
        "rows give a different answer to the prompt of an earlier row", WARN_ONLY, "keep the right answer"
    ),
    "role_order_rows": Rule(
        "rows have turns in an unusual order", WARN_ONLY, "start with system, then alternate user and assistant"
    ),
    "control_character_rows": Rule("rows contain control characters", MAX_GARBAGE, "remove them from the files"),
    "mojibake_rows": Rule("rows contain wrongly decoded text", MAX_GARBAGE, "convert the originals to UTF-8 again"),
    "truncated_rows": Rule("rows were truncated to data.max_length", MAX_LOST, "raise data.max_length"),
    "dropped_rows": Rule("rows are longer than data.max_length and were dropped", MAX_LOST, "raise data.max_length"),
    "skipped_rows": Rule("rows cannot be read or rendered and were skipped", MAX_LOST, "fix them"),
}


@dataclass(frozen=True)
class DataSplit:
    """The training or the validation data: its samples, and the settings that they were prepared with."""

    settings: PrepareSettings
    samples: Dataset


@dataclass(frozen=True)
class Schedule:
    """The batch arithmetic of the run: a step takes per_device x accumulation x num_processes `unit`s."""

    per_device: int
    accumulation: int
    num_processes: int
    unit: str  # samples, or rows of packed samples
    units_per_epoch: int
    steps_per_epoch: int
    epochs: int
    total_steps: int

    @property
    def units_per_step(self) -> int:
        """The global batch size."""
        return self.per_device * self.accumulation * self.num_processes


@dataclass(frozen=True)
class Audit:
    """Statistics and findings of the training data; `findings` has an entry for each of RULES."""

    rows: int
    validation_rows: int
    samples: int
    tokens: int
    supervised_tokens: int
    end_token_trained_fraction: float  # these three: of the rows with supervised tokens
    end_token_masked_fraction: float
    end_token_cut_fraction: float
    findings: Mapping[str, Finding]
    length_histogram: tuple[tuple[int, int, int], ...]  # (fewest tokens, most tokens, samples)
    longest: tuple[tuple[str, int], ...]  # (source, tokens)
    schedule: Schedule

    def share(self, name: str) -> float:
        """The share of rows with this finding, as its rule limits it."""
        if name == "end_token_untrained_rows":
            return self.end_token_masked_fraction + self.end_token_cut_fraction
        if name == "normalised_duplicates" and self.findings[name].count:  # exact ones are too
            return (self.findings[name].count + self.findings["duplicates"].count) / max(self.rows, 1)
        if name == "skipped_rows":  # rows that cannot be read are not counted in `rows`
            return self.findings[name].count / max(self.rows + self.findings[name].count, 1)
        rows = self.validation_rows if name.startswith("leaked") else self.rows
        return self.findings[name].count / max(rows, 1)

    def as_json(self) -> dict[str, Any]:
        """All fields, the count of each finding under its name, and the verdict."""
        return {
            **{name: value for name, value in vars(self).items() if name not in ("findings", "schedule")},
            **{name: finding.count for name, finding in self.findings.items()},
            "length_histogram": [
                {"from": low, "through": high, "samples": count} for low, high, count in self.length_histogram
            ],
            "longest": [{"source": source, "tokens": tokens} for source, tokens in self.longest],
            "places": {name: finding.places for name, finding in self.findings.items() if finding.count},
            **asdict(self.schedule),
            "units_per_step": self.schedule.units_per_step,
            "failures": failures(self),
            "warnings": warnings(self),
        }


def audit(training: DataSplit, validation: DataSplit | None, tokenizer: Any, schedule: Schedule) -> Audit:
    """Reads all samples and records once; keeps about 200 bytes per record and none of the text.

    `validation` comes from files of its own, or holds records of the training files that were held out; in the second
    case both splits have the same settings.
    """
    facts = read_samples(training.samples, tokenizer)
    validation_rows = np.unique(column(validation.samples, "record")) if validation else np.zeros(0, np.int64)
    is_held_out = validation is not None and validation.settings == training.settings
    is_held_out = is_held_out and not np.isin(validation_rows, np.flatnonzero(facts.num_tokens)).any()
    scan = RecordScan(training.settings, tokenizer, facts, set(validation_rows.tolist()) if is_held_out else set())
    rows = np.setdiff1d(np.arange(len(scan.exact)), validation_rows if is_held_out else [])
    findings = {**scan.findings, **_repeats(scan, rows)}
    num_validation_rows = 0
    if validation is not None:
        validation_scan = scan
        if not is_held_out:
            validation_facts = read_samples(validation.samples, tokenizer)
            validation_scan = RecordScan(validation.settings, tokenizer, validation_facts, set())
            validation_rows = np.arange(len(validation_scan.exact))
        num_validation_rows = len(validation_rows)
        findings |= _leaks(scan, rows, validation_scan, validation_rows)
    lengths = column(training.samples, "num_tokens")
    longest = np.argsort(-lengths, kind="stable")[:NUM_LONGEST].tolist()
    return Audit(
        rows=len(rows),
        validation_rows=num_validation_rows,
        samples=len(training.samples),
        tokens=int(lengths.sum()),
        supervised_tokens=int(facts.num_supervised_tokens.sum()),
        end_token_trained_fraction=facts.end_fraction(TRAINED),
        end_token_masked_fraction=facts.end_fraction(MASKED),
        end_token_cut_fraction=facts.end_fraction(CUT),
        findings={name: findings.get(name, Finding()) for name in RULES},
        length_histogram=_histogram(lengths),
        longest=tuple((training.samples[i]["source"], int(lengths[i])) for i in longest),
        schedule=schedule,
    )


def _repeats(scan: RecordScan, rows: np.ndarray) -> dict[str, Finding]:
    """Rows that repeat or contradict an earlier one of `rows`; each counts once, as the strictest kind it is."""
    own = np.arange(len(rows))
    exact, normalised = first_equal(scan.exact[rows]), first_equal(scan.normalised[rows])
    near, prompt = first_near(scan.sketches[rows]), first_equal(scan.prompts[rows])
    is_exact, is_normalised, is_near = exact != own, normalised != own, near != own
    is_conflict = (prompt != own) & (scan.prompts[rows] != 0) & ~is_normalised
    repeated = {
        "duplicates": (exact, is_exact),
        "normalised_duplicates": (normalised, is_normalised & ~is_exact),
        "near_duplicates": (near, is_near & ~is_normalised & ~is_exact),
        "conflicting_answers": (prompt, is_conflict),
    }
    findings = {}
    for name, (first, found) in repeated.items():
        pairs = ((rows[i], rows[first[i]]) for i in np.flatnonzero(found)[:NUM_PLACES])
        places = [_pair(scan.places[number], scan.places[twin]) for number, twin in pairs]
        findings[name] = Finding(int(found.sum()), places)
    return findings


def _leaks(
    scan: RecordScan, rows: np.ndarray, validation: RecordScan, validation_rows: np.ndarray
) -> dict[str, Finding]:
    """Validation rows whose text, or whose prompt, is also in the training `rows`."""
    is_leaked = np.isin(validation.normalised[validation_rows], scan.normalised[rows])
    prompts = validation.prompts[validation_rows]
    is_prompt = np.isin(prompts, scan.prompts[rows]) & (prompts != 0) & ~is_leaked
    findings = {}
    for name, trained, validated, found in (
        ("leaked_rows", scan.normalised[rows], validation.normalised, is_leaked),
        ("leaked_prompts", scan.prompts[rows], validation.prompts, is_prompt),
    ):
        first = validation_rows[found][:NUM_PLACES]
        twins = ((number, rows[np.argmax(trained == validated[number])]) for number in first)
        places = [_pair(validation.places[number], scan.places[twin]) for number, twin in twins]
        findings[name] = Finding(int(found.sum()), places)
    return findings


def _pair(place: str, twin: str) -> str:
    """A row's place and that of the row it resembles, by its line alone when both are in one file."""
    name, _, line = twin.rpartition(":")
    return f"{place} (like line {line})" if name and place.startswith(f"{name}:") else f"{place} (like {twin})"


def _histogram(lengths: np.ndarray) -> tuple[tuple[int, int, int], ...]:
    """(fewest tokens, most tokens, samples) of at most MAX_BINS bins, each 1, 2 or 5 x 10^n tokens wide."""
    widths = (factor * 10**power for power in range(10) for factor in (1, 2, 5))
    width = next(width for width in widths if lengths.max() // width - lengths.min() // width < MAX_BINS)
    bins, counts = np.unique(lengths // width, return_counts=True)
    counted = dict(zip(bins.tolist(), counts.tolist(), strict=True))
    return tuple(
        (number * width, (number + 1) * width - 1, counted.get(number, 0)) for number in range(bins[0], bins[-1] + 1)
    )


def failures(audit: Audit) -> list[str]:
    """The reasons to refuse training on this data; empty if there are none."""
    return [_sentence(audit, name) for name in RULES if audit.share(name) > RULES[name].max_share]


def warnings(audit: Audit) -> list[str]:
    """Findings that do not forbid training."""
    found = [name for name in RULES if audit.findings[name].count]
    return [_sentence(audit, name) for name in found if audit.share(name) <= RULES[name].max_share]


def _sentence(audit: Audit, name: str) -> str:
    rule, finding, share = RULES[name], audit.findings[name], audit.share(name)
    limit = f"; the limit is {rule.max_share:.0%}" if share > rule.max_share else ""
    more = ", ..." if finding.count > len(finding.places) else ""
    places = ", ".join(map(printable, finding.places)) + more
    return f"{finding.count:,} {rule.message} ({share:.1%}{limit}): {places}; {rule.remedy}"


def show_audit(audit: Audit, console: Console) -> None:
    """Prints the audit: counts, a histogram of the lengths, the longest samples, findings and verdict."""
    schedule, reasons = audit.schedule, failures(audit)
    held_out = f", {audit.validation_rows:,} more for validation" if audit.validation_rows else ""
    supervised_share = audit.supervised_tokens / max(audit.tokens, 1)
    lines = [
        f"rows      {audit.rows:,}{held_out}",
        f"samples   {audit.samples:,} of {audit.tokens / max(audit.samples, 1):,.0f} tokens on average",
        f"tokens    {audit.tokens:,}, {audit.supervised_tokens:,} of them trained ({supervised_share:.0%})",
        f"end token trained in {audit.end_token_trained_fraction:.1%} of the rows, present but masked in "
        f"{audit.end_token_masked_fraction:.1%}, cut in {audit.end_token_cut_fraction:.1%}",
        f"batch     {schedule.per_device} per device x {schedule.accumulation} accumulated x {schedule.num_processes} "
        f"process{'es' if schedule.num_processes > 1 else ''} = {schedule.units_per_step} {schedule.unit} per step",
        f"steps     {schedule.units_per_epoch:,} {schedule.unit} per epoch = {schedule.steps_per_epoch:,} steps; "
        f"{schedule.epochs} epoch{'s' if schedule.epochs > 1 else ''}, {schedule.total_steps:,} steps in all",
        "lengths   samples by number of tokens",
        *_bars(audit.length_histogram),
        "longest   " + ", ".join(f"{printable(source)} ({tokens:,} tokens)" for source, tokens in audit.longest),
    ]
    console.print(Text("\n".join(lines)), soft_wrap=True)
    for style, label, sentences in (("yellow", "warning", warnings(audit)), ("bold red", "failure", reasons)):
        for sentence in sentences:
            console.print(Text.assemble((f"{label}   ", style), sentence), soft_wrap=True)
    good = "nothing found" if not warnings(audit) else "nothing that forbids training"
    verdict = Text(f"verdict   {len(reasons)} reason{'s' * (len(reasons) > 1)} not to train on this", "bold red")
    console.print(verdict if reasons else Text(f"verdict   {good}", "bold green"), soft_wrap=True)


def _bars(histogram: tuple[tuple[int, int, int], ...]) -> list[str]:
    max_count = max(count for _, _, count in histogram)
    labels = [f"{low:,}" if low == high else f"{low:,}-{high:,}" for low, high, _ in histogram]
    width = max(map(len, labels))
    return [
        f"  {label:>{width}}  {'█' * round(BAR_WIDTH * count / max_count) or ('▏' if count else '')} {count:,}"
        for label, (_, _, count) in zip(labels, histogram, strict=True)
    ]

"""Judges prepared data before anything is trained on it: what is wrong, where, and whether it forbids training."""

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

# Shares of the rows beyond which training is refused, and the damage that they stand for.
NONE = 0.0  # one such row shows that the template, the mask or the split is wrong, not that one row is odd
MAX_END_UNTRAINED = 0.01  # more than one answer in a hundred would teach the model to go on instead of to stop
MAX_GARBAGE = 0.05  # beyond one row in twenty the model learns to write it, and the conversion of the files is at fault
MAX_LOST = 0.2  # with a fifth cut or left out it is another data set than the one that was meant
NEVER = 1.0  # depends on the subject, or is a weight that somebody may have meant: said, never refused


@dataclass(frozen=True)
class Rule:
    """A finding: what stands behind its count, the largest share of rows that may have it, and what helps."""

    says: str
    limit: float
    remedy: str


RULES = {
    "rows_without_supervision": Rule("rows have nothing to train", NONE, "look at them with handloop preview"),
    "end_token_untrained_rows": Rule(
        "rows do not train the token that ends an answer", MAX_END_UNTRAINED, "mend the template, or do not cut answers"
    ),
    "double_bos_rows": Rule("rows have two begin tokens in a row", NONE, "take one out of the chat template"),
    "leaked_rows": Rule("validation rows are also trained on", NONE, "take them out of one side"),
    "leaked_prompts": Rule("validation rows have the prompt of a training row", NEVER, "split the data by prompt"),
    "duplicates": Rule("rows repeat an earlier one exactly", NEVER, "keep one of each"),
    "normalised_duplicates": Rule(
        "rows repeat an earlier one but for case, white space and punctuation", NEVER, "keep one of each"
    ),
    "near_duplicates": Rule("rows nearly repeat an earlier one", NEVER, "keep one of each"),
    "conflicting_answers": Rule("rows answer the prompt of an earlier row otherwise", NEVER, "keep the right answer"),
    "role_order_rows": Rule("rows have turns in an unusual order", NEVER, "system, then user and assistant in turn"),
    "control_character_rows": Rule("rows hold control characters", MAX_GARBAGE, "take them out of the files"),
    "mojibake_rows": Rule("rows hold wrongly decoded text", MAX_GARBAGE, "convert the originals to UTF-8 again"),
    "truncated_rows": Rule("rows were cut to data.max_length", MAX_LOST, "raise data.max_length"),
    "dropped_rows": Rule("rows are longer than data.max_length and left out", MAX_LOST, "raise data.max_length"),
    "skipped_rows": Rule("rows cannot be read or rendered and are left out", MAX_LOST, "mend them"),
}


@dataclass(frozen=True)
class Data:
    """One side of the data: the settings that it was prepared with, and its samples."""

    settings: PrepareSettings
    samples: Dataset


@dataclass(frozen=True)
class Schedule:
    """The arithmetic of the run, from the trainer: a step has per_device x accumulation x num_processes `unit`s."""

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
    """What the training data is like; `findings` has an entry for each of RULES."""

    rows: int
    validation_rows: int
    samples: int
    tokens: int
    supervised_tokens: int
    end_token_trained_fraction: float  # these three: of the rows with anything to train
    end_token_masked_fraction: float
    end_token_cut_fraction: float
    findings: Mapping[str, Finding]
    length_histogram: tuple[tuple[int, int, int], ...]  # (tokens from, through, samples)
    longest: tuple[tuple[str, int], ...]  # (source, tokens)
    schedule: Schedule

    def share(self, name: str) -> float:
        """The share of rows that a rule limits."""
        if name == "end_token_untrained_rows":
            return self.end_token_masked_fraction + self.end_token_cut_fraction
        if name == "normalised_duplicates" and self.findings[name].count:  # exact ones repeat a row as much
            return (self.findings[name].count + self.findings["duplicates"].count) / max(self.rows, 1)
        if name == "skipped_rows":  # rows that cannot be read are none of `rows`
            return self.findings[name].count / max(self.rows + self.findings[name].count, 1)
        rows = self.validation_rows if name.startswith("leaked") else self.rows
        return self.findings[name].count / max(rows, 1)

    def as_json(self) -> dict[str, Any]:
        """Everything, and the verdict; counts stand under the findings' names."""
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


def audit(training: Data, validation: Data | None, tokenizer: Any, schedule: Schedule) -> Audit:
    """Reads all samples and records once; keeps about 200 bytes a record and none of the text.

    `validation` has other files, or records held out of the training files: then both settings are equal.
    """
    facts = read_samples(training.samples, tokenizer)
    theirs = np.unique(column(validation.samples, "record")) if validation else np.zeros(0, np.int64)
    is_held_out = validation is not None and validation.settings == training.settings
    is_held_out = is_held_out and not np.isin(theirs, np.flatnonzero(facts.num_tokens)).any()
    scan = RecordScan(training.settings, tokenizer, facts, set(theirs.tolist()) if is_held_out else set())
    rows = np.setdiff1d(np.arange(len(scan.exact)), theirs if is_held_out else [])
    findings = {**scan.findings, **_repeats(scan, rows)}
    num_others = 0
    if validation is not None:
        other, other_rows = scan, theirs
        if not is_held_out:
            other = RecordScan(validation.settings, tokenizer, read_samples(validation.samples, tokenizer), set())
            other_rows = np.arange(len(other.exact))
        num_others = len(other_rows)
        findings |= _leaks(scan, rows, other, other_rows)
    lengths = column(training.samples, "num_tokens")
    longest = np.argsort(-lengths, kind="stable")[:NUM_LONGEST].tolist()
    return Audit(
        rows=len(rows),
        validation_rows=num_others,
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
    """Rows that repeat or contradict an earlier one of `rows`; each repetition is counted under its strictest name."""
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


def _leaks(scan: RecordScan, rows: np.ndarray, other: RecordScan, other_rows: np.ndarray) -> dict[str, Finding]:
    """Rows of the other side whose text, or whose prompt, is also in `rows`."""
    is_leaked = np.isin(other.normalised[other_rows], scan.normalised[rows])
    prompts = other.prompts[other_rows]
    is_prompt = np.isin(prompts, scan.prompts[rows]) & (prompts != 0) & ~is_leaked
    findings = {}
    for name, ours, theirs, found in (
        ("leaked_rows", scan.normalised[rows], other.normalised, is_leaked),
        ("leaked_prompts", scan.prompts[rows], other.prompts, is_prompt),
    ):
        twins = ((number, rows[np.argmax(ours == theirs[number])]) for number in other_rows[found][:NUM_PLACES])
        places = [_pair(other.places[number], scan.places[twin]) for number, twin in twins]
        findings[name] = Finding(int(found.sum()), places)
    return findings


def _pair(place: str, twin: str) -> str:
    """A place and the one that it is like; in the same file its line is enough."""
    name, _, line = twin.rpartition(":")
    return f"{place} (like line {line})" if name and place.startswith(f"{name}:") else f"{place} (like {twin})"


def _histogram(lengths: np.ndarray) -> tuple[tuple[int, int, int], ...]:
    """(tokens from, through, samples) in at most MAX_BINS bins of 1, 2 or 5 x 10^n tokens."""
    widths = (factor * 10**power for power in range(10) for factor in (1, 2, 5))
    width = next(width for width in widths if lengths.max() // width - lengths.min() // width < MAX_BINS)
    bins, counts = np.unique(lengths // width, return_counts=True)
    counted = dict(zip(bins.tolist(), counts.tolist(), strict=True))
    return tuple(
        (number * width, (number + 1) * width - 1, counted.get(number, 0)) for number in range(bins[0], bins[-1] + 1)
    )


def failures(audit: Audit) -> list[str]:
    """Why the data must not be trained on as it is; empty where it may."""
    return [_sentence(audit, name) for name in RULES if audit.share(name) > RULES[name].limit]


def warnings(audit: Audit) -> list[str]:
    """What a user would want to know, though it does not forbid training."""
    found = [name for name in RULES if audit.findings[name].count]
    return [_sentence(audit, name) for name in found if audit.share(name) <= RULES[name].limit]


def _sentence(audit: Audit, name: str) -> str:
    rule, finding, share = RULES[name], audit.findings[name], audit.share(name)
    limit = f", at most {rule.limit:.0%} may" if share > rule.limit else ""
    more = ", ..." if finding.count > len(finding.places) else ""
    places = ", ".join(map(printable, finding.places)) + more
    return f"{finding.count:,} {rule.says} ({share:.1%}{limit}): {places}; {rule.remedy}"


def show_audit(audit: Audit, console: Console) -> None:
    """Prints the audit: counts, a histogram of the lengths, the longest samples, findings and verdict."""
    schedule, refused = audit.schedule, failures(audit)
    held_out = f", {audit.validation_rows:,} more for validation" if audit.validation_rows else ""
    of_them = audit.supervised_tokens / max(audit.tokens, 1)
    lines = [
        f"rows      {audit.rows:,}{held_out}",
        f"samples   {audit.samples:,} of {audit.tokens / max(audit.samples, 1):,.0f} tokens on average",
        f"tokens    {audit.tokens:,}, {audit.supervised_tokens:,} of them trained ({of_them:.0%})",
        f"end token trained in {audit.end_token_trained_fraction:.1%} of the rows, present but masked in "
        f"{audit.end_token_masked_fraction:.1%}, cut in {audit.end_token_cut_fraction:.1%}",
        f"batch     {schedule.per_device} a device x {schedule.accumulation} accumulated x {schedule.num_processes} "
        f"process{'es' if schedule.num_processes > 1 else ''} = {schedule.units_per_step} {schedule.unit} a step",
        f"steps     {schedule.units_per_epoch:,} {schedule.unit} an epoch = {schedule.steps_per_epoch:,} steps; "
        f"{schedule.epochs} epoch{'s' if schedule.epochs > 1 else ''}, {schedule.total_steps:,} steps in all",
        "lengths   samples by number of tokens",
        *_bars(audit.length_histogram),
        "longest   " + ", ".join(f"{printable(source)} ({tokens:,} tokens)" for source, tokens in audit.longest),
    ]
    console.print(Text("\n".join(lines)), soft_wrap=True)
    for style, label, sentences in (("yellow", "warning", warnings(audit)), ("bold red", "failure", refused)):
        for sentence in sentences:
            console.print(Text.assemble((f"{label}   ", style), sentence), soft_wrap=True)
    good = "nothing found" if not warnings(audit) else "nothing that forbids training"
    verdict = Text(f"verdict   {len(refused)} reason{'s' * (len(refused) > 1)} not to train on this", "bold red")
    console.print(verdict if refused else Text(f"verdict   {good}", "bold green"), soft_wrap=True)


def _bars(histogram: tuple[tuple[int, int, int], ...]) -> list[str]:
    most = max(count for _, _, count in histogram)
    labels = [f"{low:,}" if low == high else f"{low:,}-{high:,}" for low, high, _ in histogram]
    width = max(map(len, labels))
    return [
        f"  {label:>{width}}  {'█' * round(BAR_WIDTH * count / most) or ('▏' if count else '')} {count:,}"
        for label, (_, _, count) in zip(labels, histogram, strict=True)
    ]

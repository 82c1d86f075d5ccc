"""Audits prepared data before training: what is wrong with it, where, and whether training should be refused."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from data_tools.data_lines import data_warnings, described
from data_tools.prepare import DataSplit, Statistics
from data_tools.scan import CUT, MASKED, NUM_PLACES, TRAINED, Finding, Scan, column, reworded
from data_tools.similarity import first_equal, first_near
from data_tools.terminal import printable

NUM_LONGEST = 5
MAX_BINS = 12

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
    "near_leaked_rows": Rule(
        "validation rows nearly repeat a training row", WARN_ONLY, "remove them from one of the two"
    ),
    "leaked_wordings": Rule(
        "validation rows ask for a training row's answer in other words", WARN_ONLY, "right to measure wordings alone"
    ),
    "leaked_prompts": Rule("validation rows share the prompt of a training row", WARN_ONLY, "split the data by prompt"),
    "duplicates": Rule("rows repeat an earlier row exactly", WARN_ONLY, "keep one of each"),
    "normalised_duplicates": Rule(
        "rows repeat an earlier row except for case, white space, punctuation and flags", WARN_ONLY, "keep one of each"
    ),
    "near_duplicates": Rule("rows nearly repeat an earlier row", WARN_ONLY, "keep one of each"),
    "conflicting_answers": Rule(
        "rows give a different answer to the prompt of an earlier row", WARN_ONLY, "keep the right answer"
    ),
    "role_order_rows": Rule(
        "rows have turns in an unusual order",
        WARN_ONLY,
        "start with system, then alternate user and assistant, with the result of each tool call behind it",
    ),
    "control_character_rows": Rule("rows contain control characters", MAX_GARBAGE, "remove them from the files"),
    "mojibake_rows": Rule("rows contain wrongly decoded text", MAX_GARBAGE, "convert the originals to UTF-8 again"),
    "truncated_rows": Rule("rows were truncated to data.max_length", MAX_LOST, "raise data.max_length"),
    "dropped_rows": Rule("rows are longer than data.max_length and were dropped", MAX_LOST, "raise data.max_length"),
    "skipped_rows": Rule("rows cannot be read or rendered and were skipped", MAX_LOST, "fix them"),
}


@dataclass(frozen=True)
class Schedule:
    """How the run divides its data into steps."""

    per_device: int
    accumulation: int
    num_processes: int
    unit: str  # samples, or rows of packed samples
    units_per_epoch: int
    steps_per_epoch: int
    epochs: int
    total_steps: int
    units_per_step: int  # the global batch size
    batch: str  # its arithmetic, in words


@dataclass(frozen=True)
class SplitAudit:
    """Statistics and findings of one split of the data; `findings` has an entry for each of RULES."""

    rows: int
    samples: int
    tokens: int
    supervised_tokens: int
    end_token_trained_fraction: float  # these three: of the rows with supervised tokens
    end_token_masked_fraction: float
    end_token_cut_fraction: float
    findings: Mapping[str, Finding]
    length_histogram: tuple[tuple[int, int, int], ...]  # (fewest tokens, most tokens, samples)
    longest: tuple[tuple[str, int], ...]  # (source, tokens)

    def share(self, name: str) -> float:
        """The share of rows with this finding, as its rule limits it."""
        count = self.findings[name].count
        if name == "end_token_untrained_rows":
            return self.end_token_masked_fraction + self.end_token_cut_fraction
        if name == "normalised_duplicates" and count:  # exact ones are too
            return (count + self.findings["duplicates"].count) / max(self.rows, 1)
        if name == "skipped_rows":  # rows that cannot be read are not counted in `rows`
            return count / max(self.rows + count, 1)
        return count / max(self.rows, 1)

    def as_json(self) -> dict[str, Any]:
        """All fields, and the count of each finding under its name."""
        return {
            **{field.name: getattr(self, field.name) for field in fields(SplitAudit) if field.name != "findings"},
            **{name: finding.count for name, finding in self.findings.items()},
            "length_histogram": [
                {"from": low, "through": high, "samples": count} for low, high, count in self.length_histogram
            ],
            "longest": [{"source": source, "tokens": tokens} for source, tokens in self.longest],
            "places": {name: finding.places for name, finding in self.findings.items() if finding.count},
        }


@dataclass(frozen=True)
class Audit(SplitAudit):
    """The training data, the validation data beside it, and what both were read from."""

    validation: SplitAudit | None
    statistics: Statistics
    notes: tuple[str, ...]
    schedule: Schedule

    @property
    def validation_rows(self) -> int:
        """The number of validation rows."""
        return self.validation.rows if self.validation else 0

    def share(self, name: str) -> float:
        """The share of rows with this finding; of leaks it is a share of the validation rows."""
        if "leaked" in name:
            return self.findings[name].count / max(self.validation_rows, 1)
        return super().share(name)

    def as_json(self) -> dict[str, Any]:
        """All fields, the count of each finding under its name, and the verdict."""
        return {
            **super().as_json(),
            "validation_rows": self.validation_rows,
            "validation": self.validation.as_json() if self.validation else None,
            **asdict(self.schedule),
            "units_per_step": self.schedule.units_per_step,
            **described(self.statistics, self.notes),
            "failures": failures(self),
            "warnings": [*warnings(self), *data_warnings(self.statistics)],
        }


def audit(training: DataSplit, validation: DataSplit | None, tokenizer: Any, schedule: Schedule) -> Audit:
    """Reads all samples, and the facts of all records.

    `validation` comes from files of its own, or holds records of the training files that were held out.
    """
    held_out = np.unique(column(validation.samples, "record")) if validation else np.zeros(0, np.int64)
    is_same = validation is not None and validation.prepared.fingerprint == training.prepared.fingerprint
    # the same files named twice are not held out
    is_fraction = is_same and not np.isin(held_out, column(training.samples, "record")).any()
    rows = np.arange(len(training.prepared.facts))
    scan = Scan(training, np.setdiff1d(rows, held_out) if is_fraction else rows, tokenizer)
    findings, validated = _split_findings(scan), None
    if validation is not None:
        validation_rows = held_out if is_fraction else np.arange(len(validation.prepared.facts))
        validation_scan = Scan(validation, validation_rows, tokenizer)
        findings |= _leaks(scan, validation_scan)
        lost = {} if is_fraction else _skipped(validation)
        found = _split_findings(validation_scan) | lost
        validated = SplitAudit(**_split(validation, validation_scan, found))
    return Audit(
        **_split(training, scan, findings | _skipped(training)),
        validation=validated,
        statistics=training.prepared.statistics,
        notes=training.prepared.notes + (() if validation is None or is_fraction else validation.prepared.notes),
        schedule=schedule,
    )


def _split(split: DataSplit, scan: Scan, findings: Mapping[str, Finding]) -> dict[str, Any]:
    """The fields of SplitAudit."""
    facts, lengths = scan.samples, column(split.samples, "num_tokens")
    longest = np.argsort(-lengths, kind="stable")[:NUM_LONGEST].tolist()
    return {
        "rows": len(scan.rows),
        "samples": len(split.samples),
        "tokens": int(lengths.sum()),
        "supervised_tokens": int(facts.num_supervised_tokens.sum()),
        "end_token_trained_fraction": facts.end_fraction(TRAINED),
        "end_token_masked_fraction": facts.end_fraction(MASKED),
        "end_token_cut_fraction": facts.end_fraction(CUT),
        "findings": {name: findings.get(name, Finding()) for name in RULES},
        "length_histogram": _histogram(lengths),
        "longest": tuple((split.samples[i]["source"], int(lengths[i])) for i in longest),
    }


def _split_findings(scan: Scan) -> dict[str, Finding]:
    return scan.findings() | _repeats(scan)


def _skipped(split: DataSplit) -> dict[str, Finding]:
    statistics = split.prepared.statistics
    return {"skipped_rows": Finding(statistics.num_skipped, statistics.skipped[:NUM_PLACES])}


def _repeats(scan: Scan) -> dict[str, Finding]:
    """Rows that repeat or contradict an earlier one of the split; each counts once, as the strictest kind it is."""
    own = np.arange(len(scan.rows))
    exact, normalised = first_equal(scan.exact), first_equal(scan.normalised)
    near, prompt = first_near(scan.sketches), first_equal(scan.prompts)
    is_exact, is_normalised, is_near = exact != own, normalised != own, near != own
    is_near &= ~is_normalised & ~is_exact
    is_near &= ~reworded(scan, is_near, scan, near)
    is_conflict = (prompt != own) & (scan.prompts != 0) & ~is_normalised
    repeated = {
        "duplicates": (exact, is_exact),
        "normalised_duplicates": (normalised, is_normalised & ~is_exact),
        "near_duplicates": (near, is_near),
        "conflicting_answers": (prompt, is_conflict),
    }
    findings = {}
    for name, (first, found) in repeated.items():
        places = [_pair(scan.place(i), scan.place(first[i])) for i in np.flatnonzero(found)[:NUM_PLACES]]
        findings[name] = Finding(int(found.sum()), places)
    return findings


def _leaks(scan: Scan, validation: Scan) -> dict[str, Finding]:
    """Validation rows whose text, nearly or wholly, or whose prompt, is also in the training data."""
    num_trained = len(scan.rows)
    near = first_near(np.concatenate([scan.sketches, validation.sketches]))[num_trained:]
    is_leaked = np.isin(validation.normalised, scan.normalised)
    is_near = (near < num_trained) & ~is_leaked
    is_reworded = reworded(validation, is_near, scan, near)
    is_prompt = np.isin(validation.prompts, scan.prompts) & (validation.prompts != 0) & ~is_leaked & ~is_near
    twins = {
        "leaked_rows": (is_leaked, lambda i: int(np.argmax(scan.normalised == validation.normalised[i]))),
        "near_leaked_rows": (is_near & ~is_reworded, lambda i: int(near[i])),
        "leaked_wordings": (is_reworded, lambda i: int(near[i])),
        "leaked_prompts": (is_prompt, lambda i: int(np.argmax(scan.prompts == validation.prompts[i]))),
    }
    findings = {}
    for name, (found, twin) in twins.items():
        places = [_pair(validation.place(i), scan.place(twin(i))) for i in np.flatnonzero(found)[:NUM_PLACES]]
        findings[name] = Finding(int(found.sum()), places)
    return findings


def _pair(place: str, twin: str) -> str:
    """A row's place and that of the row it resembles, by its line alone when both are in one file."""
    name, _, line = twin.rpartition(":")
    is_line = line.isdecimal() and place.startswith(f"{name}:")
    return f"{place} (like line {line})" if is_line else f"{place} (like {twin})"


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


def warnings(audit: Audit, num_places: int = NUM_PLACES) -> list[str]:
    """Findings that do not forbid training, each with at most so many places."""
    found = [name for name in RULES if audit.findings[name].count]
    lines = [_sentence(audit, name, num_places) for name in found if audit.share(name) <= RULES[name].max_share]
    if validation := audit.validation:
        found = [name for name in RULES if validation.findings[name].count]
        lines += [f"validation: {_sentence(validation, name, num_places)}" for name in found]
    return lines


def _sentence(audit: SplitAudit, name: str, num_places: int = NUM_PLACES) -> str:
    rule, finding, share = RULES[name], audit.findings[name], audit.share(name)
    limit = f"; the limit is {rule.max_share:.0%}" if share > rule.max_share else ""
    shown = [printable(place) for place in finding.places[:num_places]]
    places = ", ".join([*shown, *["..."][: finding.count - len(shown)]])
    return f"{finding.count:,} {rule.message} ({share:.1%}{limit}): {places}; {rule.remedy}"

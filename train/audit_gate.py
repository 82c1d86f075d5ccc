"""The audit at the start of a run (the one of `handloop audit`), and its effect on the run: data.gate."""

from collections.abc import Sequence
from typing import Any

from data_tools.audit import Audit, Schedule, SplitAudit, audit, failures, warnings
from train.config import Config
from train.data import Splits, TrainingData
from train.run.exits import ExitCode, ExitWith


def run_audit(config: Config, tokenizer: Any, data: TrainingData, splits: Splits) -> Audit:
    """Audits the training and the validation data, also for rows that are in both."""
    layout, unit = data.layout, "packed rows" if data.packed else "samples"
    schedule = Schedule(
        per_device=layout.per_device,
        accumulation=layout.accumulation,
        num_processes=layout.num_processes,
        unit=unit,
        units_per_epoch=len(data.rows),
        steps_per_epoch=data.steps_per_epoch,
        epochs=config.train.epochs,
        total_steps=data.total_steps(config.train),
        units_per_step=layout.samples_per_step,
        batch=layout.arithmetic(unit),
    )
    return audit(splits.training, splits.validation, tokenizer, schedule)


def enforce_gate(config: Config, found: Audit) -> Sequence[str]:
    """The warnings to print; raises ExitWith(BAD_INPUT) with every reason not to train, unless data.gate is warn."""
    reasons = failures(found)
    if reasons and config.data.gate == "stop":
        lines = "\n".join(f"  {reason}" for reason in reasons)
        advice = "fix the data, or train on it as it is with --data.gate warn; handloop audit shows more"
        raise ExitWith(ExitCode.BAD_INPUT, f"the data should not be trained on:\n{lines}\n{advice}")
    told = warnings(found, num_places=1)
    return [*reasons, *told, *(["handloop audit with the same options shows all of it"] if told else [])]


def counts(found: Audit) -> list[dict[str, str | int]]:
    """How much there is, and how often each kind of finding: numbers alone, no row's text and no file's name."""
    splits: dict[str, SplitAudit] = {"training": found}
    if found.validation is not None:
        splits["validation"] = found.validation
    amounts = ("rows", "samples", "tokens", "supervised_tokens")
    lines: list[dict[str, str | int]] = [
        {"finding": amount, **{name: getattr(split, amount) for name, split in splits.items()}} for amount in amounts
    ]
    for kind in found.findings:
        line = {name: split.findings[kind].count for name, split in splits.items() if kind in split.findings}
        if any(line.values()):
            lines.append({"finding": kind, **dict.fromkeys(splits, 0), **line})
    return lines

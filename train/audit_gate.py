"""The audit at the start of a run, the same as `handloop audit`, and what the run does with its verdict."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from data_tools.audit import Audit, DataSplit, Schedule, audit, failures, warnings
from train.config import Config
from train.data import TrainingData, prepare_settings
from train.run.exits import ExitCode, ExitWith


def run_audit(config: Config, tokenizer: Any, data: TrainingData, validation: Dataset | None) -> Audit:
    """What the training data is like, and what of it stands in the validation data too."""
    settings = prepare_settings(config, config.data.path)
    other = prepare_settings(config, config.data.validation_path) if config.data.validation_path else settings
    cut = data.layout
    schedule = Schedule(
        per_device=cut.per_device,
        accumulation=cut.accumulation,
        num_processes=cut.num_processes,
        unit="packed rows" if data.packed else "samples",
        units_per_epoch=len(data.rows),
        steps_per_epoch=data.steps_per_epoch,
        epochs=config.train.epochs,
        total_steps=data.total_steps(config.train),
    )
    held_out = DataSplit(other, validation) if validation is not None else None
    return audit(DataSplit(settings, data.samples), held_out, tokenizer, schedule)


def enforce_gate(config: Config, found: Audit) -> Sequence[str]:
    """The warnings to show; raises ExitWith(BAD_INPUT) with every reason not to train, unless data.gate is warn."""
    refused = failures(found)
    if refused and config.data.gate == "stop":
        reasons = "\n".join(f"  {reason}" for reason in refused)
        advice = "mend the data, or train on it as it is with --data.gate warn; handloop audit shows more"
        raise ExitWith(ExitCode.BAD_INPUT, f"the data should not be trained on:\n{reasons}\n{advice}")
    return [*refused, *warnings(found)]

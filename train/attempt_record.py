"""What is written down of an attempt before its first step: its configuration, its plan and what it trains on."""

from dataclasses import asdict
from pathlib import Path

from data_tools.prepare import Prepared
from train.checkpoints.contents import Checkpoint
from train.run.attempts import AttemptLog
from train.run.devices import device_name
from train.run.versions import code_version, versions
from train.step import Training


def record_start(log: AttemptLog, training: Training, prepared: Prepared, checkpoint: Checkpoint | None) -> None:
    """Begins the attempt in the run folder: config.json, plan.json and a line in attempts.jsonl."""
    plan, data, engine = training.plan, training.data, training.model.engine_name
    about = training.model.about
    log.begin(
        config=asdict(training.config),
        plan={
            "engine": engine,
            "reason": training.reference_reason,
            "summary": str(plan),
            "peak_bytes": plan.peak_bytes,
            **asdict(plan),
            "parts": dict(plan.parts),
            "schedule": _schedule(training),
            "validation_paths": list(training.config.data.validation_path or training.config.data.path),
        },
        start={
            "from_step": checkpoint.state.step if checkpoint else 0,
            "code_version": code_version(),
            "versions": versions(),
            "working_folder": str(Path.cwd()),  # which relative paths of the data begin at
            "device": device_name(training.accelerator.device),
            "num_processes": training.accelerator.num_processes,
            "engine": engine,
            "plan": str(plan),
            "base": {
                **asdict(about.place),
                "weights": about.held.as_json(),
                "notes": about.notes,
                "adapted_layers": about.targets.counts,
            },
            "data": {
                **asdict(prepared.statistics),
                "fingerprint": prepared.fingerprint,
                "num_training_samples": len(data.samples),
                "tokens_per_epoch": sum(data.row_tokens),
                "supervised_tokens_per_epoch": data.supervised_tokens_per_epoch(),
                "steps_per_epoch": data.steps_per_epoch,
                "total_steps": training.total_steps,
            },
            "schedule": _schedule(training),
        },
    )


def _schedule(training: Training) -> dict[str, object]:
    """The learning rate's decays; those after the first are extensions of the run."""
    return {"shape": training.config.optim.schedule, "decays": [asdict(each) for each in training.schedule.decays]}

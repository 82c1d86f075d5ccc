"""From checkpoint to running state and back: what is saved, what must be equal, and which checkpoint is taken."""

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from train.batching import MicroBatchShape
from train.checkpoints.store import STEP_FOLDER, Checkpoint, CheckpointStore, TrainerState, adapter_files
from train.config import Config
from train.data import TrainingData
from train.models.fingerprint import base_fingerprint
from train.models.language_model import adapter_config, load_adapters
from train.optim import load_optimizer_state, load_scaler_state, optimizer_state
from train.run.devices import compute_type
from train.run.exits import ExitCode, ExitWith
from train.run.processes import on_first_process, say
from train.run.versions import versions
from train.step import Training

IDENTITY_SECTIONS = ("lora", "optim")  # every field of these, and the single fields named in identity()
RUN_FILES = (
    "run.json",
    "metrics.jsonl",
    "exit.json",
    "answers.json",
    "answers_held_out.json",
    "checkpoints",
    "final",
    "wandb",
    ".heartbeats",
)


def identity(config: Config, data_fingerprint: str, data: TrainingData, device: torch.device) -> dict[str, object]:
    """Everything that makes two runs the same run; a checkpoint is continued only where all of it is equal."""
    values: dict[str, object] = {
        "model.base": base_fingerprint(config),
        "model.quantization": config.model.quantization,
        "model.dtype": compute_type(config.model.dtype, device).name,
        "data": data_fingerprint,
        "data.validation_fraction": config.data.validation_fraction,
        "data.weights": list(config.data.weights),
        "data.packing": config.data.packing,
        "data.group_by_length": config.data.group_by_length,
        "batch (samples in a step)": data.layout.samples_per_step,
        "train.seed": config.train.seed,
        "total optimizer steps": data.total_steps(config.train),
    }
    for section in IDENTITY_SECTIONS:
        for name, value in asdict(getattr(config, section)).items():
            values[f"{section}.{name}"] = list(value) if isinstance(value, tuple) else value
    return values


def check_same_run(checkpoint: Checkpoint, same_run: dict[str, object], accelerator: Accelerator) -> None:
    """Raises ExitWith(FINGERPRINT_MISMATCH) naming every difference; says which library versions differ."""
    saved = checkpoint.state.identity
    changed = [
        f"  {name}: {saved.get(name)!r} in the checkpoint, {same_run.get(name)!r} now"
        for name in sorted({*saved, *same_run})
        if saved.get(name) != same_run.get(name)
    ]
    if changed:
        raise ExitWith(
            ExitCode.FINGERPRINT_MISMATCH,
            f"{checkpoint.path} belongs to another run:\n" + "\n".join(changed) + "\n"
            "Run the command that started it, or choose another --run.dir, or --run.resume never to start again",
        )
    now = versions()
    other = [
        f"{name} {old} -> {now.get(name)}" for name, old in checkpoint.state.versions.items() if now.get(name) != old
    ]
    if other:
        say(accelerator, f"other versions than at the checkpoint, so no longer to the bit: {', '.join(other)}")


def choose(store: CheckpointStore, config: Config, accelerator: Accelerator) -> Checkpoint | None:
    """The checkpoint to continue from, by run.resume; the first process decides for all.

    Raises ExitWith(NO_VALID_CHECKPOINT) where one is wanted and none is good.
    """
    wanted = config.run.resume
    if wanted not in ("auto", "must", "never") and not Path(wanted).is_dir():
        reason = f"--run.resume {wanted}: write auto, must, never, or the path of a checkpoint folder"
        raise ExitWith(ExitCode.BAD_INPUT, reason)

    found: Checkpoint | None = None

    def decide() -> int:
        nonlocal found
        if wanted == "never":
            _archive(Path(config.run.dir))
            return 0
        found = store.latest() if wanted in ("auto", "must") else store.chosen(Path(wanted))
        if found is None and wanted == "must":
            reason = f"--run.resume must: there is no checkpoint in {store.root}"
            raise ExitWith(ExitCode.NO_VALID_CHECKPOINT, reason)
        return found.state.step if found else 0

    step = on_first_process(accelerator, decide)
    if accelerator.is_main_process:
        return found
    if wanted not in ("auto", "must", "never"):
        return store.load(Path(wanted))
    return store.load(store.root / f"step-{step:010d}") if step else None


def restore(training: Training, checkpoint: Checkpoint) -> None:
    """Puts the checkpoint into `training`; raises ExitWith(FINGERPRINT_MISMATCH) where names or shapes differ."""
    try:
        load_adapters(training.model, checkpoint.adapters)
        load_optimizer_state(training.optimizer, training.flat, checkpoint.optimizer)
        load_scaler_state(training.scaler, checkpoint.state.scaler)
    except ValueError as error:
        raise ExitWith(ExitCode.FINGERPRINT_MISMATCH, f"{checkpoint.path}: {error}") from None
    now, before = layout(training), {"tokens in a tile": 0} | checkpoint.state.layout
    if before != now:
        say(training.accelerator, f"another layout than before: {before} -> {now}, same samples a step")


def save_state(
    training: Training, store: CheckpointStore, same_run: dict[str, object], moment: Callable[[], dict[str, Any]]
) -> None:
    """Writes a checkpoint from the first process; raises ExitWith, in all processes, if that fails.

    `moment` gives the fields of TrainerState that change from step to step, and may raise OSError.
    """

    def write() -> int:
        state = TrainerState(
            identity=same_run,
            layout=layout(training),
            versions=versions(),
            scaler=training.scaler.state_dict(),
            **moment(),
        )
        files = adapter_files(training.parameters, adapter_config(training.model))
        store.save(files, optimizer_state(training.optimizer, training.flat), state)
        return 0

    on_first_process(training.accelerator, write)


def saved_shape(checkpoint: Checkpoint | None, data: TrainingData, merge: str) -> MicroBatchShape | None:
    """The run's passes, where it goes on in the same layout; None where it starts, or its passes are others."""
    saved: dict[str, Any] = checkpoint.state.layout if checkpoint else {}
    cut = data.layout
    same = (cut.per_device, cut.accumulation, cut.num_processes, merge)
    names = ("per_device", "accumulation", "processes")
    is_same = (*(saved.get(name) for name in names), saved.get("merge", merge)) == same
    tokens = int(saved.get("tokens in a pass", 0))
    return MicroBatchShape(tokens, int(saved.get("tokens in a tile", 0))) if is_same and tokens else None


def layout(training: Training) -> dict[str, object]:
    """How the global batch is cut; free to change while the product stays."""
    cut, passes = training.data.layout, training.plan.micro_batch_shape
    return {
        "per_device": cut.per_device,
        "accumulation": cut.accumulation,
        "processes": cut.num_processes,
        "merge": training.config.batch.merge,
        "tokens in a pass": passes.tokens,
        "tokens in a tile": passes.mlp_tile,
        "engine": training.model.engine_name,
    }


def _archive(run_dir: Path) -> None:
    """Moves what an earlier run left in `run_dir` to its previous-N folder; nothing is deleted."""
    present = [run_dir / name for name in RUN_FILES if (run_dir / name).exists()]
    present += run_dir.glob("nonfinite-step-*.json")
    if not any(STEP_FOLDER.fullmatch(path.name) for path in (run_dir / "checkpoints").glob("*")) and len(present) < 2:
        return
    taken = [path.name.removeprefix("previous-") for path in run_dir.glob("previous-*")]
    number = 1 + max((int(name) for name in taken if name.isdigit()), default=0)
    target = run_dir / f"previous-{number}"
    target.mkdir()
    for path in present:
        os.rename(path, target / path.name)
    print(f"the earlier run is kept in {target}", flush=True)

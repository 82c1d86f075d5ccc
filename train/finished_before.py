"""A command that is repeated although its run has finished: said, with what can be done, before the base is read."""

from contextlib import suppress
from dataclasses import asdict

import safetensors.torch
import torch
from accelerate import Accelerator
from rich.console import Console
from safetensors import SafetensorError

from train.checkpoints.contents import ADAPTER, Checkpoint
from train.config import Config
from train.data import TrainingData
from train.deliver.final import BASE
from train.early_stop import ValidationRecord
from train.ending import EARLY
from train.recipe import longer
from train.run.attempts import plain, read_attempts
from train.run.exits import ExitCode
from train.run.folder import RunFolder, read_object
from train.run.processes import on_first_process
from train.track.display import put, room_of, run_facts
from train.track.metrics_file import read_metrics
from train.track.summary import summary, table

# what may differ from the finished attempt without making anything of it worth doing again
DECIDES_NOTHING = {"run": ("resume", "extend", "timeout_minutes", "grace_seconds")}


def was_finished(config: Config, checkpoint: Checkpoint, data: TrainingData, accelerator: Accelerator) -> str | None:
    """Where this very command has done all its work before: why before the last step, or nothing; None where not.

    Processes agree on whether it has; the first one says so, and alone knows why. `checkpoint` is the one that the run
    would go on from, of this run and this data. Anything else than a repetition, such as other questions at the end or
    a final/ that is not whole, is for the job to do.
    """
    folder, early = RunFolder.of(config), ""

    def look() -> int:
        nonlocal early
        reason = _reason_of(config, folder, checkpoint.state.step)
        if config.run.resume not in ("auto", "must") or reason is None or not _final_stands(folder, checkpoint):
            return 0
        early = reason.partition(EARLY)[2]
        _say(config, data, accelerator, checkpoint)
        return 1

    return early if on_first_process(accelerator, look) else None


def _reason_of(config: Config, folder: RunFolder, step: int) -> str | None:
    """How the last attempt ended, if it finished after `step` with all that decides something as it is now."""
    attempts = read_attempts(folder)
    end = attempts[-1].end if attempts else None
    if not end or (end.get("code"), end.get("last_step")) != (ExitCode.FINISHED, step):
        return None
    is_same = _deciding(plain(asdict(config))) == _deciding(read_object(folder.config))
    return str(end.get("reason", "")) if is_same else None


def _deciding(config: dict) -> dict:
    """The options of a configuration, as JSON has it, that decide what is made."""
    without = {section: {name: None for name in names} for section, names in DECIDES_NOTHING.items()}
    return config | {section: config.get(section, {}) | names for section, names in without.items()}


def _final_stands(folder: RunFolder, checkpoint: Checkpoint) -> bool:
    """Whether final/ is whole; made of the checkpoint's step, it must have the checkpoint's adapters."""
    step = read_object(folder.final / BASE).get("step")
    if not (folder.final / ADAPTER).exists():  # a model that was trained whole is written again
        return False
    with suppress(OSError, SafetensorError):
        found = safetensors.torch.load_file(folder.final / ADAPTER)
        if step != checkpoint.state.step:
            return isinstance(step, int)
        wanted = checkpoint.adapters
        return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in found)
    return False


def _say(config: Config, data: TrainingData, accelerator: Accelerator, checkpoint: Checkpoint) -> None:
    facts, console = run_facts(config, data, accelerator), Console()
    rows = read_metrics(facts.folder.metrics)
    lines = ["this run has finished before; nothing is left to do", ""]
    lines += summary(facts, rows, room_of(console)) if rows else []
    extended = "" if config.optim.schedule == "constant" else " --run.extend true"
    saved = checkpoint.state.validation
    extended += ValidationRecord.resumed(saved, saved.get("measured_on", "")).to_go_on(config.validate)
    more = [
        (f"{longer(config.train, data.steps_per_epoch)}{extended}", "trains on"),
        (f"--lora.init_from {facts.folder.path} --run.dir NEW", "another run from this adapter, on any data"),
        ("--run.resume never", "trains again, and keeps this run aside"),
    ]
    put(console, "\n".join([*lines, *table("or add", more)]))

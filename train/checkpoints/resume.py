"""From checkpoint to running state and back: what is saved, what must be equal, and which checkpoint is used."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from train.batching import MicroBatchShape
from train.checkpoints.contents import Checkpoint, TrainerState, adapter_files
from train.checkpoints.fetch import check_one_folder, fetch_newer, share, withdraw
from train.checkpoints.identity import DETAILS, differences
from train.checkpoints.mirror import Mirror
from train.checkpoints.remote import OPTION
from train.checkpoints.source import mark_of
from train.checkpoints.store import CheckpointStore
from train.config import Config
from train.data import TrainingData
from train.models.initial_adapter import check_place
from train.models.language_model import adapter_config, load_adapters
from train.optim import load_optimizer_state, load_scaler_state, optimizer_state
from train.profiles import FORMERLY, PROFILES
from train.run.exits import ExitCode, ExitWith
from train.run.processes import on_first_process, say
from train.run.same_command import differing
from train.run.versions import package_version, versions
from train.step import Training

# names that earlier versions gave to entries of a checkpoint's layout
OLD_LAYOUT_NAMES = {"tokens in a pass": "micro_batch_tokens", "tokens in a tile": "mlp_tile_tokens"}
# what follows from a machine where no option says it
OF_MACHINES = {
    "data.date": "templates see another day in some processes, by their clocks or time zones; give --data.date",
    "model.dtype": "the processes' GPUs would compute in different types (some have no bf16); give --model.dtype fp16",
}


def check_same_run(
    checkpoint: Checkpoint, same_run: dict[str, object], config: Config, accelerator: Accelerator
) -> None:
    """Raises ExitWith(FINGERPRINT_MISMATCH) naming every difference; says which versions differ."""
    changed = differences(checkpoint.state.identity, same_run)
    if changed:
        former = _former_profile(config, checkpoint.state.identity)
        raise ExitWith(
            ExitCode.FINGERPRINT_MISMATCH,
            f"{checkpoint.path} belongs to another run:\n" + "\n".join(f"  {line}" for line in changed) + "\n"
            "Run the command that started it, or choose another --run.dir, or --run.resume never to start again"
            + (
                f". An earlier version's --profile {config.profile} is --profile {former} now: with it, "
                f"--run.dir {config.run.dir} and its other options the run goes on"
                if former
                else ""
            ),
        )
    before, now = checkpoint.state.versions, made_with(accelerator.device)
    # what is only on one side does not count: CPU threads, where the run has moved to or from a GPU
    other = [f"{name} {old} -> {now[name]}" for name, old in before.items() if now.get(name, old) != old]
    if other:
        changes = ", ".join(other)
        say(accelerator, f"versions have changed since the checkpoint, so the last bits may differ: {changes}")


def _former_profile(config: Config, saved: Mapping[str, Any]) -> str:
    """The profile that has the recipe which this one had in earlier versions, if the checkpoint is of that recipe.

    It is by its base or, where another was named, by its rank and scale. "" where there is none.
    """
    name = FORMERLY.get(config.profile)
    if name is None:
        return ""
    former = PROFILES[name]()
    details = saved.get(DETAILS)
    base = details.get("model.name_or_path") if isinstance(details, dict) else None
    same_base = base == former.model.name_or_path != config.model.name_or_path
    scale = (former.lora.r, former.lora.alpha)
    same_scale = (saved.get("lora.r"), saved.get("lora.alpha")) == scale != (config.lora.r, config.lora.alpha)
    return name if same_base or same_scale else ""


def check_same_everywhere(same_run: dict[str, object], accelerator: Accelerator) -> None:
    """Raises ExitWith(BAD_INPUT) in all processes unless they have the same base, data and recipe.

    Each reads them itself: a hub's branch that moves meanwhile, or an older file on one machine, would else be trained
    together with another.
    """
    # details may name other folders; a date is there where the template asks for one
    decisive = {"data.date": ""} | {name: value for name, value in same_run.items() if name != DETAILS}
    names = differing(accelerator, dict(sorted(decisive.items())))
    if reason := next((OF_MACHINES[name] for name in OF_MACHINES if name in names), ""):
        raise ExitWith(ExitCode.BAD_INPUT, reason)
    if names:
        raise ExitWith(
            ExitCode.BAD_INPUT,
            f"the processes have not read the same: {', '.join(names)}; give each machine the same files, and a hub "
            "model its commit (--model.revision)",
        )


def made_with(device: torch.device) -> dict[str, str]:
    """The versions, and on a CPU the number of threads: sums are divided among them and rounded accordingly.

    On a GPU also liger-kernel's, or that there is none: the reference engine then computes with other kernels.
    """
    if device.type == "cpu":
        return versions() | {"CPU threads": str(torch.get_num_threads())}
    return versions() | {"liger-kernel": package_version("liger-kernel")}


def choose(
    store: CheckpointStore, config: Config, accelerator: Accelerator, mirror: Mirror | None = None
) -> Checkpoint | None:
    """The checkpoint to continue from, by run.resume, fetched where only the mirror has it; the first process decides.

    Raises ExitWith(NO_VALID_CHECKPOINT) if one is wanted and none is valid.
    """
    wanted = config.run.resume
    found: Checkpoint | None = None

    def decide() -> int:
        nonlocal found
        if wanted not in ("auto", "must", "never") and not Path(wanted).is_dir():
            reason = f"--run.resume {wanted}: write auto, must, never, or the path of a checkpoint folder"
            raise ExitWith(ExitCode.BAD_INPUT, reason)
        if mirror is not None:
            mirror.check()
        if wanted == "never":
            check_place(config)
            store.folder.archive()
            store.run_uid()  # of its own at once: the mirror has the old run's checkpoints, which are not this one's
            return 0
        found = _newest(store, mirror) if wanted in ("auto", "must") else _chosen(store, mirror, Path(wanted))
        if found is None:
            _check_fresh(store, mirror, wanted)
        return found.state.step if found else 0

    if mirror is None and wanted in ("auto", "must"):
        check_one_folder(store, accelerator)
    step = on_first_process(accelerator, decide)
    if wanted in ("auto", "must"):
        share(mirror, store, accelerator, step)
    if not step:
        return None
    if wanted in ("auto", "must"):
        remedy = f"the run folder must be on a disk that all of them see, or give {OPTION}"
        return _in_all(store, found, store.path_of(step), remedy, accelerator)
    remedy = "--run.resume must name the same checkpoint on each machine"
    return _in_all(store, found, Path(wanted), remedy, accelerator)


def _check_fresh(store: CheckpointStore, mirror: Mirror | None, wanted: str) -> None:
    """Raises ExitWith(NO_VALID_CHECKPOINT) where a checkpoint is wanted, or was there by the run's own records."""
    where = store.root if mirror is None else f"{store.root} or at {mirror.url}"
    if wanted == "must":
        raise ExitWith(ExitCode.NO_VALID_CHECKPOINT, f"--run.resume must: there is no checkpoint in {where}")
    if store.is_emptied():
        reason = f"this run's records tell of checkpoints, and there is none in {where}: put them back"
        raise ExitWith(ExitCode.NO_VALID_CHECKPOINT, f"{reason}, or --run.resume never starts again")


def _in_all(
    store: CheckpointStore, found: Checkpoint | None, path: Path, remedy: str, accelerator: Accelerator
) -> Checkpoint:
    """The checkpoint in `path` in each process, of which the first has `found` it.

    Raises ExitWith(BAD_INPUT) in all, with the remedy, where one cannot read it, or has another one there.
    """
    mark = ""
    try:
        found = found or store.load(path)
        mark = mark_of(path)
    except (ExitWith, OSError) as error:
        print(f"process {accelerator.process_index}: {error}", flush=True)
    if differing(accelerator, {"checkpoint": mark}) or found is None:
        reason = f"not all processes find the {path.name} from which the first one goes on"
        raise ExitWith(ExitCode.BAD_INPUT, f"{reason}: {remedy}")
    return found


def _newest(store: CheckpointStore, mirror: Mirror | None) -> Checkpoint | None:
    """The newest valid checkpoint, here or at the mirror; raises ExitWith(NO_VALID_CHECKPOINT) as the store does."""
    found: Checkpoint | None = None
    reason: ExitWith | None = None
    try:
        found = store.latest()
    except ExitWith as damaged:
        reason = damaged
    if mirror is not None and fetch_newer(mirror, store, found.state.step if found else 0):
        return store.latest()
    if reason is not None:
        raise reason
    return found


def _chosen(store: CheckpointStore, mirror: Mirror | None, folder: Path) -> Checkpoint:
    """The checkpoint that the user named; later ones of this run are superseded at the mirror as well."""
    found = store.chosen(folder)
    if mirror is not None and store.holds(found):
        withdraw(mirror, store.run_uid(), found.state.step)
    return found


def restore(training: Training, checkpoint: Checkpoint) -> None:
    """Loads the checkpoint into `training`; raises ExitWith(FINGERPRINT_MISMATCH) if names or shapes differ."""
    try:
        load_adapters(training.model, checkpoint.adapters)
        load_optimizer_state(training.optimizer, training.flat, checkpoint.optimizer)
        load_scaler_state(training.scaler, checkpoint.state.scaler)
    except ValueError as error:
        raise ExitWith(ExitCode.FINGERPRINT_MISMATCH, f"{checkpoint.path}: {error}") from None
    now, before = checkpoint_layout(training), _saved_layout(checkpoint)
    del now["asked"]  # which `kept_batch` has told of
    changes = [f"{name} {before.get(name)} -> {now[name]}" for name in now if before.get(name) != now[name]]
    if changes:
        say(training.accelerator, f"the layout has changed ({', '.join(changes)}); each step has the same samples")


def save_state(
    training: Training, store: CheckpointStore, same_run: dict[str, object], moment: Callable[[], dict[str, Any]]
) -> None:
    """Writes a checkpoint from the first process; raises ExitWith, in all processes, if that fails.

    `moment` gives the fields of TrainerState that change from step to step, and may raise OSError.
    """

    def write() -> int:
        state = TrainerState(
            identity=same_run,
            layout=checkpoint_layout(training),
            versions=made_with(training.accelerator.device),
            schedule=training.schedule.rows(),
            scaler=training.scaler.state_dict(),
            **moment(),
        )
        files = adapter_files(training.parameters, adapter_config(training.model))
        store.save(files, optimizer_state(training.optimizer, training.flat), state)
        return 0

    on_first_process(training.accelerator, write)


def saved_shape(checkpoint: Checkpoint | None, data: TrainingData, merge: str) -> MicroBatchShape | None:
    """The micro-batches of the run that goes on, which it keeps; None where it starts, or its layout has changed."""
    saved = _saved_layout(checkpoint) if checkpoint else {}
    layout = data.layout
    now = {"per_device": layout.per_device, "accumulation": layout.accumulation, "processes": layout.num_processes}
    is_same = {name: saved.get(name) for name in now} == now and saved.get("merge", merge) == merge
    tokens, layout = int(saved.get("micro_batch_tokens", 0)), saved.get("layout", "fused")
    if not is_same or (layout == "fused" and not tokens):
        return None
    return MicroBatchShape(tokens, int(saved["mlp_tile_tokens"]), layout)


def checkpoint_layout(training: Training) -> dict[str, object]:
    """How the global batch is split, as a checkpoint keeps it; free to change while the product stays."""
    layout, shape = training.data.layout, training.plan.micro_batch_shape
    return {
        "per_device": layout.per_device,
        "accumulation": layout.accumulation,
        "processes": layout.num_processes,
        "asked": layout.asked,
        "dealt by": "cost" if training.data.is_dealt(training.plan) else "position",
        "merge": training.config.batch.merge,
        "micro_batch_tokens": shape.tokens,
        "mlp_tile_tokens": shape.mlp_tile,
        "layout": shape.layout,
        "engine": training.model.engine_name,
    }


def _saved_layout(checkpoint: Checkpoint) -> dict[str, Any]:
    """The checkpoint's layout by today's names; before there were tiles an MLP took all tokens together (0).

    The reference engine once padded everything, and a process took its samples by their position in the step.
    """
    saved = {OLD_LAYOUT_NAMES.get(name, name): value for name, value in checkpoint.state.layout.items()}
    layout = "padded" if saved.get("engine") == "reference" else "fused"
    return {"mlp_tile_tokens": 0, "layout": layout, "dealt by": "position", **saved}

"""A checkpoint that is at the mirror and not here: fetched, and verified as one that was written here."""

import json
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from accelerate import Accelerator

from train.checkpoints import contents
from train.checkpoints.contents import CONTENTS, MANIFEST
from train.checkpoints.mirror import Copy, DamagedCopyError, Mirror, copies_to_resume
from train.checkpoints.remote import OPTION, reason_of
from train.checkpoints.source import CHECKPOINT, RUN, Source, mark_of
from train.checkpoints.store import CheckpointStore
from train.run.durable import make_folder, publish, sync
from train.run.exits import ExitCode, ExitWith
from train.run.processes import any_process, on_first_process

T = TypeVar("T")
MARK_DIGITS = 6  # of a manifest's sha256: what fp32, in which processes add, holds exactly


def fetch_newer(mirror: Mirror, store: CheckpointStore, than: int) -> bool:
    """Fetches the newest whole checkpoint of this run, if its step is higher than `than`; returns whether it did.

    Raises ExitWith(NO_VALID_CHECKPOINT) where there are such and none is what it should be, and nothing is here.
    """
    known = store.known_uid()
    copies = _reached(mirror, lambda: copies_to_resume(mirror, known))
    newer = [copy for copy in copies if copy.step > than]
    if known and not copies and (others := _reached(mirror, mirror.copies)):
        print(
            f"mirror    {mirror.url} has checkpoints of another run, up to step {others[0].step}; they stay, and this "
            "run has folders of its own there. A --run.dir without a run goes on from them",
            flush=True,
        )
    for copy in newer:
        try:
            began = time.monotonic()
            _reached(mirror, lambda copy=copy: _take(mirror, store, copy, copies))
        except DamagedCopyError as damaged:
            print(f"mirror    {copy.folder} is not usable: {damaged}", flush=True)
            continue
        seconds, size = time.monotonic() - began, copy.num_bytes / 2**20
        print(f"mirror    step {copy.step} fetched from {mirror.url}: {size:,.1f} MiB in {seconds:.1f} s", flush=True)
        return True
    if newer and not than:
        reason = f"no valid checkpoint at {OPTION} {mirror.url}, {len(newer)} damaged; --run.resume never starts again"
        raise ExitWith(ExitCode.NO_VALID_CHECKPOINT, reason)
    return False


def share(mirror: Mirror | None, store: CheckpointStore, accelerator: Accelerator, step: int) -> None:
    """Gives each node the checkpoint of `step` that the first process has, where there is no disk between them.

    Each node's first process looks, and fetches it. What the mirror lacks the first process copies there before.
    """
    if mirror is None or not step or accelerator.num_processes == 1:
        return
    mark = on_first_process(accelerator, lambda: int(mark_of(store.path_of(step))[:MARK_DIGITS], 16))
    wanted = f"{mark:0{MARK_DIGITS}x}"
    lacks = accelerator.is_local_main_process and not _has(store, step, wanted)
    if not any(any_process(accelerator, lacks)):
        return
    on_first_process(accelerator, lambda: _put(mirror, store, step))
    reason = ""
    if lacks:
        try:
            found = [copy for copy in _reached(mirror, mirror.copies) if _is(copy, step, wanted)]
            if not found:
                raise DamagedCopyError(f"step {step} is not there")
            _reached(mirror, lambda: publish_copy(mirror, store, found[0]))
        except (DamagedCopyError, ExitWith) as error:
            reason = f"process {accelerator.process_index}: step {step} cannot be fetched from {mirror.url}: {error}"
            print(reason, flush=True)
    if any(any_process(accelerator, bool(reason))):
        raise ExitWith(ExitCode.NO_VALID_CHECKPOINT, reason or "a node could not fetch the checkpoint, and says why")


def check_one_folder(store: CheckpointStore, accelerator: Accelerator) -> None:
    """Raises ExitWith(BAD_INPUT) where a node's run folder is further than the first process's: a disk of its own.

    Nodes that see no common disk would start again, in silence, where another machine becomes the first.
    """
    newest = max(store.folder.checkpoint_steps, default=0)
    of_first = on_first_process(accelerator, lambda: newest)
    is_further = accelerator.is_local_main_process and newest > of_first
    if any(any_process(accelerator, is_further)):
        raise ExitWith(
            ExitCode.BAD_INPUT,
            f"a machine has a later checkpoint in {store.folder.path} than the first one, which has step {of_first}: "
            f"the run folder must be on a disk that all of them see, or give {OPTION}",
        )


def withdraw(mirror: Mirror, run_uid: str, after: int) -> None:
    """Takes a run's later copies back; raises ExitWith(BAD_INPUT) where the mirror refuses."""
    _reached(mirror, lambda: mirror.withdraw(run_uid, after))


def _take(mirror: Mirror, store: CheckpointStore, copy: Copy, others: Sequence[Copy]) -> None:
    """Makes a copy the newest checkpoint here, after the run's records and the one with the lowest validation loss.

    Nothing that stands here is touched before all of it is here and verified. The checkpoint comes last: a start after
    a kill in between fetches again.
    """
    make_folder(store.folder.path)
    with publish(store.path_of(copy.step)) as folder:
        _fill(mirror, copy, folder)
        fetched = _records(mirror, store, copy)
        best = _best_step(folder)
        if best and best != copy.step and not store.path_of(best).is_dir():
            _fetch_best(mirror, store, [other for other in others if other.step == best], best)
        for temporary, path in fetched.items():
            os.replace(temporary, path)
        sync(store.folder.path)


def _records(mirror: Mirror, store: CheckpointStore, copy: Copy) -> dict[Path, Path]:
    """Temporary file -> the record that it becomes. This machine's own identity and attempts stay, if it has any."""
    folder, fetched = store.folder, {}
    for path in folder.carried:
        name = f"{RUN}/{path.name}"
        stays = path in (folder.identity, folder.attempts) and path.exists()
        if name in copy.files and not stays:
            temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
            mirror.fetch(copy, name, temporary)
            fetched[temporary] = path
    return fetched


def _fetch_best(mirror: Mirror, store: CheckpointStore, found: Sequence[Copy], step: int) -> None:
    """Fetches the checkpoint of which validate.final best would make final/; says where that is not possible."""
    try:
        if not found:
            raise DamagedCopyError("it is not there")
        publish_copy(mirror, store, found[0])
    except DamagedCopyError as error:
        print(f"mirror    step {step}, with the lowest validation loss, cannot be fetched: {error}", flush=True)


def publish_copy(mirror: Mirror, store: CheckpointStore, copy: Copy) -> None:
    """Makes a copy the checkpoint of its step here; raises DamagedCopyError where it is not whole."""
    with publish(store.path_of(copy.step)) as folder:
        _fill(mirror, copy, folder)


def _fill(mirror: Mirror, copy: Copy, folder: Path) -> None:
    """Fetches a checkpoint's files and verifies them as a start does with those that were written here."""
    for name in (*CONTENTS, MANIFEST):
        mirror.fetch(copy, f"{CHECKPOINT}/{name}", folder / name)
    reason = contents.defect(folder)[0]
    if not reason and json.loads((folder / MANIFEST).read_bytes())["step"] != copy.step:
        reason = "it is of another step"
    if reason:
        mirror.damaged.add(copy.folder)
        raise DamagedCopyError(reason)


def _best_step(checkpoint: Path) -> int:
    """The step with the lowest validation loss, by the state of a verified checkpoint; 0 where there is none."""
    return contents.read(checkpoint).state.validation.get("best_step", 0)


def _has(store: CheckpointStore, step: int, wanted: str) -> bool:
    with suppress(OSError):
        return mark_of(store.path_of(step)).startswith(wanted)
    return False


def _is(copy: Copy, step: int, wanted: str) -> bool:
    return copy.step == step and copy.folder.rpartition("-")[2].startswith(wanted)


def _put(mirror: Mirror, store: CheckpointStore, step: int) -> int:
    source = Source.of(store.path_of(step), store.folder)
    try:
        _reached(mirror, lambda: mirror.put(source))
    finally:
        source.close()
    return 0


def _reached(mirror: Mirror, action: Callable[[], T]) -> T:
    """What `action` returns; raises ExitWith(BAD_INPUT) where the mirror fails, and DamagedCopyError as it is."""
    try:
        return action()
    except (DamagedCopyError, ExitWith):
        raise
    except Exception as error:
        reason = f"{OPTION} {mirror.url} fails while it is read: {reason_of(error)}; run the same command again"
        raise ExitWith(ExitCode.BAD_INPUT, reason) from None

"""Writes that a crash or a power cut leaves complete or undone."""

import fcntl
import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def write_atomically(path: Path, text: str, replaces: bool = True) -> None:
    """Replaces the content of `path`: a reader, or a crash, finds the old file or the new one.

    Where it does not replace, a file that is there, or comes meanwhile, stays: FileExistsError.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if replaces or not _linked(temporary, path):
            os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def _linked(temporary: Path, path: Path) -> bool:
    """Gives a file its name unless another has it, which raises FileExistsError; False where disks have no links."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:
        return False
    temporary.unlink()
    return True


def make_folder(path: Path) -> None:
    """Creates `path` and its missing parents, each durably: a folder's entry is in its parent, which is synced."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def sync(path: Path) -> None:
    """Makes a file's content, or a folder's list of entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def publish(target: Path) -> Iterator[Path]:
    """Yields a temporary folder to fill, which then becomes `target` atomically and durably, or not at all.

    All that is in it is synced, then the folder; it is renamed, and the parent is synced. An older `target` is moved
    aside before the rename and removed at the end. On any error, and on Ctrl-C, the temporary folder is removed; what a
    kill left of an earlier try is removed at the start.
    """
    make_folder(target.parent)
    sweep(target.parent, glob.escape(target.name))
    temporary = target.parent / f".tmp-{target.name}-{uuid.uuid4().hex[:8]}"
    temporary.mkdir(mode=0o700)
    try:
        with _held(temporary):
            yield temporary
            for path in temporary.rglob("*"):
                sync(path)
            sync(temporary)
            replaced = aside_name(target, "trash") if target.exists() else None
            try:
                if replaced is not None:
                    os.rename(target, replaced)
                    sync(target.parent)
                os.rename(temporary, target)
            except BaseException:
                if replaced is not None and replaced.exists() and not target.exists():
                    os.rename(replaced, target)
                raise
            sync(target.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    if replaced is not None:
        shutil.rmtree(replaced, ignore_errors=True)


def sweep(folder: Path, name: str = "*") -> None:
    """Removes what killed processes left in `folder` beside what is called `name`: what they wrote, what they replaced.

    What a living process writes stays, and so does what was moved aside where nothing has come in its place.
    """
    for leftover in folder.glob(f".*-{name}-{'[0-9a-f]' * 8}"):
        kind, replaced = leftover.name[1:-9].split("-", 1)
        if kind == "tmp" or (kind == "trash" and (folder / replaced).exists()):
            with suppress(OSError), _held(leftover) as is_ours:
                if is_ours:
                    shutil.rmtree(leftover, ignore_errors=True)


@contextmanager
def _held(folder: Path) -> Iterator[bool]:
    """Locks a folder while entered, and yields whether that succeeded: the lock ends with the process, even by SIGKILL.

    Some network file systems lock no folder (flock(2), NFS details); there nothing is ever swept.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            is_held = True
        except OSError:
            is_held = False
        yield is_held
    finally:
        os.close(descriptor)


def make_readable(folder: Path) -> None:
    """Gives a folder and all in it the rights that the user's umask leaves, for a server that runs as another user."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (*folder.rglob("*"), folder):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def aside_name(folder: Path, kind: str) -> Path:
    """A new name beside `folder` that no checkpoint can have; hidden for the kind `trash`, which is removed."""
    dot = "." if kind == "trash" else ""
    return folder.with_name(f"{dot}{kind}-{folder.name}-{uuid.uuid4().hex[:8]}")


def name_before(aside: Path) -> str:
    """The name of what lies at a path of aside_name's."""
    return aside.name.split("-", 1)[1].rsplit("-", 1)[0]

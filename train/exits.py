"""How a run ends: exit codes, the exception that carries one, and `exit.json`."""

import json
import os
from enum import IntEnum
from pathlib import Path


class ExitCode(IntEnum):
    """Process exit codes; 75 to 78 keep their sysexits.h meaning (temporary failure, ..., bad configuration)."""

    FINISHED = 0
    INTERRUPTED = 75  # a checkpoint is durable: run the same command again
    SAVE_FAILED = 76  # the last save failed; older checkpoints, if there are any, stand
    FINGERPRINT_MISMATCH = 77  # the checkpoint belongs to another model, recipe or data set
    BAD_INPUT = 78  # configuration or data
    NON_FINITE = 79  # loss or gradient is not a finite number
    NO_VALID_CHECKPOINT = 80  # checkpoints exist, none verifies
    PEER_FAILURE = 81  # another process died or hangs


class ExitWith(Exception):
    """Ends the run with `code`; `reason` is shown to the user as it stands."""

    def __init__(self, code: ExitCode, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


def write_atomically(path: Path, text: str) -> None:
    """Replaces `path` by `text` so that a reader, or a crash, sees the old or the new file and nothing between."""
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def make_folder(path: Path) -> None:
    """Makes `path` and what is missing above it, each durably: a folder's entry is in the one that holds it."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        sync(path.parent)


def sync(path: Path) -> None:
    """Makes a file's content, or a folder's entries, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_exit(run_dir: Path, code: ExitCode, reason: str) -> None:
    """Records how the run ended: launchers flatten exit codes (accelerate and torchrun return 1 for all of them)."""
    make_folder(run_dir)
    record = {"code": int(code), "name": code.name.lower(), "reason": reason}
    write_atomically(run_dir / "exit.json", json.dumps(record, indent=2) + "\n")

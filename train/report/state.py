"""What became of a run, by its exit code or, where it has left none, by the lock on its folder."""

import os
from contextlib import suppress
from enum import StrEnum
from pathlib import Path

from train.run.exits import ExitCode

LOCKS = Path("/proc/locks")  # Linux only; a container sees its own processes' alone


class State(StrEnum):
    """What became of a run."""

    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"  # with a checkpoint; the same command goes on
    KILLED = "killed"  # it has left no exit code
    FAILED = "failed"
    NOT_STARTED = "not started"


MEANINGS = {
    ExitCode.FINISHED: "finished",
    ExitCode.DEFECT: "a defect of Handloop; its report is in the run folder",
    ExitCode.INTERRUPTED: "interrupted with a checkpoint: run the same command again",
    ExitCode.SAVE_FAILED: "something could not be saved; older checkpoints stand",
    ExitCode.FINGERPRINT_MISMATCH: "the checkpoint belongs to another recipe, model or data set",
    ExitCode.BAD_INPUT: "the configuration, the data or the machine could not be used",
    ExitCode.NON_FINITE: "too many steps whose loss or gradient was not a finite number",
    ExitCode.NO_VALID_CHECKPOINT: "no whole checkpoint where one was wanted",
    ExitCode.PEER_FAILURE: "another process died or hung: run the same command again",
    ExitCode.DELIVERY_FAILED: "trained, and final/ is complete; asking the questions failed",
    ExitCode.KILLED: "the trainer was killed from outside",
}


def meaning(code: int) -> str:
    """What an exit code says."""
    return next((text for known, text in MEANINGS.items() if known == code), "an exit code that this version lacks")


def state_by(code: int | None, is_held: bool, has_begun: bool) -> State:
    """The state by the last attempt's exit code (None: none is recorded) and the lock on the folder."""
    if is_held:
        return State.RUNNING
    if code is None:
        return State.KILLED if has_begun else State.NOT_STARTED
    ends = {ExitCode.FINISHED: State.FINISHED, ExitCode.INTERRUPTED: State.STOPPED, ExitCode.KILLED: State.KILLED}
    return next((state for known, state in ends.items() if known == code), State.FAILED)


def is_locked(lock: Path) -> bool:
    """Whether a process of this machine holds the run folder's lock.

    It is looked up and not tried: who tries holds it for a moment, in which a run that starts would be refused.
    """
    with suppress(OSError):
        inode = str(os.stat(lock).st_ino)
        for line in LOCKS.read_text().splitlines():  # 1: FLOCK ADVISORY WRITE PID MAJOR:MINOR:INODE START END
            words = line.split()
            if "FLOCK" in words and any(word.count(":") == 2 and word.endswith(f":{inode}") for word in words):
                return True
    return False

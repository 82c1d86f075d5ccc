"""The run folder."""

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from train.run.durable import make_folder, write_atomically
from train.run.exits import ExitCode, ExitWith


def write_exit(run_dir: Path, code: ExitCode, reason: str) -> None:
    """Records how the run ended: launchers flatten exit codes (accelerate and torchrun return 1 for all of them)."""
    make_folder(run_dir)
    record = {"code": int(code), "name": code.name.lower(), "reason": reason}
    write_atomically(run_dir / "exit.json", json.dumps(record, indent=2) + "\n")


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Holds the run folder for this job, or until the process dies; raises ExitWith(BAD_INPUT) when another has it."""
    try:
        make_folder(run_dir)
        file = (run_dir / ".lock").open("w")
    except OSError as error:
        raise ExitWith(ExitCode.BAD_INPUT, f"--run.dir {run_dir}: {error}; choose another") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            reason = f"{run_dir} is in use by another job; wait for it or choose another --run.dir"
            raise ExitWith(ExitCode.BAD_INPUT, reason) from None
        # of an earlier attempt: without exit.json the run lives, or was killed
        (run_dir / "exit.json").unlink(missing_ok=True)
        shutil.rmtree(run_dir / ".heartbeats", ignore_errors=True)
        yield

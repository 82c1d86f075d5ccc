"""`python -m train.health`: whether the training on this machine goes on; 1 and one line on stderr where it does not.

For the health check of a container, which is not told where the run is: it asks the processes. Reads only.
"""

import sys
import time
from contextlib import suppress
from pathlib import Path

from train.run.trainers import LATE_SECONDS, KnownRun, Trainer, read_run, read_trainers, that_wait

PROCESSES = Path("/proc")
# what takes no longer than the processes may wait for one another; loading, validating and asking may
LIMITED = ("training, step", "saving step")


def launcher_folders(processes: Path = PROCESSES) -> set[Path]:
    """The folders of the launchers whose trainers run here, by the environments that may be read."""
    found = set()
    for path in processes.glob("[0-9]*/environ"):
        with suppress(OSError):  # another user's, or it has ended
            for variable in path.read_bytes().split(b"\0"):
                name, _, value = variable.partition(b"=")
                if name == b"HANDLOOP_LAUNCHER" and value:
                    found.add(Path(value.decode(errors="surrogateescape")))
    return found


def trouble(folder: Path) -> str:
    """Why the run of this launcher does not go on; empty where it does, or has not begun, or is about to end."""
    run, living = read_run(folder), [trainer for trainer in read_trainers(folder) if trainer.is_alive]
    stopped = [trainer.rank for trainer in living if trainer.is_stopped]
    if stopped:
        return f"process {', '.join(stopped)} is stopped (as by SIGSTOP)"
    if run is None:
        return ""
    if any(beat.age() > run.timeout_seconds + LATE_SECONDS for beat in that_wait(living, run)):
        return f"processes wait for one that has not answered for {run.timeout_seconds:.0f} s"
    return "; ".join(late for trainer in living if (late := _is_late(folder, trainer, run)))


def _is_late(folder: Path, trainer: Trainer, run: KnownRun) -> str:
    with suppress(OSError):  # it has told nothing yet
        seconds = time.time() - (folder / f"doing-{trainer.pid}").stat().st_mtime
        if trainer.doing.startswith(LIMITED) and seconds > run.timeout_seconds:
            limit = f"--run.timeout_minutes allows {run.timeout_seconds:.0f} s"
            return f"process {trainer.rank}: {trainer.doing}, for {seconds:.0f} s; {limit}"
    return ""


def main() -> int:
    """Prints what is wrong; returns the exit code."""
    troubles = [why for folder in sorted(launcher_folders()) if (why := trouble(folder))]
    for why in troubles:
        print(why, file=sys.stderr)
    return 1 if troubles else 0


if __name__ == "__main__":
    sys.exit(main())

"""`accelerate launch` with the trainer's exit code, and with signals forwarded to the trainer.

    python -m train.launcher ACCELERATE_ARGUMENT ... train/main.py --profile NAME ...

accelerate and torchrun return 1 whatever the trainer returned; a SIGTERM to single-process `accelerate launch` kills it
and leaves the trainer running, and a SIGUSR1 kills torchrun. Here every trainer process writes its pid to a folder;
signals go to those processes alone, and the exit code is read from a file that the first of them writes at its end.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import FrameType

from train.run.exits import ExitCode
from train.run.signals import listen, stop_with_parent

SAVE_SECONDS = 60.0  # for which a trainer process may outlive accelerate, to save
SECONDS_BEFORE_KILL = 10.0  # between a first Ctrl-C and one that kills


class Launcher:
    """`accelerate launch` and the trainer processes that it starts."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        self.folder = folder
        self.stopped_by = ""
        self.first_ctrl_c = float("inf")  # time.monotonic()
        listen(self._forward)
        accelerate = str(Path(sys.executable).with_name("accelerate"))
        # in a session of its own, because a terminal's Ctrl-C must reach only this process, which forwards it once
        self.child = subprocess.Popen(
            [accelerate, "launch", *arguments],
            env={**os.environ, "HANDLOOP_LAUNCHER": str(folder)},
            start_new_session=True,
            preexec_fn=stop_with_parent,  # if the launcher is killed, training must not continue unseen
        )

    def _forward(self, number: int, frame: FrameType | None) -> None:
        now, self.stopped_by = time.monotonic(), signal.Signals(number).name
        # a trainer that waits for a dead peer does not react to Ctrl-C
        must_kill = number == signal.SIGINT and now - self.first_ctrl_c > SECONDS_BEFORE_KILL
        if number == signal.SIGINT:
            self.first_ctrl_c = min(self.first_ctrl_c, now)
        trainers = self.trainers()
        for process in trainers:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL if must_kill else number)
        if not trainers and list(self.folder.glob("pid-*")):  # the trainers have ended, but not accelerate
            with suppress(ProcessLookupError):
                os.killpg(self.child.pid, signal.SIGTERM)

    def trainers(self) -> list[int]:
        """The pids of the trainer processes that are alive."""
        return [pid for pid in (int(path.name[4:]) for path in self.folder.glob("pid-*")) if _is_alive(pid)]

    def wait(self) -> int:
        """Waits until accelerate and all trainers have ended; returns the exit code."""
        while self.child.poll() is None:
            if self.stopped_by and not list(self.folder.glob("pid-*")):
                self._end_before_training()
            time.sleep(0.05)
        deadline = time.monotonic() + SAVE_SECONDS
        while self.trainers() and time.monotonic() < deadline:
            time.sleep(0.05)
        for process in self.trainers():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        return self._code()

    def _end_before_training(self) -> None:
        """Ends accelerate when a stop signal comes before any trainer has started, so that there is nothing to save."""
        with suppress(ProcessLookupError):
            os.killpg(self.child.pid, signal.SIGTERM)
        self.child.wait()

    def _code(self) -> int:
        with suppress(OSError, ValueError):
            return int((self.folder / "exit").read_text())
        started = list(self.folder.glob("pid-*"))
        if self.stopped_by and not started:
            print(f"stopped by {self.stopped_by} before training began", file=sys.stderr)
            return ExitCode.INTERRUPTED
        if len(started) > 1 and not self.stopped_by:
            # no process wrote an exit code: they were killed, or waited for a dead peer
            return ExitCode.PEER_FAILURE
        code = self.child.returncode
        return 128 - code if code < 0 else code


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
        status = Path(f"/proc/{process}/stat")  # Linux only
        return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def main(arguments: list[str]) -> int:
    """Runs `accelerate launch ARGUMENTS`; returns the trainer's exit code."""
    with tempfile.TemporaryDirectory() as folder:
        return Launcher(arguments, Path(folder)).wait()

"""`accelerate launch` with its two faults mended: the exit code is the trainer's, and the trainer gets the signals.

    python -m train.launcher ACCELERATE_ARGUMENT ... train/main.py --profile NAME ...

accelerate and torchrun return 1 whatever the trainer returned; a SIGTERM to single-process `accelerate launch` kills it
and leaves the trainer running, and a SIGUSR1 kills torchrun. Here every trainer process leaves its number in a folder;
signals go to those processes alone, and the code comes from a file that the first of them writes last.
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

PATIENCE = 60.0  # seconds that a trainer process may outlive accelerate, to save
SECOND_THOUGHTS = 10.0  # seconds after a first Ctrl-C, from which on another kills


class Launcher:
    """One `accelerate launch` and the trainer processes under it."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        self.folder = folder
        self.stopped_by = ""
        self.interrupted = float("inf")  # when the first Ctrl-C came
        listen(self._forward)
        accelerate = str(Path(sys.executable).with_name("accelerate"))
        # a session of its own: a terminal's Ctrl-C then reaches this process alone, which passes it on once
        self.child = subprocess.Popen(
            [accelerate, "launch", *arguments],
            env={**os.environ, "HANDLOOP_LAUNCHER": str(folder)},
            start_new_session=True,
            preexec_fn=stop_with_parent,  # a killed launcher leaves nothing behind that trains on unseen
        )

    def _forward(self, number: int, frame: FrameType | None) -> None:
        now, self.stopped_by = time.monotonic(), signal.Signals(number).name
        # one that hangs in another's absence cannot hear Ctrl-C any more
        is_last_word = number == signal.SIGINT and now - self.interrupted > SECOND_THOUGHTS
        self.interrupted = min(self.interrupted, now) if number == signal.SIGINT else self.interrupted
        trainers = self.trainers()
        for process in trainers:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL if is_last_word else number)
        if not trainers and list(self.folder.glob("pid-*")):  # they have ended, what started them has not
            with suppress(ProcessLookupError):
                os.killpg(self.child.pid, signal.SIGTERM)

    def trainers(self) -> list[int]:
        """Processes that train and are alive."""
        return [pid for pid in (int(path.name[4:]) for path in self.folder.glob("pid-*")) if _is_alive(pid)]

    def wait(self) -> int:
        """The exit code, when accelerate and all trainers have ended."""
        while self.child.poll() is None:
            if self.stopped_by and not list(self.folder.glob("pid-*")):
                self._end_before_training()
            time.sleep(0.05)
        deadline = time.monotonic() + PATIENCE
        while self.trainers() and time.monotonic() < deadline:
            time.sleep(0.05)
        for process in self.trainers():
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        return self._code()

    def _end_before_training(self) -> None:
        """A stop signal came while accelerate was starting: no process trains yet, there is nothing to save."""
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
            # none of several could say what happened: they were killed, or waited in vain
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

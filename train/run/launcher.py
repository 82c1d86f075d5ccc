"""`accelerate launch` with two faults mended: it returns the trainer's exit code, and passes signals to the trainer.

    python -m train.launcher ACCELERATE_ARGUMENT ... train/main.py --profile NAME ...

accelerate and torchrun return 1 whatever the trainer returned. A SIGTERM to single-process `accelerate launch` kills it
and leaves the trainer running; a SIGUSR1 kills torchrun. Here every trainer process leaves its process id in a folder:
signals go to those processes only, and the exit code comes from a file that the first of them writes at its end.
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

PATIENCE = 60.0  # seconds that a trainer process may outlive accelerate in order to save
SECOND_THOUGHTS = 10.0  # seconds after the first Ctrl-C before another one kills


class Launcher:
    """One `accelerate launch` and the trainer processes under it."""

    def __init__(self, arguments: list[str], folder: Path) -> None:
        self.folder = folder
        self.stopped_by = ""
        self.interrupted = float("inf")  # when the first Ctrl-C came
        listen(self._forward)
        accelerate = str(Path(sys.executable).with_name("accelerate"))
        # in a session of its own, so that a terminal's Ctrl-C reaches only this process, which passes it on once
        self.child = subprocess.Popen(
            [accelerate, "launch", *arguments],
            env={**os.environ, "HANDLOOP_LAUNCHER": str(folder)},
            start_new_session=True,
            preexec_fn=stop_with_parent,  # a killed launcher must not leave a training run behind
        )

    def _forward(self, number: int, frame: FrameType | None) -> None:
        now, self.stopped_by = time.monotonic(), signal.Signals(number).name
        # a process that waits for one that is gone does not react to Ctrl-C any more
        is_last_word = number == signal.SIGINT and now - self.interrupted > SECOND_THOUGHTS
        self.interrupted = min(self.interrupted, now) if number == signal.SIGINT else self.interrupted
        trainers = self.trainers()
        for process in trainers:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL if is_last_word else number)
        if not trainers and list(self.folder.glob("pid-*")):  # they have ended, accelerate has not
            with suppress(ProcessLookupError):
                os.killpg(self.child.pid, signal.SIGTERM)

    def trainers(self) -> list[int]:
        """Ids of the trainer processes that are alive."""
        return [pid for pid in (int(path.name[4:]) for path in self.folder.glob("pid-*")) if _is_alive(pid)]

    def wait(self) -> int:
        """Waits until accelerate and all trainers have ended; returns the exit code."""
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
        """Ends accelerate after a signal that came before any process trained: there is nothing to save."""
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
            # several processes, and none recorded a code: they were killed, or waited for one that was
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

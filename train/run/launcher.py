"""`accelerate launch` with the trainer's exit code, and with signals forwarded to the trainer.

    python -m train.launcher ACCELERATE_ARGUMENT ... train/main.py --profile NAME ...

accelerate and torchrun return 1 whatever the trainer returned; a SIGTERM to single-process `accelerate launch` kills it
and leaves the trainer running, and a SIGUSR1 kills torchrun. Here every trainer process writes its pid to a folder;
signals go to those processes alone, and the exit code is read from a file that the first of them writes at its end.
Where one of them is lost, or the others wait for it in vain, the launcher ends the others, names it, and writes what
they could not: exit.json and the end of the attempt.
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType

import psutil
import yaml

from train.run.attempts import AttemptLog, read_attempts
from train.run.durable import write_atomically
from train.run.exits import ExitCode, ExitWith
from train.run.folder import RunFolder, read_object
from train.run.host_memory import oom_kills
from train.run.redact import redact
from train.run.signals import listen, stop_with_parent
from train.run.trainers import LATE_SECONDS, KnownRun, Patience, Trainer, blame, read_run, read_trainers

SAVE_SECONDS = 60.0  # for which a trainer process may outlive accelerate, to save
SECONDS_BEFORE_KILL = 10.0  # between a first Ctrl-C and one that kills
PEER_SECONDS = 6.0  # in which processes end by themselves when another one is lost
REPEAT = "run the same command again"
MEMORY = (
    "host memory ran out, and the kernel killed a process for it: free some, raise what the container may take, or "
    "lower --batch.per_device and --data.max_length; --memory.offload none needs less where the GPU has room"
)
# ends that all processes agree on; the first one may then take longer, to close its trackers
AGREED = (
    *(ExitCode.INTERRUPTED, ExitCode.SAVE_FAILED, ExitCode.FINGERPRINT_MISMATCH),
    *(ExitCode.NON_FINITE, ExitCode.NO_VALID_CHECKPOINT),
)


class Launcher:
    """`accelerate launch` and the trainer processes that it starts."""

    def __init__(self, command: Sequence[str], folder: Path, output: int | None = None) -> None:
        """`output` is the descriptor to which the trainers' stdout goes; None: this process's own."""
        self.folder = folder
        self.stopped_by = ""
        self.first_ctrl_c = float("inf")  # time.monotonic()
        self.is_killed_by_hand = False
        self.deadline = float("inf")  # time.monotonic(): the trainers that still live then are ended
        self.reason = ""  # why they were ended
        self.end = ""  # why the run has ended, after `wait`
        self.patience = Patience()
        self.stopped_since: dict[int, float] = {}  # pid -> time.monotonic(), of trainers that are stopped
        self.began, self.oom_kills = datetime.now(UTC).isoformat(timespec="seconds"), oom_kills()
        listen(self._forward)
        # in a session of its own, because a terminal's Ctrl-C must reach only this process, which forwards it once
        self.child = subprocess.Popen(
            command,
            stdout=output,
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
        self.is_killed_by_hand |= must_kill
        living = self.living()
        for trainer in living:
            _send(trainer.pid, signal.SIGKILL if must_kill else number)
        if not living and list(self.folder.glob("pid-*")):  # the trainers have ended, but not accelerate
            self._end_accelerate(signal.SIGTERM)

    def living(self) -> list[Trainer]:
        """The trainer processes that are alive."""
        return [trainer for trainer in read_trainers(self.folder) if trainer.is_alive]

    def wait(self) -> int:
        """Waits until accelerate and all trainers have ended; returns the exit code."""
        while self.child.poll() is None:
            if self.stopped_by and not list(self.folder.glob("pid-*")):
                self._end_before_training()
            self._end_those_who_wait()
            time.sleep(0.05)
        self._limit(SAVE_SECONDS)
        while self.living() and time.monotonic() < self.deadline:
            time.sleep(0.05)
        for trainer in self.living():
            _send(trainer.pid, signal.SIGKILL)
        return self._code()

    def _limit(self, seconds: float) -> None:
        self.deadline = min(self.deadline, time.monotonic() + seconds)

    def _end_those_who_wait(self) -> None:
        """Ends the trainers that cannot go on, and then accelerate, which would wait for them for 30 s more."""
        trainers, run = read_trainers(self.folder), read_run(self.folder)
        living = [trainer for trainer in trainers if trainer.is_alive]
        if len(trainers) < 2 or not living:
            return
        for trainer in trainers:
            if trainer.is_lost or trainer.code:
                self._limit(SAVE_SECONDS if trainer.code in AGREED else PEER_SECONDS)
        if run is not None and (self.patience.is_at_an_end(trainers, run) or self._is_stopped_for_long(living, run)):
            self._limit(0.0)
        if time.monotonic() >= self.deadline:
            self.reason = self.reason or blame(trainers, run)  # while it can still be seen who is stopped
            for trainer in living:
                _send(trainer.pid, signal.SIGKILL)
            self._end_accelerate(signal.SIGKILL)

    def _is_stopped_for_long(self, living: Sequence[Trainer], run: KnownRun) -> bool:
        """Whether a trainer has been stopped for longer than the others wait, wherever it was."""
        now = time.monotonic()
        stopped = {trainer.pid for trainer in living if trainer.is_stopped}
        self.stopped_since = {pid: self.stopped_since.get(pid, now) for pid in stopped}
        return any(now - since > run.timeout_seconds + LATE_SECONDS for since in self.stopped_since.values())

    def _end_accelerate(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.child.pid, number)

    def _end_before_training(self) -> None:
        """Ends accelerate when a stop signal comes before any trainer has started, so that there is nothing to save."""
        self._end_accelerate(signal.SIGTERM)
        self.child.wait()

    def _code(self) -> int:
        trainers, run = read_trainers(self.folder), read_run(self.folder)
        with suppress(OSError, ValueError):
            code = int((self.folder / "exit").read_text())
            self.end = next((trainer.reason for trainer in trainers if trainer.code == code), "")
            # another process has said it before there was a group, and the first was ended while it waited
            if run is not None and trainers and trainers[0].code is None and not run.folder.exit.exists():
                self._record(ExitWith(ExitCode(code), self.end), run.folder, trainers)
            return code
        if self.stopped_by and not trainers:
            self.end = f"stopped by {self.stopped_by} before training began"
            print(self.end, file=sys.stderr)
            return ExitCode.INTERRUPTED
        recorded = read_object(run.folder.exit).get("code") if run else None
        if isinstance(recorded, int):  # its trackers were still being closed, and it has said nothing
            assert run is not None
            self.end = str(read_object(run.folder.exit).get("reason"))
            print(f"\nhandloop: {self.end}", file=sys.stderr, flush=True)
            return recorded
        if not any(trainer.code or trainer.is_lost for trainer in trainers):
            code = self.child.returncode
            return 128 - code if code < 0 else code
        end = self._end_of(trainers)
        self.end = redact(end.reason)
        print(f"\nhandloop: {self.end}", file=sys.stderr, flush=True)
        if run is not None:
            self._record(end, run.folder, trainers)
        return end.code

    def _end_of(self, trainers: Sequence[Trainer]) -> ExitWith:
        """The end of a run whose first process could not say it."""
        # one that others have lost is what they end with
        failed = sorted((t for t in trainers if t.code), key=lambda trainer: trainer.code == ExitCode.PEER_FAILURE)
        if self.is_killed_by_hand or any(trainer.code == 128 + signal.SIGINT for trainer in failed):
            return ExitWith(ExitCode.KILLED, f"ended by a second Ctrl-C, without saving; {self._repeat()}")
        if failed:
            code = next((code for code in ExitCode if code == failed[0].code), ExitCode.DEFECT)
            reason = failed[0].reason or f"it ended with {code} ({code.name.lower()}); see what it printed"
            return ExitWith(code, f"process {failed[0].rank}: {reason}")
        memory = f"{MEMORY}\n" if oom_kills() > self.oom_kills else ""
        if len(trainers) > 1:
            reason = self.reason or blame(trainers, read_run(self.folder))
            return ExitWith(ExitCode.PEER_FAILURE, f"{reason}\n{memory}{self._repeat()}")
        return self._end_of_only(trainers[0], memory)

    def _end_of_only(self, trainer: Trainer, memory: str) -> ExitWith:
        """The end of a run whose only process is lost."""
        if trainer.crash:
            return ExitWith(ExitCode.DEFECT, f"the trainer {trainer.loss()}\n{self._repeat()}")
        when = f", after {self.stopped_by} and before it had saved" if self.stopped_by else ""
        return ExitWith(ExitCode.KILLED, f"the trainer {trainer.loss()}{when}\n{memory}{self._repeat()}")

    def _repeat(self) -> str:
        """What to do, and what has been saved; of a run without a folder there is nothing."""
        run = read_run(self.folder)
        return f"{run.folder.standing}: {REPEAT}" if run is not None else REPEAT

    def _record(self, end: ExitWith, folder: RunFolder, trainers: Sequence[Trainer]) -> None:
        """Writes exit.json, the end of the attempt if one had begun, and the report of a crash."""
        doing = trainers[0].doing
        with suppress(OSError):
            folder.write_exit(end.code, redact(end.reason), doing=doing)
        attempts = read_attempts(folder)
        if attempts and attempts[-1].end is None and attempts[-1].start.get("time", "") >= self.began:
            log = AttemptLog(folder)
            log.take_over(attempts[-1])
            log.end(end.code, end.reason, doing=doing)
        crashes = [trainer.crash for trainer in trainers if trainer.crash]
        if crashes:
            with suppress(OSError):
                write_atomically(folder.defect, redact("\n\n".join(crashes) + "\n"))


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def main(arguments: list[str]) -> int:
    """Runs `accelerate launch ARGUMENTS`; returns the trainer's exit code."""
    return launch(arguments)[0]


def launch(arguments: Sequence[str], output: int | None = None) -> tuple[int, str]:
    """Runs `accelerate launch ARGUMENTS`, its stdout led to `output`; returns the trainer's exit code, and why.

    accelerate is run as a module, because its script need not lie beside this Python (on Colab it does not), and with
    -P, because a file in the current folder may have a module's name.
    """
    accelerate = [sys.executable, "-P", "-m", "accelerate.commands.accelerate_cli", "launch"]
    with tempfile.TemporaryDirectory() as folder:
        launcher = Launcher([*accelerate, *_threads(arguments), *arguments], Path(folder), output)
        return launcher.wait(), launcher.end


def _threads(arguments: Sequence[str]) -> list[str]:
    """On a CPU, the threads that accelerate would give each process: unless it is told, it warns of its own default."""
    known = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    known.add_argument("--config_file")
    known.add_argument("--num_processes", type=int)
    known.add_argument("--num_cpu_threads_per_process")
    words = arguments[: next((i for i, word in enumerate(arguments) if word.endswith(".py")), len(arguments))]
    with suppress(argparse.ArgumentError, OSError, ValueError, yaml.YAMLError):
        found, _ = known.parse_known_args(words)
        if found.config_file and not found.num_cpu_threads_per_process and not os.environ.get("OMP_NUM_THREADS"):
            topology = yaml.safe_load(Path(found.config_file).read_text(encoding="utf-8"))
            if isinstance(topology, dict) and topology.get("use_cpu"):
                cores = psutil.cpu_count(logical=False) or 1
                processes = found.num_processes or topology.get("num_processes") or 1
                return ["--num_cpu_threads_per_process", str(max(1, cores // processes))]
    return []

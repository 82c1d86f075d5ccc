"""The processes' signs of life in the run folder, by which one that is dead or hangs can be named."""

import json
import os
import platform
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

BEAT_BYTES = 256  # of a beat in its file, so that a shorter one leaves nothing of a longer one


@dataclass(frozen=True)
class Beat:
    """What was last heard of a process."""

    rank: str
    step: int  # completed
    arrivals: int  # collectives after that step at which it has arrived; in all processes they are the same ones
    pid: int
    host: str  # of `here`, where its pid means something
    time: float  # seconds since the epoch
    gave_up: bool = False  # it ended by itself, because of another one

    @property
    def place(self) -> tuple[int, int]:
        """How far it is: of processes that wait for one another, the last is the one that the others wait for."""
        return self.step, self.arrivals

    def age(self) -> float:
        """Seconds since."""
        return time.time() - self.time

    def is_stopped(self) -> bool:
        """Whether it is stopped, as by SIGSTOP or a debugger; told only of processes on this machine."""
        return self.host == here() and is_stopped(self.pid)

    def is_lost(self) -> bool:
        """Whether it has ended, and not because of another one; told only of processes on this machine."""
        return not self.gave_up and "" != self.host == here() and state_of(self.pid) in ("", "Z")

    def __str__(self) -> str:
        state = " (stopped, as by SIGSTOP)" if self.is_stopped() else " (has ended)" if self.is_lost() else ""
        return f"process {self.rank}: step {self.step}, {self.age():.0f} s ago{state}"


def here() -> str:
    """This machine and, in it, the namespace of pids, as containers have their own; empty where /proc does not say."""
    with suppress(OSError):
        return f"{platform.node()} {os.readlink('/proc/self/ns/pid')}"
    return ""


def write_beat(folder: Path, rank: int, step: int, arrivals: int, gave_up: bool = False) -> None:
    """Records how far this process is, or that it ends because of another one; raises OSError.

    In one write over the last beat, because a process that is stopped or killed between the emptying of a file and the
    writing would be the one of which nothing is known.
    """
    beat = {"step": step, "arrivals": arrivals, "pid": os.getpid(), "host": here(), "gave_up": gave_up}
    descriptor = os.open(folder / str(rank), os.O_WRONLY | os.O_CREAT, 0o644)
    try:
        os.pwrite(descriptor, json.dumps(beat).ljust(BEAT_BYTES).encode(), 0)
    finally:
        os.close(descriptor)


def read_beats(folder: Path) -> list[Beat]:
    """What was last heard of each process, the most silent first: stopped or lost, behind the others, or heard of
    earlier."""
    beats = []
    for path in folder.glob("*"):
        with suppress(OSError, ValueError, TypeError):
            beats.append(Beat(path.name, **json.loads(path.read_text()), time=path.stat().st_mtime))
    return sorted(beats, key=lambda beat: (not (beat.is_stopped() or beat.is_lost()), beat.place, beat.time))


def heard_of(beats: Iterable[Beat]) -> str:
    """The processes with their last steps, in the order given."""
    return f"last heard of: {'; '.join(map(str, beats)) or 'no step was finished'}"


def is_stopped(pid: int) -> bool:
    """Whether a process is stopped, as by SIGSTOP or a debugger."""
    return state_of(pid) in ("T", "t")


def state_of(pid: int) -> str:
    """The letter of a process's state by /proc (Linux only): T is stopped, Z has ended; nothing if it is not known."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return ""

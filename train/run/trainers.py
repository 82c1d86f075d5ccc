"""What the launcher knows of the trainer processes: which live, how the others ended, and whom they waited for."""

import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from train.run.folder import RunFolder
from train.run.heartbeats import Beat, heard_of, is_stopped, read_beats, state_of

WATCHDOG = "Aborted"  # how NCCL's watchdog ends a process that waits in vain
LATE_SECONDS = 4.0  # after which a process that waits has not given up by itself


@dataclass(frozen=True)
class Trainer:
    """One trainer process."""

    pid: int
    rank: str
    is_alive: bool
    code: int | None  # in its note; None: it has left none
    crash: str  # what Python said of a fatal signal, of its own making
    doing: str  # the last that it has told, in words
    reason: str = ""  # why it ended by itself, beside the code

    @property
    def is_lost(self) -> bool:
        """Whether it has crashed, or was killed from outside."""
        return not self.is_alive and self.code is None

    @property
    def is_stopped(self) -> bool:
        """Whether it is alive and stopped, as by SIGSTOP."""
        return self.is_alive and is_stopped(self.pid)

    def loss(self) -> str:
        """How it was lost."""
        while_doing = f" while {self.doing}" if self.doing else ""
        if self.crash:
            return f"crashed{while_doing} ({self.crash.splitlines()[0]})"
        return f"was killed from outside{while_doing}, as the kernel does when memory is short"


@dataclass(frozen=True)
class KnownRun:
    """The run that the trainer processes work on."""

    folder: RunFolder
    timeout_seconds: float

    def beats(self) -> list[Beat]:
        """What was last heard of its processes, where there are several; the most silent first."""
        return read_beats(self.folder.heartbeats)


def read_trainers(folder: Path) -> list[Trainer]:
    """All trainer processes that have ever registered in the launcher's folder, by rank."""
    found = []
    for path in folder.glob("pid-*"):
        pid = int(path.name[4:])
        alive = is_alive(pid)  # before the note is looked for, which is written by a living process
        code = None
        with suppress(OSError, ValueError):
            code = int((folder / f"end-{pid}").read_text())
        texts = [_text(folder / f"{kind}-{pid}") for kind in ("crash", "doing", "reason")]
        found.append(Trainer(pid, _text(path), alive, code, *texts))
    return sorted(found, key=lambda trainer: (len(trainer.rank), trainer.rank))


def _text(path: Path) -> str:
    with suppress(OSError, ValueError):
        return path.read_text().strip()
    return ""


def read_run(folder: Path) -> KnownRun | None:
    """The run, once the first process has told of it."""
    with suppress(OSError, ValueError):
        told = json.loads((folder / "run").read_text())
        return KnownRun(RunFolder(Path(told["dir"])), told["timeout_seconds"])
    return None


def is_alive(pid: int) -> bool:
    """Whether the process has not ended yet."""
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return state_of(pid) != "Z"


UNHEARD = (-1, 0)  # the place of a process that has left no sign of life


def that_wait(trainers: Sequence[Trainer], run: KnownRun) -> list[Beat]:
    """What was heard of the living processes that wait for another living one."""
    living = {trainer.rank for trainer in trainers if trainer.is_alive}
    beats = [beat for beat in run.beats() if beat.rank in living]
    last = min((beat.place for beat in beats), default=UNHEARD) if len(beats) == len(living) else UNHEARD
    return [beat for beat in beats if beat.arrivals and beat.place > last]


class Patience:
    """How long processes have waited for one another, by this machine's steady clock.

    A beat's file has the time of its disk's machine, which may be minutes away from this one's, and this one's clock
    may be set while a run goes on.
    """

    def __init__(self) -> None:
        self.since: dict[tuple[str, int, int, int], float] = {}  # rank, pid, place -> time.monotonic() when first seen

    def is_at_an_end(self, trainers: Sequence[Trainer], run: KnownRun) -> bool:
        """Whether a living process has waited for another living one for longer than the timeout; to be asked often."""
        now, late = time.monotonic(), run.timeout_seconds + LATE_SECONDS
        waiting = [(beat.rank, beat.pid, *beat.place) for beat in that_wait(trainers, run)]
        self.since = {each: self.since.get(each, now) for each in waiting}
        return any(now - since > late for since in self.since.values())


def blame(trainers: Sequence[Trainer], run: KnownRun | None) -> str:
    """Which process the others waited for and why, and what was last heard of each, that one first.

    One that NCCL's watchdog has aborted waited itself, unless nobody is behind it.
    """
    beats = run.beats() if run else []
    place = dict.fromkeys((trainer.rank for trainer in trainers), UNHEARD) | {beat.rank: beat.place for beat in beats}
    first = min(place.values(), default=UNHEARD)
    lost = [t for t in trainers if t.is_lost and not (WATCHDOG in t.crash and place[t.rank] > first)]
    stopped = [t for t in trainers if t.is_stopped]
    if lost:
        rank, what = lost[0].rank, lost[0].loss()
    elif stopped:
        rank, what = stopped[0].rank, "is stopped (as by SIGSTOP)"
    elif run and beats:
        rank = min((t.rank for t in trainers if t.is_alive), key=lambda rank: place[rank], default=beats[0].rank)
        what = f"has not answered for more than {run.timeout_seconds:.0f} s"
    else:
        rank, what = ", ".join(t.rank for t in trainers if t.is_alive) or "?", "did not answer before the first step"
    return f"process {rank} {what}\n{heard_of(sorted(beats, key=lambda beat: beat.rank != rank))}"

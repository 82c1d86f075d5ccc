"""The processes of a run: agreeing on a flag, acting in the first process for all, and naming a dead peer."""

import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from data_tools.terminal import fitted
from train.config import Config
from train.metrics import to_host
from train.run.exits import ExitCode, ExitWith
from train.run.folder import RunFolder
from train.run.heartbeats import Beat, heard_of, here, read_beats, write_beat
from train.run.signals import StopRequest

STARTED = time.time()  # before any process of this start has a heartbeat
BY_THE_FIRST = "ended by the first process"  # the reason of the others, where it alone has acted
SECONDS_TO_DIE = 1.0  # a killed process's connections end before it counts as dead


def any_process(accelerator: Accelerator, *flags: bool) -> list[bool]:
    """For each flag, whether it is set in any process; every process gets the same answers."""
    if accelerator.num_processes == 1:
        return list(flags)
    counts = torch.tensor([*(float(flag) for flag in flags), 1.0], device=accelerator.device)
    *found, num_present = to_host(*accelerator.reduce(counts, reduction="sum"))
    check_present(accelerator.num_processes, num_present)
    return [value > 0 for value in found]


def check_present(num_processes: int, num_present: float) -> None:
    """Raises RuntimeError unless every process has added its 1 to a sum.

    Where another one is silent, NCCL gives up after the timeout, and what then comes back is this process's own part:
    it went on with it, and saved, for up to a minute until it was aborted (seen on two GPUs).
    """
    if num_present != num_processes:
        reason = f"{num_present:g} of {num_processes} processes are in a sum"
        raise RuntimeError(f"a collective of NCCL or gloo was given up: {reason}")


def gathered(accelerator: Accelerator, numbers: Sequence[float]) -> list[list[float]]:
    """The numbers of every process, in the order of ranks, in fp64; all give equally many.

    A sum of rows, of which each process fills its own: a gather that NCCL has given up would be taken for an answer.
    """
    rows = torch.zeros(accelerator.num_processes, len(numbers) + 1, dtype=torch.float64, device=accelerator.device)
    rows[accelerator.process_index] = torch.tensor([*numbers, 1.0], dtype=torch.float64)
    sums: Any = accelerator.reduce(rows, reduction="sum")
    found = sums.tolist()
    check_present(accelerator.num_processes, sum(row[-1] for row in found))
    return [row[:-1] for row in found]


def all_reduce_gradients(accelerator: Accelerator, parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replaces each gradient by its sum over the processes, where it lies: Accelerator.reduce would copy it twice."""
    if accelerator.num_processes == 1:
        return
    for parameter in parameters:
        assert parameter.grad is not None
        torch.distributed.all_reduce(parameter.grad)


def raise_if_stopped(config: Config, accelerator: Accelerator, stop: StopRequest) -> None:
    """Raises ExitWith(INTERRUPTED) in all processes if any was asked to stop; for use before the first step."""
    if any(any_process(accelerator, stop.is_received())):
        reason = f"stopped by {stop.received or 'another process'} before the first step, so there is nothing to save"
        raise ExitWith(ExitCode.INTERRUPTED, f"{reason}; {advice_to_repeat(config)}")


class Watch:
    """What a step shares with the run around it; this one is alone: nobody asks it to stop, nobody waits for it."""

    def is_asked(self) -> bool:
        """Whether this process was asked to stop."""
        return False

    def arrive(self) -> None:
        """This process is about to wait for the others."""
        return


UNWATCHED = Watch()


class Heartbeat(Watch):
    """Passes stop requests on to the step, and records how far this process is: a dead peer can then be named."""

    def __init__(self, config: Config, accelerator: Accelerator, stop: StopRequest) -> None:
        self.stop = stop
        self.rank, self.step, self.arrivals = accelerator.process_index, 0, 0
        self.folder: Path | None = None  # where there are several processes
        if accelerator.num_processes > 1:
            self.folder = RunFolder.of(config).heartbeats
            with suppress(OSError):  # without it the run trains, and a dead peer has no name
                self.folder.mkdir(parents=True, exist_ok=True)
            self._write()

    def is_asked(self) -> bool:
        """Whether this process was asked to stop."""
        return self.stop.is_received()

    def arrive(self) -> None:
        """Records that this process has arrived at a collective."""
        self.arrivals += 1
        self._write()

    def beat(self, step: int) -> None:
        """Records that this process has completed `step`."""
        self.step, self.arrivals = step, 0
        self._write()

    def _write(self) -> None:
        if self.folder is not None:
            with suppress(OSError):
                write_beat(self.folder, self.rank, self.step, self.arrivals)


def peer_failure(config: Config, error: RuntimeError) -> str:
    """A message with the last step of the other processes, if `error` means that one died or hangs; otherwise empty."""
    is_collective = isinstance(error, torch.distributed.DistError) or re.search("gloo|NCCL|Connection", str(error))
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not is_collective:
        return ""
    folder, own = RunFolder.of(config).heartbeats, os.environ.get("RANK")
    with suppress(OSError):  # the next one, which hears of this one's end, is to name the first
        for mine in (beat for beat in read_beats(folder) if beat.pid == os.getpid() and beat.host == here()):
            write_beat(folder, int(mine.rank), mine.step, mine.arrivals, gave_up=True)
    beats, until = _beats_of_this_start(folder), time.monotonic() + SECONDS_TO_DIE
    while not any(beat.is_lost() or beat.is_stopped() for beat in beats) and time.monotonic() < until:
        time.sleep(0.02)
        beats = _beats_of_this_start(folder)
    others = [beat for beat in beats if beat.rank != own]  # this process is alive
    first_line = str(error).strip().splitlines()[0]
    return f"another process died or hangs ({first_line})\n{heard_of(others)}"


def _beats_of_this_start(folder: Path) -> list[Beat]:
    """Without those of processes that an earlier attempt had, which only the first process's machine removes."""
    count = int(os.environ["WORLD_SIZE"])
    return [beat for beat in read_beats(folder) if beat.time > STARTED and int(beat.rank) < count]


def say(accelerator: Accelerator, text: str) -> None:
    """Prints `text` in the first process only, fitted to a terminal."""
    if accelerator.is_main_process:
        with suppress(OSError):  # the terminal may be closed, or stdout a file on a full disk
            print(fitted(text), file=sys.stdout, flush=True)


def advice_to_repeat(config: Config) -> str:
    """How to continue the run; --run.resume `never` or a path must not be repeated, because it would start over."""
    without = "" if config.run.resume in ("auto", "must") else f", without --run.resume {config.run.resume}"
    return f"run the same command again{without}"


def on_first_process(accelerator: Accelerator, action: Callable[[], int]) -> int:
    """Runs `action` in the first process and returns its result (0 or more) in all; ExitWith and OSError end all."""
    error: ExitWith | None = None
    value = 0
    if accelerator.is_main_process:
        try:
            value = action()
        except ExitWith as end:
            error = end
        except OSError as failure:
            error = ExitWith(ExitCode.SAVE_FAILED, f"{failure}; earlier checkpoints are intact")
        if error is not None:
            value = -int(error.code)
    sums = accelerator.reduce(torch.tensor([float(value), 1.0], device=accelerator.device), reduction="sum")
    total, num_present = to_host(*sums)
    check_present(accelerator.num_processes, num_present)
    result = int(total)  # minus the exit code if the first process failed
    if result < 0:
        raise error or ExitWith(ExitCode(-result), BY_THE_FIRST)
    return result

"""The processes of one run: what they decide together, what the first does for all, and which one is silent."""

import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path

import torch
from accelerate import Accelerator

from train.config import Config
from train.metrics import to_host
from train.run.exits import ExitCode, ExitWith
from train.run.folder import RunFolder
from train.run.signals import StopRequest


def any_process(accelerator: Accelerator, *flags: bool) -> list[bool]:
    """For each flag, whether any process has raised it; all processes get the same answers."""
    if accelerator.num_processes == 1:
        return list(flags)
    raised = torch.tensor([float(flag) for flag in flags], device=accelerator.device)
    return [value > 0 for value in to_host(*accelerator.reduce(raised, reduction="sum"))]


def add_over_processes(accelerator: Accelerator, parameters: Iterable[torch.nn.Parameter]) -> None:
    """Sums every gradient over the processes, with one reduction for each of the few flat parameters."""
    if accelerator.num_processes == 1:
        return
    for parameter in parameters:
        assert parameter.grad is not None
        parameter.grad.copy_(accelerator.reduce(parameter.grad, reduction="sum"))


def raise_if_stopped(config: Config, accelerator: Accelerator, stop: StopRequest) -> None:
    """Raises ExitWith(INTERRUPTED), in all processes, if one was asked to stop before the first step."""
    if any(any_process(accelerator, stop.is_received())):
        reason = f"stopped by {stop.received or 'another process'} before a step was made, so there is nothing to save"
        raise ExitWith(ExitCode.INTERRUPTED, f"{reason}; {advice_to_repeat(config)}")


class Heartbeat:
    """Keeps each process's last step in the run folder, so that the others can name the one that fell silent."""

    def __init__(self, config: Config, accelerator: Accelerator) -> None:
        self.path: Path | None = None
        if accelerator.num_processes > 1:
            self.path = RunFolder.of(config).heartbeats / str(accelerator.process_index)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.beat(0)

    def beat(self, step: int) -> None:
        """Notes that this process completed `step`."""
        if self.path is not None:
            with suppress(OSError):
                self.path.write_text(f"{step}")


def peer_failure(config: Config, error: RuntimeError) -> str:
    """Which processes are silent, if `error` means that another one died or hangs; nothing for any other error."""
    is_collective = isinstance(error, torch.distributed.DistError) or re.search("gloo|NCCL|Connection", str(error))
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not is_collective:
        return ""
    now = time.time()
    beats = []
    own = os.environ.get("RANK")
    for path in sorted(RunFolder.of(config).heartbeats.glob("*")):
        if path.name == own:  # it is alive: it is asking
            continue
        with suppress(OSError, ValueError):
            beats.append((path.stat().st_mtime, f"process {path.name}: step {path.read_text()}"))
    heard = "; ".join(f"{what}, {now - moment:.0f} s ago" for moment, what in sorted(beats))
    first_line = str(error).strip().splitlines()[0]
    return f"another process died or hangs ({first_line})\nlast heard of: {heard or 'none has made a step'}"


def say(accelerator: Accelerator, text: str) -> None:
    """Prints for people, once for all processes."""
    if accelerator.is_main_process:
        with suppress(OSError):  # a terminal that is gone, or a file on a full disk
            print(text, file=sys.stdout, flush=True)


def advice_to_repeat(config: Config) -> str:
    """How to continue the run; `--run.resume never` or a path, if repeated, would start again from there."""
    without = "" if config.run.resume in ("auto", "must") else f", without --run.resume {config.run.resume}"
    return f"run the same command again{without}"


def on_first_process(accelerator: Accelerator, action: Callable[[], int]) -> int:
    """Returns in all processes what `action` (0 or more) returns in the first; its ExitWith or OSError ends all."""
    error: ExitWith | None = None
    value = 0
    if accelerator.is_main_process:
        try:
            value = action()
        except ExitWith as end:
            error = end
        except OSError as failure:
            error = ExitWith(ExitCode.SAVE_FAILED, f"{failure}; what was saved before still stands")
        if error is not None:
            value = -int(error.code)
    total = accelerator.reduce(torch.tensor(float(value), device=accelerator.device), reduction="sum")
    agreed = int(to_host(total)[0])
    if agreed < 0:
        raise error or ExitWith(ExitCode(-agreed), "ended by the first process")
    return agreed

"""Faults injected into a run: each is called in the run's process before train.main.main."""

import errno
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from multiprocessing.util import Finalize
from pathlib import Path
from typing import Any

import torch


def before_and_after(holder: Any, name: str, act: Callable[[str], None], caller: str = "") -> None:
    """Calls act("before") and act("after") around every call of `holder.name`, or only around those from `caller`."""
    original = getattr(holder, name)

    def around(*arguments: Any, **options: Any) -> Any:
        if caller and sys._getframe(1).f_code.co_name != caller:
            return original(*arguments, **options)
        act("before")
        result = original(*arguments, **options)
        act("after")
        return result

    setattr(holder, name, around)


def at_call(holder: Any, name: str, number: int, act: Callable[[], None], moment: str = "before") -> None:
    """Calls `act` before, or after, the n-th call of `holder.name`."""
    calls = 0

    def count(when: str) -> None:
        nonlocal calls
        calls += when == "before"
        if when == moment and calls == number:
            act()

    before_and_after(holder, name, count)


def around_syncs(act: Callable[[str], None]) -> None:
    """Calls `act` before and after each sync of publishing a checkpoint or setting it aside."""
    import train.checkpoints.store
    import train.run.durable

    before_and_after(train.run.durable, "sync", act, caller="publish")
    before_and_after(train.checkpoints.store, "sync", act)


def die() -> None:
    """Kills this process with SIGKILL."""
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Fault:
    """Kills the process before or after the n-th call of a function of train.checkpoints.store, or of os.rename."""

    function: str  # a name in train.checkpoints.store, `rename`, or `save` (of CheckpointStore)
    call: int
    when: str  # before | after

    def __call__(self) -> None:
        import train.checkpoints.store

        holders: dict[str, Any] = {"rename": os, "save": train.checkpoints.store.CheckpointStore}
        at_call(holders.get(self.function, train.checkpoints.store), self.function, self.call, die, self.when)


@dataclass(frozen=True)
class KillAtOperation:
    """Kills the process at the n-th moment before or after a disk operation of a save.

    Operations are writes of a file, syncs, renames and removals; each has a moment before and one after it. With `log`
    nothing is killed, and the moments are written to that file, one per line.
    """

    moment: int
    log: str = ""

    def __call__(self) -> None:
        import train.checkpoints.store

        moments = 0

        def act(what: str) -> None:
            nonlocal moments
            moments += 1
            if self.log:
                with open(self.log, "a") as file:
                    file.write(what + "\n")
            elif moments == self.moment:
                die()

        before_and_after(train.checkpoints.store, "_write", lambda when: act(f"{when} _write"))
        around_syncs(lambda when: act(f"{when} sync"))
        for holder, name in ((os, "rename"), (shutil, "rmtree")):
            before_and_after(holder, name, lambda when, name=name: act(f"{when} {name}"))


@dataclass(frozen=True)
class DiskError:
    """Makes the checkpoints' file writes from `first` to `last` fail with errno `number`, or take `seconds`."""

    first: int
    last: int
    number: int = errno.ENOSPC
    seconds: float = 0.0
    function: str = "_write"

    def __call__(self) -> None:
        import train.checkpoints.store

        calls = 0

        def act(when: str) -> None:
            nonlocal calls
            calls += when == "before"
            if when == "before" and self.first <= calls <= self.last:
                if not self.seconds:
                    raise OSError(self.number, os.strerror(self.number))
                time.sleep(self.seconds)

        if self.function == "sync":
            around_syncs(act)
        else:
            before_and_after(train.checkpoints.store, self.function, act)


@dataclass(frozen=True)
class LittleSpace:
    """Reports these numbers of free bytes, one per query, and plenty afterwards."""

    free: tuple[int, ...]

    def __call__(self) -> None:
        import train.checkpoints.saver
        import train.checkpoints.store

        answers = list(self.free)

        def free_bytes(folder: object) -> int:
            return answers.pop(0) if answers else 10**12

        train.checkpoints.store.free_bytes = free_bytes
        train.checkpoints.saver.free_bytes = free_bytes


@dataclass(frozen=True)
class NotANumber:
    """Multiplies the loss of these micro-batches (from 1) by `value`, or makes their gradients infinite."""

    micro_batches: tuple[int, ...]
    value: float = float("nan")
    only_gradient: bool = False

    def __call__(self) -> None:
        from train.models.language_model import LanguageModel

        original = LanguageModel.forward
        calls = 0

        def forward(model: Any, batch: Any) -> torch.Tensor:
            nonlocal calls
            loss = original(model, batch)
            if torch.is_grad_enabled():  # validation does not count
                calls += 1
                if calls in self.micro_batches:
                    return _Explodes.apply(loss) if self.only_gradient else loss * self.value
            return loss

        setattr(LanguageModel, "forward", forward)  # noqa: B010


class _Explodes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: torch.Tensor) -> torch.Tensor:
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> torch.Tensor:
        return upstream[0] * float("inf")


@dataclass(frozen=True)
class AtForward:
    """Kills or stops (SIGSTOP) the process in its n-th forward pass."""

    call: int
    number: signal.Signals = signal.SIGKILL

    def __call__(self) -> None:
        from train.models.language_model import LanguageModel

        at_call(LanguageModel, "forward", self.call, lambda: os.kill(os.getpid(), self.number))


@dataclass(frozen=True)
class GroupAtEnd:
    """Writes whether the process group is open, before the adapter is delivered and at the end of the process."""

    path: Path

    def __call__(self) -> None:
        def look() -> None:
            with self.path.open("a") as file:
                file.write("open\n" if torch.distributed.is_initialized() else "closed\n")

        import train.main

        before_and_after(train.main, "publish", lambda when: look() if when == "before" else None)
        Finalize(None, look, exitpriority=0)


@dataclass(frozen=True)
class OtherScale:
    """Starts fp16's loss scale at `scale` and lets it grow every `growth_interval` steps."""

    scale: float
    growth_interval: int

    def __call__(self) -> None:
        start = partial(torch.amp.GradScaler, init_scale=self.scale, growth_interval=self.growth_interval)
        setattr(torch.amp, "GradScaler", start)  # noqa: B010


@dataclass(frozen=True)
class Both:
    """Injects two faults into one process."""

    one: Callable[[], None]
    other: Callable[[], None]

    def __call__(self) -> None:
        self.one()
        self.other()

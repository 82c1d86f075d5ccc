"""Defects, stop signals at exact places, and a user whom the system does not know; used like tests/injections.py."""

import importlib
import os
import signal
import time
from dataclasses import dataclass

from tests.injections import at_call


@dataclass(frozen=True)
class Defect:
    """Raises `error` in the n-th call of a function that train.main or another module has, as a defect would."""

    holder: str  # a module
    name: str
    error: BaseException
    call: int = 1

    def __call__(self) -> None:
        def fail() -> None:
            raise self.error

        at_call(importlib.import_module(self.holder), self.name, self.call, fail)


@dataclass(frozen=True)
class SignalAt:
    """Sends this process a signal before the n-th call of a function that train.step or another module has."""

    holder: str  # a module
    name: str
    call: int = 1
    kind: signal.Signals = signal.SIGKILL

    def __call__(self) -> None:
        at_call(importlib.import_module(self.holder), self.name, self.call, lambda: os.kill(os.getpid(), self.kind))


@dataclass(frozen=True)
class NoUser:
    """The user is not among the system's, as in a container with --user and a number."""

    def __call__(self) -> None:
        import pwd

        def getpwuid(number: int) -> None:
            raise KeyError(f"getpwuid(): uid not found: {number}")

        setattr(pwd, "getpwuid", getpwuid)  # noqa: B010


@dataclass(frozen=True)
class AtMicroBatch:
    """Sends this process a signal as it begins a micro-batch of a step (both from 0); each takes `seconds` longer."""

    step: int
    number: int
    visit: int = 1  # in fp16 a step may be computed several times
    seconds: float = 0.0
    kind: signal.Signals = signal.SIGTERM

    def __call__(self) -> None:
        import train.step

        original, visits = train.step.seed_forward, 0

        def seed_forward(seed: int, completed: int, rank: int, number: int) -> None:
            nonlocal visits
            visits += (completed, number) == (self.step, self.number)
            if (completed, number, visits) == (self.step, self.number, self.visit):
                os.kill(os.getpid(), self.kind)
            time.sleep(self.seconds)
            original(seed, completed, rank, number)

        setattr(train.step, "seed_forward", seed_forward)  # noqa: B010


@dataclass(frozen=True)
class InValidation:
    """Sends this process SIGTERM in the n-th micro-batch that is validated."""

    micro_batch: int

    def __call__(self) -> None:
        import train.validation.measure

        at_call(train.validation.measure, "collated", self.micro_batch, lambda: os.kill(os.getpid(), signal.SIGTERM))

"""The process: its device, its place among the others, its signals, its memory cap, its random numbers."""

import fcntl
import hashlib
import os
import platform
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from train.config import Config, parse_bytes
from train.data import Layout
from train.exits import ExitCode, ExitWith
from train.metrics import read

SUPPORTED = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PACKAGES = ("torch", "accelerate", "transformers", "peft", "bitsandbytes", "datasets", "safetensors")


class StopRequest:
    """Remembers the first SIGTERM, SIGINT or SIGUSR1; training stops at the next step boundary, never in a handler.

    Launchers and schedulers deliver SIGTERM and SIGUSR1 more than once, so only a second Ctrl-C, a second or more after
    the first, ends the process at once.
    """

    def __init__(self) -> None:
        self.received = ""
        self.since = 0.0
        for number in STOP_SIGNALS:
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self.received and now - self.since > 1:
            os._exit(128 + number)
        if not self.received:
            self.received, self.since = signal.Signals(number).name, now
            os.write(2, b"\nstopping at the next step; Ctrl-C again ends at once, without saving\n")

    def is_received(self) -> bool:
        """Whether this process was asked to stop."""
        return bool(self.received)

    def agreed(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked to stop: the same answer in all of them."""
        if accelerator.num_processes == 1:
            return self.is_received()
        flag = torch.tensor(float(self.is_received()), device=accelerator.device)
        return read(accelerator.reduce(flag, reduction="sum"))[0] > 0


def check(config: Config) -> None:
    """Raises ExitWith(BAD_INPUT) where this machine, or its accelerate configuration, does not fit the profile."""
    if config.run.device == "cuda" and not torch.cuda.is_available():
        raise ExitWith(
            ExitCode.BAD_INPUT,
            f"profile {config.profile} wants a CUDA GPU and torch {torch.__version__} sees none.\n"
            "Check nvidia-smi and that this torch is a CUDA build; to try the job without a GPU: --profile demo, "
            "or --run.device cpu with a small --model.name_or_path",
        )
    configured = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if configured not in ("1", str(config.batch.accumulation)):
        raise ExitWith(
            ExitCode.BAD_INPUT,
            f"the accelerate configuration says gradient_accumulation_steps {configured} and --batch.accumulation says "
            f"{config.batch.accumulation}; remove it from the accelerate configuration, the profile owns it",
        )
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        raise ExitWith(
            ExitCode.BAD_INPUT,
            f"the accelerate configuration says mixed_precision {precision}; set it to 'no', --model.dtype owns it",
        )


def start(config: Config) -> Accelerator:
    """The one Accelerator: device, process group, determinism and memory cap; raises ExitWith(BAD_INPUT)."""
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        settings: Any = torch.utils.deterministic
        settings.fill_uninitialized_memory = False  # a debugging aid that writes every new tensor once more
    accelerator = Accelerator(cpu=config.run.device == "cpu", mixed_precision="no")
    if accelerator.distributed_type not in SUPPORTED:
        raise ExitWith(
            ExitCode.BAD_INPUT,
            f"distributed_type {accelerator.distributed_type.value} in the accelerate configuration is not supported; "
            "use one of accelerate_configs/",
        )
    if config.memory.budget and accelerator.device.type == "cuda":
        # of the current device: accelerate's own has no index where there is one process, which torch refuses here
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, parse_bytes(config.memory.budget) / total))
    return accelerator


def layout(config: Config, accelerator: Accelerator) -> Layout:
    """How this run cuts an optimizer step, and which part is this process's."""
    return Layout(
        config.batch.per_device, config.batch.accumulation, accelerator.num_processes, accelerator.process_index
    )


def seed_forward(seed: int, step: int, rank: int, forward: int) -> None:
    """Makes dropout in one forward pass a function of these four numbers.

    So no generator state has to be saved and restored: a resumed step draws what the uninterrupted one would have.
    """
    digest = hashlib.blake2b(f"{seed} {step} {rank} {forward}".encode(), digest_size=7).digest()
    torch.manual_seed(int.from_bytes(digest, "little"))


@contextmanager
def locked(run_dir: Path) -> Iterator[None]:
    """Holds the run folder for this job, or until the process dies; raises ExitWith(BAD_INPUT) when another has it."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / ".lock").open("w")
    except OSError as error:
        raise ExitWith(ExitCode.BAD_INPUT, f"--run.dir {run_dir}: {error}; choose another") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            reason = f"{run_dir} is in use by another job; wait for it or choose another --run.dir"
            raise ExitWith(ExitCode.BAD_INPUT, reason) from None
        (run_dir / "exit.json").unlink(
            missing_ok=True
        )  # of an earlier attempt; without one the run lives, or was killed
        yield


def versions() -> dict[str, str]:
    """What the run was made with."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}


def device_name(device: torch.device) -> str:
    """The device as a person calls it."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"


def say(accelerator: Accelerator, text: str) -> None:
    """Prints for people, once for all processes."""
    if accelerator.is_main_process:
        print(text, file=sys.stdout, flush=True)

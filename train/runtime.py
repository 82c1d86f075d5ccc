"""The process: its device, its place among the others, its memory cap, its random numbers."""

import fcntl
import hashlib
import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, parse_flag_from_env

from train import hardware
from train.config import Config, parse_bytes
from train.data import Layout
from train.exits import ExitCode, ExitWith, make_folder
from train.metrics import read
from train.signals import StopRequest

SUPPORTED = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)
PACKAGES = ("torch", "accelerate", "transformers", "peft", "bitsandbytes", "datasets", "safetensors")


def agreed(accelerator: Accelerator, *flags: bool) -> list[bool]:
    """For each flag whether any process has raised it: the same answers in all of them."""
    if accelerator.num_processes == 1:
        return list(flags)
    raised = torch.tensor([float(flag) for flag in flags], device=accelerator.device)
    return [value > 0 for value in read(*accelerator.reduce(raised, reduction="sum"))]


def add_over_processes(accelerator: Accelerator, parameters: Iterable[torch.nn.Parameter]) -> None:
    """Every gradient becomes its sum over the processes, one reduction for each of the few flat parameters."""
    if accelerator.num_processes == 1:
        return
    for parameter in parameters:
        assert parameter.grad is not None
        parameter.grad.copy_(accelerator.reduce(parameter.grad, reduction="sum"))


def check(config: Config) -> None:
    """Raises ExitWith(BAD_INPUT) where this machine, or its accelerate configuration, does not fit the profile."""
    if config.run.device == "cuda" and not torch.cuda.is_available():
        raise ExitWith(
            ExitCode.BAD_INPUT,
            f"profile {config.profile} wants a CUDA GPU and torch {torch.__version__} sees none.\n"
            "Check nvidia-smi and that this torch is a CUDA build; to try the job without a GPU: --profile demo, "
            "or --run.device cpu with a small --model.name_or_path",
        )
    if config.run.device != "cpu" and torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU"):
        # the card that accelerate will give to this process
        card = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        hardware.check_build(card)
        hardware.check_bitsandbytes(config.model.quantization, config.optim.name, card)
        hardware.compute_type(config.model.dtype, card)
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
    waiting = InitProcessGroupKwargs(timeout=timedelta(minutes=config.run.timeout_minutes))
    accelerator = Accelerator(cpu=config.run.device == "cpu", mixed_precision="no", kwargs_handlers=[waiting])
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


def free_bytes(config: Config, accelerator: Accelerator) -> int | None:
    """Bytes that may still be allocated on each process's GPU: of memory.budget, or of what is free; None on a CPU.

    The least of all processes, so that they plan alike.
    """
    if accelerator.device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info()
    free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    if config.memory.budget:
        free = min(free, parse_bytes(config.memory.budget) - torch.cuda.memory_allocated())
    everyone: Any = accelerator.gather(torch.tensor([free], device=accelerator.device))
    return int(read(everyone.min())[0])


def go_on(config: Config, accelerator: Accelerator, stop: StopRequest) -> None:
    """Raises ExitWith(INTERRUPTED), in all processes, where one was asked to stop and nothing is trained yet."""
    if any(agreed(accelerator, stop.is_received())):
        reason = f"stopped by {stop.received or 'another process'} before a step was made, so there is nothing to save"
        raise ExitWith(ExitCode.INTERRUPTED, f"{reason}; {advice_to_repeat(config)}")


class Heartbeat:
    """Every process's last step and when, in the run folder: who is silent can be named when the others give up."""

    def __init__(self, config: Config, accelerator: Accelerator) -> None:
        self.path: Path | None = None
        if accelerator.num_processes > 1:
            self.path = Path(config.run.dir) / ".heartbeats" / str(accelerator.process_index)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.beat(0)

    def beat(self, step: int) -> None:
        """This process is alive after `step`."""
        if self.path is not None:
            with suppress(OSError):
                self.path.write_text(f"{step}")


def peer_failure(config: Config, error: RuntimeError) -> str:
    """Who is silent, where `error` means that another process died or hangs; nothing for any other error."""
    is_collective = isinstance(error, torch.distributed.DistError) or re.search("gloo|NCCL|Connection", str(error))
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not is_collective:
        return ""
    now = time.time()
    beats = []
    own = os.environ.get("RANK")
    for path in sorted((Path(config.run.dir) / ".heartbeats").glob("*")):
        if path.name == own:  # alive: it says this
            continue
        with suppress(OSError, ValueError):
            beats.append((path.stat().st_mtime, f"process {path.name}: step {path.read_text()}"))
    heard = "; ".join(f"{what}, {now - moment:.0f} s ago" for moment, what in sorted(beats))
    first_line = str(error).strip().splitlines()[0]
    return f"another process died or hangs ({first_line})\nlast heard of: {heard or 'none has made a step'}"


def close_group(together: bool) -> None:
    """Closes the process group, if there is one.

    An interpreter that ends before Gloo's threads may be aborted by them, whatever its exit code was to be. NCCL's
    closing waits for the other processes, so that it is left to the end of the process where they do not all come here.
    What is trained does not depend on it: a group that does not close is said.
    """
    if torch.distributed.is_initialized() and (together or torch.distributed.get_backend() == "gloo"):
        try:
            torch.distributed.destroy_process_group()
        except RuntimeError as error:
            with suppress(OSError):
                print(f"handloop: the group of processes did not close: {error}", file=sys.stderr, flush=True)


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
        make_folder(run_dir)
        file = (run_dir / ".lock").open("w")
    except OSError as error:
        raise ExitWith(ExitCode.BAD_INPUT, f"--run.dir {run_dir}: {error}; choose another") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            reason = f"{run_dir} is in use by another job; wait for it or choose another --run.dir"
            raise ExitWith(ExitCode.BAD_INPUT, reason) from None
        # of an earlier attempt: without exit.json the run lives, or was killed
        (run_dir / "exit.json").unlink(missing_ok=True)
        shutil.rmtree(run_dir / ".heartbeats", ignore_errors=True)
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
        with suppress(OSError):  # a terminal that is gone, or a file on a full disk
            print(text, file=sys.stdout, flush=True)


def advice_to_repeat(config: Config) -> str:
    """What goes on with the run; `never` or a path, repeated, would start again from there."""
    without = "" if config.run.resume in ("auto", "must") else f", without --run.resume {config.run.resume}"
    return f"run the same command again{without}"

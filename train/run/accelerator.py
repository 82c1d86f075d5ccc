"""The run's Accelerator: device, process group, determinism, memory cap."""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from itertools import permutations
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, parse_flag_from_env

from train.config import Config, parse_bytes
from train.optim import OPTIMIZERS
from train.run import devices
from train.run.environment import CONFIGURATIONS, check_environment
from train.run.exits import ExitCode, ExitWith
from train.run.processes import gathered
from train.run.same_command import check_same_command

SUPPORTED = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


def check_machine(config: Config) -> None:
    """Raises ExitWith(BAD_INPUT) if this machine, or its accelerate configuration, does not fit the profile."""
    check_environment(config)
    if config.run.device == "cuda" and not torch.cuda.is_available():
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        raise ExitWith(
            ExitCode.BAD_INPUT,
            f"profile {config.profile} needs a CUDA GPU, and torch {torch.__version__} finds none"
            + ("" if hidden is None else f" (CUDA_VISIBLE_DEVICES is {hidden!r})")
            + ".\n"
            "Check nvidia-smi, and that this torch is a CUDA build. Without a GPU, use --profile demo, "
            "or --run.device cpu with a small --model.name_or_path",
        )
    if (gpu := _gpu_of(config)) is not None:
        devices.check_build(gpu)
        devices.check_bitsandbytes(bitsandbytes_options(config), gpu)
        devices.compute_type(config.model.dtype, gpu)


def check_training(config: Config) -> None:
    """Raises ExitWith(BAD_INPUT) if this machine does not fit the profile, or has not what training is to use."""
    check_machine(config)
    check_engine(config)


def check_engine(config: Config) -> None:
    """Raises ExitWith(BAD_INPUT) if what is asked of the fused engine is not to be had on this machine's devices.

    What depends on the base as well is refused when it is known (language_model.choose_engine).
    """
    if (gpu := _gpu_of(config)) is not None:
        return devices.check_products(config.engine.products, devices.capability(gpu))
    if config.engine.kind != "auto":
        return
    reason, is_fused = "", config.memory.offload == "stream" or config.batch.context_parallel > 1
    if config.engine.products == "fp8":
        reason = f"engine.products fp8: {devices.NO_GPU_FOR_FP8}; or leave it out"
    elif config.memory.shard and not is_fused and config.train.method == "lora":
        reason = f"memory.shard: only the fused engine shards, and {devices.NO_GPU}; or leave it out"
    if reason:
        raise ExitWith(ExitCode.BAD_INPUT, f"--{reason}")


def _gpu_of(config: Config) -> torch.device | None:
    """The GPU that accelerate will give to this process; None: it will run on the CPU."""
    if config.run.device == "cpu" or not torch.cuda.is_available() or parse_flag_from_env("ACCELERATE_USE_CPU"):
        return None
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def bitsandbytes_options(config: Config) -> list[str]:
    """The options that need bitsandbytes, each with an alternative."""
    options = []
    if config.model.quantization != "none":
        options.append(f"--model.quantization {config.model.quantization} (write none)")
    if OPTIMIZERS[config.optim.name].is_8bit:
        options.append(f"--optim.name {config.optim.name} (write adamw)")
    return options


def start_accelerator(config: Config) -> Accelerator:
    """Builds the Accelerator and applies run.deterministic and memory.budget; raises ExitWith(BAD_INPUT).

    All processes were given the same command then, or end.
    """
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        settings: Any = torch.utils.deterministic
        settings.fill_uninitialized_memory = False  # a debugging aid, which would write to every new tensor
    torch.set_float32_matmul_precision("highest")  # whatever TORCH_ALLOW_TF32_CUBLAS_OVERRIDE says
    # With a mask its gradients are NaN: https://github.com/pytorch/pytorch/issues/196678. engine.attention asks for it
    # where there is none
    torch.backends.cuda.enable_cudnn_sdp(False)
    timeout = InitProcessGroupKwargs(timeout=timedelta(minutes=config.run.timeout_minutes))
    try:
        accelerator = Accelerator(cpu=config.run.device == "cpu", mixed_precision="no", kwargs_handlers=[timeout])
    except (ValueError, KeyError) as error:  # an environment variable that torch or accelerate wants and cannot use
        reason = f"the processes cannot be started: {error}; see accelerate's configuration and the environment"
        raise ExitWith(ExitCode.BAD_INPUT, reason) from error
    _check_accelerator(config, accelerator)
    check_same_command(config, accelerator)
    if config.memory.budget and accelerator.device.type == "cuda":
        # the current device, because accelerate's device has no index in a single process and torch needs one here
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, parse_bytes(config.memory.budget) / total))
    return accelerator


def _check_accelerator(config: Config, accelerator: Accelerator) -> None:
    """Raises ExitWith(BAD_INPUT) where accelerate has chosen what nothing here was written for."""
    reason, device = "", accelerator.device.type
    if accelerator.distributed_type not in SUPPORTED:
        reason = (
            f"distributed_type {accelerator.distributed_type.value} in the accelerate configuration is not supported; "
            f"use one of {CONFIGURATIONS}/"
        )
    elif device not in ("cuda", "cpu"):  # on Apple, Intel and other accelerators accelerate takes them by itself
        reason = f"accelerate chooses the device {device}, and Handloop runs on CUDA and CPUs alone: --run.device cpu"
    elif config.run.device == "cuda" and device != "cuda":
        reason = f"--run.device cuda, and accelerate chooses {device}; use one of {CONFIGURATIONS}/"
    if reason:
        raise ExitWith(ExitCode.BAD_INPUT, reason)


def free_gpu_bytes(config: Config, accelerator: Accelerator) -> int | None:
    """Bytes that every process can still allocate on its GPU, within memory.budget if it is set; None on a CPU.

    This is the minimum over all processes, so that they make the same plan.
    """
    if accelerator.device.type != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info()
    free += torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    if config.memory.budget:
        free = min(free, parse_bytes(config.memory.budget) - torch.cuda.memory_allocated())
    return int(least(accelerator, [float(free)])[0])


def least(accelerator: Accelerator, numbers: list[float]) -> list[float]:
    """The least of each number over all processes, which are the same in all."""
    return [min(each) for each in zip(*gathered(accelerator, numbers), strict=True)]


def check_peers(accelerator: Accelerator, machines: Sequence[int]) -> None:
    """Raises ExitWith(BAD_INPUT) where processes cannot read each other's memory: of several machines or containers,
    which `machines` tells apart, or of GPUs without a way between them.
    """
    reason = ""
    if len(set(machines)) > 1:
        places = "several machines, or in several containers"
        reason = f"{accelerator.num_processes} processes are on {places}, and only those of one share weights"
    elif accelerator.device.type == "cuda":
        reason = unreachable(accelerator.num_processes)
    if reason:
        raise ExitWith(ExitCode.BAD_INPUT, f"--memory.shard: {reason}; leave it out, --memory.offload auto streams")


def unreachable(num_gpus: int) -> str:
    """Why this machine's GPUs cannot all read each other's memory; empty where they can."""
    if torch.cuda.device_count() < num_gpus:
        return f"a process sees {torch.cuda.device_count()} of {num_gpus} GPUs, and has to see all of them"
    for one, other in permutations(range(num_gpus), 2):
        if not torch.cuda.can_device_access_peer(one, other):
            return f"GPU {one} cannot read the memory of GPU {other}"
    return ""


def close_group(together: bool) -> None:
    """Closes the process group, if there is one; `together` says that every process calls this.

    If the interpreter ends before Gloo's threads, they can abort it and change its exit code. NCCL waits for the other
    processes when it closes, so without them its group is left open until the process ends. A group that does not close
    costs nothing that was trained, so this is only printed.
    """
    if torch.distributed.is_initialized() and (together or torch.distributed.get_backend() == "gloo"):
        try:
            torch.distributed.destroy_process_group()
        except RuntimeError as error:
            with suppress(OSError):
                print(f"handloop: the process group did not close: {error}", file=sys.stderr, flush=True)

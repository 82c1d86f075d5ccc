"""Environment variables of the launcher, of accelerate's configuration and of torch: honoured or refused in one line.

docs/ENVIRONMENT.md lists them. accelerate hands its configuration on as ACCELERATE_* variables
(accelerate/utils/launch.py), so that a configuration and a variable set by hand are the same thing here.
"""

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass

from train.bundled import bundled, typed
from train.config import Config
from train.run.exits import ExitCode, ExitWith

NUMBERS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT")
MPI_RANKS = ("PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")  # which accelerate reads on a CPU
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
TF32 = "NVIDIA_TF32_OVERRIDE"  # cuBLAS reads it itself; torch's own switch is overruled (accelerator.py)
TRUE, FALSE = ("1", "true", "yes", "y", "t", "on"), ("", "0", "false", "no", "n", "f", "off")
CONFIGURATIONS = typed(bundled("accelerate_configs"))
MULTI_GPU = f"{CONFIGURATIONS}/multi_gpu_ddp.yaml"
SHARDED = (
    f"use {MULTI_GPU}, a replica on each GPU; a base that does not fit is quantised "
    "(--model.quantization nf4), recomputed (--memory.budget) or streamed (--memory.offload)"
)


@dataclass(frozen=True)
class Refused:
    """What an accelerate configuration may ask for, and Handloop does not do."""

    variable: str
    what: str
    instead: str
    harmless: tuple[str, ...] = FALSE  # values that ask for nothing, in lower case


REFUSED = (
    Refused("ACCELERATE_USE_DEEPSPEED", "DeepSpeed", SHARDED),
    Refused("ACCELERATE_USE_FSDP", "FSDP", SHARDED),
    Refused("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM", SHARDED),
    Refused("ACCELERATE_USE_PARALLELISM_CONFIG", "tensor, context or sequence parallelism", SHARDED),
    Refused("ACCELERATE_USE_SAGEMAKER", "SageMaker", f"start {MULTI_GPU} on the machine itself"),
    Refused(
        "ACCELERATE_DYNAMO_BACKEND",
        "a dynamo backend (torch.compile)",
        "set dynamo_backend to 'no'; --engine.kind fused is the fast path",
        ("no",),
    ),
    Refused(
        "ACCELERATE_MIXED_PRECISION",
        "mixed_precision",
        "set it to 'no' and use --model.dtype, which is bf16 or fp16 by itself where the GPU has it",
        ("", "no"),
    ),
    Refused(
        "ACCELERATE_TORCH_DEVICE",
        "a torch device",
        "unset it; --run.device chooses, and CUDA_VISIBLE_DEVICES says which GPUs there are",
        (),
    ),
)


def is_first_process() -> bool:
    """Whether this is the first process, which the launcher tells before there is an Accelerator.

    Where the launcher's variables contradict each other there is no launcher, so this is the only process.
    """
    return bool(launch_problem()) or int(os.environ.get("RANK", "0")) == 0


def check_environment(config: Config) -> None:
    """Raises ExitWith(BAD_INPUT) with a line for each variable that cannot be honoured."""
    problems = [launch_problem() or _device_problem(config), *_accelerate_problems(config), *_torch_problems(config)]
    lines = [problem for problem in problems if problem]
    if lines:
        raise ExitWith(ExitCode.BAD_INPUT, "\n".join(lines))


def launch_problem() -> str:
    """What is wrong with the variables by which a launcher numbers its processes, or nothing.

    They stay behind in a shell, or in a job script, and then make a single process believe that it is one of several.
    A complete set of another job cannot be told from a genuine one.
    """
    environ = os.environ
    wrong = [f"{name}={environ[name]}" for name in NUMBERS if name in environ and not environ[name].isdecimal()]
    if wrong:
        return f"{wrong[0]} is not a number; {_unset()}"
    rank, local, world, local_world, _ = (int(environ[name]) if name in environ else None for name in NUMBERS)
    given = " ".join(f"{name}={environ[name]}" for name in ("RANK", "LOCAL_RANK") if name in environ)
    if world is None:
        return (
            f"{given} is set without WORLD_SIZE, so no launcher has started this process; {_unset()}" if given else ""
        )
    if rank is None and (world > 1 or local is not None) and not any(name in environ for name in MPI_RANKS):
        return f"WORLD_SIZE={world} is set without RANK, so no launcher has started this process; {_unset()}"
    if rank is not None and rank >= world:
        return f"RANK={rank} is not one of the ranks of WORLD_SIZE={world}, which begin at 0; {_unset()}"
    if local is not None and local >= (local_world if local_world is not None else world):
        name = "WORLD_SIZE" if local_world is None else "LOCAL_WORLD_SIZE"
        return f"LOCAL_RANK={local} is not one of the ranks of {name}={environ[name]}, which begin at 0; {_unset()}"
    if (world > 1 or local is not None) and not environ.get("MASTER_ADDR"):
        return f"WORLD_SIZE={world} is set without MASTER_ADDR, where the processes would meet; set it, or {_unset()}"
    return ""


def _unset() -> str:
    names = [name for name in (*NUMBERS[:4], "MASTER_ADDR", "MASTER_PORT") if name in os.environ]
    return f"for a single process: unset {' '.join(names)}"


def _device_problem(config: Config) -> str:
    """What launcher and accelerate configuration say of devices that this run cannot have, or nothing."""
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower()
    if on_cpu not in (*TRUE, *FALSE):
        return f"ACCELERATE_USE_CPU={on_cpu} is neither true nor false; unset it"
    if on_cpu in TRUE and config.run.device == "cuda":
        return (
            f"the accelerate configuration says use_cpu (ACCELERATE_USE_CPU) and --run.device is cuda (profile "
            f"{config.profile}); use another configuration of {CONFIGURATIONS}/, or --run.device cpu"
        )
    if on_cpu in TRUE or config.run.device == "cpu":
        return ""
    import torch  # not above: it takes seconds, for which a refused command line should not wait

    if not torch.cuda.is_available():
        return ""
    local, world, count = os.environ.get("LOCAL_RANK"), os.environ.get("WORLD_SIZE", "1"), torch.cuda.device_count()
    if int(world) > 1 and local is None:
        return f"WORLD_SIZE={world} is set without LOCAL_RANK, which says whose GPU is whose; set it, or {_unset()}"
    # Slurm may show each task the one GPU that is its own, whatever the task's number
    has_own = count == 1 and local is not None and os.environ.get("SLURM_LOCALID") == local
    if local is not None and int(local) >= count and not has_own:
        return (
            f"LOCAL_RANK={local} has no GPU: {count} visible here (CUDA_VISIBLE_DEVICES); start no more processes than "
            f"GPUs (num_processes), or {_unset()}"
        )
    return ""


def _accelerate_problems(config: Config) -> Iterator[str]:
    # what accelerate sets for several processes, of which it starts one where it was not given MPI's hosts
    has_launcher = any(name in os.environ for name in ("WORLD_SIZE", *MPI_RANKS))
    is_met = os.environ.get("MASTER_ADDR") in ("127.0.0.1", "localhost", "::1")
    if is_met and not has_launcher and os.environ.get("ACCELERATE_USE_CPU", "").lower() in TRUE:
        yield (
            "accelerate launch was asked for several processes on a CPU and starts one; torchrun --nproc_per_node 2 "
            "train/main.py ... starts two, num_processes: 1 is for one (or unset MASTER_ADDR)"
        )
    for each in REFUSED:
        value = os.environ.get(each.variable)
        if value is not None and value.lower() not in each.harmless:
            yield f"the accelerate configuration says {each.what} ({each.variable}={value}): {each.instead}"
    configured = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if configured not in ("1", str(config.batch.accumulation)):
        batch = config.batch
        ours = f"--batch.accumulation says {batch.accumulation}" if batch.accumulation else "--batch.samples decides it"
        yield (
            f"the accelerate configuration says gradient_accumulation_steps {configured} and {ours}; "
            "remove it from the accelerate configuration, because the profile sets it"
        )


def _torch_problems(config: Config) -> Iterator[str]:
    for name in THREADS:
        value = os.environ.get(name, "1")
        if not re.fullmatch(r"\s*[1-9]\d*\s*(,\s*[1-9]\d*\s*)*", value):
            yield f"{name}={value} is no number of threads; unset it, or write one such as {name}=8"
    if config.run.device != "cpu" and os.environ.get(TF32, "0").strip() not in ("", "0"):
        yield f"{TF32}={os.environ[TF32]} would round fp32 products to TF32 unseen; unset it"
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if config.run.deterministic and workspace not in (":4096:8", ":16:8"):
        yield f"CUBLAS_WORKSPACE_CONFIG={workspace} is not deterministic (--run.deterministic); unset it"

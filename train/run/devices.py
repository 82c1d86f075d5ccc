"""What a GPU supports by its compute capability: the compute type, kernel fallbacks, warnings and refusals.

fp8 products begin at 8.9, bf16 and flash kernels at 8.0, fast int8 at 7.5, Triton at 7.0, bitsandbytes at 6.0 (its
README: "SM60+ minimum").
"""

import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from train.run.exits import ExitCode, ExitWith

DtypeOption = Literal["auto", "bf16", "fp16", "fp32"]
FP8 = (8, 9)
BF16 = FLASH = (8, 0)
FAST_INT8 = (7, 5)
TRITON = FAST_FP16 = (7, 0)
ALSO_FAST_FP16 = ((5, 3), (6, 0))
BITSANDBYTES = (6, 0)
CUDA_13 = (7, 5)  # lowest that torch's builds for CUDA 12.8 and later support; the build for 12.6 supports CUDA_12
CUDA_12 = (5, 0)
NO_GPU = "there is no GPU (--engine.kind fused runs it here as well)"
NO_GPU_FOR_FP8 = "there is no GPU; --engine.kind fused multiplies the same numbers in fp32 here, slowly"
# "CUDA error: out of memory", "Cuda failure 2 'out of memory'", "Failed to CUDA calloc async 608 bytes", "Failed to
# CUDA host alloc 4096 bytes", and cuBLAS's and cuDNN's own
NO_MEMORY = r"error: out of memory|'out of memory'|Failed to (?:CUDA )?(?:host )?[cm]?alloc|STATUS_ALLOC_FAILED"


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device; only this function asks torch for it."""
    return torch.cuda.get_device_capability(device)


def out_of_memory_line(error: RuntimeError) -> str:
    """The line of a message that tells of memory which CUDA, one of its libraries or NCCL did not get; else nothing.

    torch raises OutOfMemoryError for what its allocator did not get. NCCL allocates beside it, and torch repeats what
    it said last under `Last error:` (torch's getNcclErrorDetailStr, NCCL's checks.h and alloc.h).
    """
    return next((line.strip() for line in str(error).splitlines() if re.search(NO_MEMORY, line)), "")


@dataclass(frozen=True)
class ComputeType:
    """The dtype in which the base computes."""

    name: Literal["bf16", "fp16", "fp32"]
    reason: str = ""  # why auto did not choose bf16 on a GPU

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[self.name]


def compute_type(wanted: DtypeOption, device: torch.device) -> ComputeType:
    """The compute type for `model.dtype` on the device.

    It depends on the compute capability, because is_bf16_supported() is true on GPUs that only emulate bf16
    (pytorch#148322). Raises ExitWith(BAD_INPUT) if bf16 is asked for on such a GPU.
    """
    if device.type != "cuda":
        return ComputeType("fp32" if wanted == "auto" else wanted)
    return compute_type_at(wanted, capability(device))


def compute_type_at(wanted: DtypeOption, compute_capability: tuple[int, int]) -> ComputeType:
    """As compute_type, for any GPU of this compute capability."""
    best = _best_type(compute_capability)
    if wanted == "bf16" and compute_capability < BF16:
        reason = f"--model.dtype bf16: {best.reason}; use auto, which chooses {best.name} here"
        raise ExitWith(ExitCode.BAD_INPUT, reason)
    return best if wanted == "auto" else ComputeType(wanted)


def _best_type(compute_capability: tuple[int, int]) -> ComputeType:
    number = "compute capability {}.{}".format(*compute_capability)
    if compute_capability >= BF16:
        return ComputeType("bf16")
    if compute_capability >= FAST_FP16 or compute_capability in ALSO_FAST_FP16:
        return ComputeType("fp16", f"{number} has no bf16")
    return ComputeType("fp32", f"{number} has no bf16 and no fast fp16")  # 6.1: 1/64 of fp32's rate


def check_products(products: str, compute_capability: tuple[int, int]) -> None:
    """Raises ExitWith(BAD_INPUT) if a GPU of this compute capability has no products of this kind (engine.products)."""
    if products == "fp8" and compute_capability < FP8:
        number = "compute capability {}.{}".format(*compute_capability)
        reason = f"{number} has no fp8 products (8.9 has: L4, L40S, RTX 40, H100 and newer); leave the option out"
        raise ExitWith(ExitCode.BAD_INPUT, f"--engine.products fp8: {reason}")


def kernel_fallbacks(device: torch.device) -> list[str]:
    """What the fused engine uses instead of kernels that the GPU is too old for, one line each; none on a CPU."""
    if device.type != "cuda":
        return []
    lines = []
    if capability(device) < FLASH:
        lines.append("attention by SDPA, one sample at a time (flash kernels need compute capability 8.0)")
    if capability(device) < TRITON:
        lines.append("torch's own operations instead of Triton kernels (they need compute capability 7.0)")
    return lines


def int8_warning(quantization: str, device: torch.device) -> str:
    """A warning if LLM.int8 is slow on this device; otherwise empty."""
    if quantization != "int8" or device.type != "cuda" or capability(device) >= FAST_INT8:
        return ""
    return "model.quantization int8 is slow here (fast LLM.int8 needs compute capability 7.5); nf4 is not"


def check_build(device: torch.device) -> None:
    """Raises ExitWith(BAD_INPUT) if this build of torch has no kernels for the CUDA device."""
    number, built = capability(device), torch.cuda.get_arch_list()
    targets = [match for entry in built if (match := re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", entry))]
    if not targets or any(_supports(match, number) for match in targets):  # ROCm names its targets differently
        return
    if number < CUDA_12:
        remedy = "no build of this torch has them"
    else:
        build = "torch's CUDA 12.6 build (cu126)" if number < CUDA_13 else "a newer torch"
        remedy = f"install {build}, which has them"
    raise ExitWith(
        ExitCode.BAD_INPUT,
        f"{torch.cuda.get_device_name(device)} needs kernels for sm_{number[0]}{number[1]}, and torch "
        f"{torch.__version__} has {', '.join(built)}; {remedy}",
    )


def _supports(target: re.Match[str], number: tuple[int, int]) -> bool:
    """Whether code for `target` runs on a GPU of this compute capability.

    Machine code (sm) runs on its minor version and later ones of the same major version, PTX (compute) on everything
    later; with the suffix `a` both run on that capability alone.
    """
    made_for = (int(target[2]), int(target[3]))
    if target[4] == "a":
        return number == made_for
    return number >= made_for and (target[1] == "compute" or number[0] == made_for[0])


def check_bitsandbytes(options: Sequence[str], device: torch.device) -> None:
    """Raises ExitWith(BAD_INPUT) if the CUDA device is too old for bitsandbytes, which these options need."""
    number = capability(device)
    if number < BITSANDBYTES and options:
        raise ExitWith(
            ExitCode.BAD_INPUT,
            f"{torch.cuda.get_device_name(device)} has compute capability {number[0]}.{number[1]}, and bitsandbytes "
            f"needs 6.0 or higher: {', '.join(options)}",
        )


def device_name(device: torch.device) -> str:
    """The device's name and size, for people."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"

"""What a GPU can do by its compute capability, and what is chosen, said or refused because of it.

bf16 and flash kernels begin at 8.0, fast int8 at 7.5, Triton at 7.0, bitsandbytes at 6.0 (its README: "SM60+ minimum").
"""

import platform
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from train.run.exits import ExitCode, ExitWith

Wanted = Literal["auto", "bf16", "fp16", "fp32"]
BF16 = FLASH = (8, 0)
FAST_INT8 = (7, 5)
TRITON = FAST_FP16 = (7, 0)
ALSO_FAST_FP16 = ((5, 3), (6, 0))
BITSANDBYTES = (6, 0)
CUDA_13 = (7, 5)  # what torch's builds for CUDA 12.8 and later begin with; the one for 12.6 begins with CUDA_12
CUDA_12 = (5, 0)


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device; nothing else in train/ asks torch for it."""
    return torch.cuda.get_device_capability(device)


@dataclass(frozen=True)
class ComputeType:
    """The type that the base computes in."""

    name: Literal["bf16", "fp16", "fp32"]
    reason: str = ""  # why auto could not take bf16 on a GPU

    @property
    def dtype(self) -> torch.dtype:
        """As torch has it."""
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[self.name]


def compute_type(wanted: Wanted, device: torch.device) -> ComputeType:
    """What `model.dtype` means on the device.

    By compute capability, since is_bf16_supported() is true on GPUs that only emulate it (pytorch#148322). Raises
    ExitWith(BAD_INPUT) where bf16 is asked for on such a GPU.
    """
    if device.type != "cuda":
        return ComputeType("fp32" if wanted == "auto" else wanted)
    return compute_type_at(wanted, capability(device))


def compute_type_at(wanted: Wanted, compute_capability: tuple[int, int]) -> ComputeType:
    """As compute_type, for a GPU of this compute capability, which need not be here."""
    best = _best_type(compute_capability)
    if wanted == "bf16" and compute_capability < BF16:
        reason = f"--model.dtype bf16: {best.reason}; write auto, which takes {best.name} here"
        raise ExitWith(ExitCode.BAD_INPUT, reason)
    return best if wanted == "auto" else ComputeType(wanted)


def _best_type(compute_capability: tuple[int, int]) -> ComputeType:
    number = "compute capability {}.{}".format(*compute_capability)
    if compute_capability >= BF16:
        return ComputeType("bf16")
    if compute_capability >= FAST_FP16 or compute_capability in ALSO_FAST_FP16:
        return ComputeType("fp16", f"{number} has no bf16")
    return ComputeType("fp32", f"{number} has no bf16 and no fast fp16")  # 6.1: 1/64 of fp32's rate


def substitutes(device: torch.device) -> list[str]:
    """What the fused engine uses in place of kernels that the GPU is too old for; nothing on a CPU."""
    if device.type != "cuda":
        return []
    lines = []
    if capability(device) < FLASH:
        lines.append("attention by SDPA, one sample at a time (flash kernels need compute capability 8.0)")
    if capability(device) < TRITON:
        lines.append("torch's own operations instead of Triton kernels (they need compute capability 7.0)")
    return lines


def int8_warning(quantization: str, device: torch.device) -> str:
    """What to know before waiting for LLM.int8 on this device, or nothing."""
    if quantization != "int8" or device.type != "cuda" or capability(device) >= FAST_INT8:
        return ""
    return "model.quantization int8 is slow here (LLM.int8 needs compute capability 7.5), nf4 is not"


def check_build(device: torch.device) -> None:
    """Raises ExitWith(BAD_INPUT) where this build of torch has no kernels for the CUDA device."""
    card, built = capability(device), torch.cuda.get_arch_list()
    targets = [match for entry in built if (match := re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", entry))]
    if not targets or any(_serves(match, card) for match in targets):  # ROCm's builds name other things
        return
    if card < CUDA_12:
        remedy = "no build of this torch has them"
    else:
        build = "torch's CUDA 12.6 build (cu126)" if card < CUDA_13 else "a newer torch"
        remedy = f"install {build}, which has them"
    raise ExitWith(
        ExitCode.BAD_INPUT,
        f"{torch.cuda.get_device_name(device)} needs kernels for sm_{card[0]}{card[1]}, and torch {torch.__version__} "
        f"has {', '.join(built)}; {remedy}",
    )


def _serves(target: re.Match[str], card: tuple[int, int]) -> bool:
    """Whether code for `target` runs on the card.

    Machine code (sm) does within its major version from its minor on, PTX (compute) on everything later; with an `a`
    either is for that one capability alone.
    """
    made_for = (int(target[2]), int(target[3]))
    if target[4] == "a":
        return card == made_for
    return card >= made_for and (target[1] == "compute" or card[0] == made_for[0])


def check_bitsandbytes(options: Sequence[str], device: torch.device) -> None:
    """Raises ExitWith(BAD_INPUT) where the CUDA device is too old for bitsandbytes, which these options need."""
    card = capability(device)
    if card < BITSANDBYTES and options:
        raise ExitWith(
            ExitCode.BAD_INPUT,
            f"{torch.cuda.get_device_name(device)} has compute capability {card[0]}.{card[1]}, and bitsandbytes needs "
            f"6.0 at least: {', '.join(options)}",
        )


def device_name(device: torch.device) -> str:
    """The device as a person calls it."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB"
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"

"""Every seed that is derived from train.seed, one line a use."""

import hashlib
from typing import Literal

import torch

Use = Literal[
    "adapters", "random base", "path weights", "sample order", "batch order", "held out", "validation subset", "dropout"
]


def derived_seed(seed: int, use: Use, *numbers: int) -> int:
    """The seed of a generator that draws for `use`; what `numbers` are is said beside each.

    Random draws are functions of their seeds alone, so that no generator state is saved and a resumed run draws what
    the uninterrupted one would have.
    """
    match use, numbers:
        case (("adapters" | "random base" | "path weights"), ()):
            return seed
        case "sample order", (epoch,):
            return (seed << 20) + epoch
        case "batch order", (epoch,):  # of batches whose samples were grouped by length
            return ((seed + 1) << 20) + epoch
        case "held out", ():  # as the order of an epoch that no run reaches
            return (seed << 20) + 2**19
        case "validation subset", ():
            return (seed << 20) + 2**19 + 1
        case "dropout", (step, rank, micro_batch):
            digest = hashlib.blake2b(f"{seed} {step} {rank} {micro_batch}".encode(), digest_size=7).digest()
            return int.from_bytes(digest, "little")
    raise AssertionError(f"{use} takes other numbers than {numbers}")


def seed_forward(seed: int, step: int, rank: int, micro_batch: int) -> None:
    """Makes dropout in one forward pass a function of train.seed, step, process and micro-batch."""
    torch.manual_seed(derived_seed(seed, "dropout", step, rank, micro_batch))

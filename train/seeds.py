"""Every derived seed: a function of train.seed and of what it is for."""

import hashlib

import torch


def seed_forward(seed: int, step: int, rank: int, forward: int) -> None:
    """Makes dropout in one forward pass a function of these four numbers.

    So no generator state has to be saved and restored: a resumed step draws what the uninterrupted one would have.
    """
    digest = hashlib.blake2b(f"{seed} {step} {rank} {forward}".encode(), digest_size=7).digest()
    torch.manual_seed(int.from_bytes(digest, "little"))

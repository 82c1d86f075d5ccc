"""The shapes of micro-batches that run as CUDA graphs."""

from collections.abc import Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F

from train.collate import MicroBatch, with_empty_samples
from train.engine.plan import GRAPH_STEP, padded

BOUNDARIES_STEP = 8  # entries of cu_seqlens come in multiples of it

Shape = tuple[int, int]  # tokens, and entries of cu_seqlens


def shape_of(num_tokens: int, num_samples: int) -> Shape:
    """The shape of a micro-batch of `num_samples` packed samples, with one more for the padding."""
    return padded(num_tokens), -(-(num_samples + 2) // BOUNDARIES_STEP) * BOUNDARIES_STEP


def padded_shape(batch: MicroBatch) -> Shape:
    """The shape of a packed micro-batch."""
    assert batch.cu_seqlens is not None
    return shape_of(batch.input_ids.shape[1], len(batch.cu_seqlens) - 1)


def pad(batch: MicroBatch, shape: Shape | None = None) -> MicroBatch:
    """The packed micro-batch in `shape`, or in `padded_shape` where it is None.

    `max_length` becomes the length of the whole row. The first sample that is added has all the padding, the others
    have no tokens; nothing in them is a target.
    """
    width, num_boundaries = shape or padded_shape(batch)
    num_tokens = batch.input_ids.shape[1]
    wide = replace(
        batch,
        input_ids=F.pad(batch.input_ids, (0, width - num_tokens)),
        position_ids=F.pad(batch.position_ids, (0, width - num_tokens)),
        max_length=width,
    )
    return with_empty_samples(wide, num_boundaries - 1)


def num_spare(batch: MicroBatch, shape: Shape) -> int:
    """Samples that a graph of `shape` has room for beside the micro-batch's own."""
    return shape[1] - len(batch.lengths) - 1


def boundaries(batch: MicroBatch, shape: Shape, longest_sample: int) -> torch.Tensor:
    """cu_seqlens of a micro-batch that `pad` has padded, in a graph of `shape`; 0: a sample may be of any length.

    What is padded, less than GRAPH_STEP tokens of it by `pad`, is as many samples as it takes.
    """
    assert batch.cu_seqlens is not None
    own = batch.cu_seqlens[: len(batch.lengths) + 1]
    numbers = torch.arange(1, num_spare(batch, shape) + 1, dtype=own.dtype, device=own.device)
    ends = batch.input_ids.shape[1] - GRAPH_STEP + numbers * (longest_sample or shape[0])
    return torch.cat([own, ends.clamp(max=shape[0])])


def serving(shape: Shape, shapes: Iterable[Shape]) -> Shape | None:
    """The smallest of the shapes that has room for `shape`; None where none has."""
    return min((each for each in shapes if each[0] >= shape[0] and each[1] >= shape[1]), default=None)

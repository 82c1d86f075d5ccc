"""Samples -> one padded micro-batch, with the places and values of its targets; pure, on the CPU."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F

MIN_UNIFORM_LENGTH = 512  # tokens from which on samples of one length have attention kernels of their own
LENGTH_MULTIPLE = 128
MAX_PADDING = 0.03


@dataclass(frozen=True)
class MicroBatch:
    """One forward pass of one process.

    There is no attention mask. Padding stands on the right, so under causal attention no token of a sample can see
    it, and no target lies in it; without a mask attention takes its fastest kernels. Packed samples stand behind one
    another in a single row, and attention ends where position_ids start again, at the borders in `cu_seqlens`.
    """

    input_ids: torch.Tensor  # int64 [B, T]
    position_ids: torch.Tensor  # int64 [B, T], from 0 in every sample
    target_rows: torch.Tensor  # int64 [N]: b * T + t of the positions that predict a trained token
    targets: torch.Tensor  # int64 [N]: that token
    cu_seqlens: torch.Tensor | None = None  # int32 [S + 1], packed rows only: where samples begin, and T
    max_length: int = 0  # packed rows only: tokens of the longest sample
    uniform_length: int = 0  # packed rows only: tokens of every sample, where all have as many

    def to(self, device: torch.device) -> "MicroBatch":
        """The same micro-batch on `device`, copied without waiting: from page-locked memory, where that is a GPU."""
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        if device.type == "cuda":
            tensors = {name: value.pin_memory() for name, value in tensors.items()}
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in tensors.items()})


def collate(rows: Sequence[Mapping[str, Any]], pad_token_id: int) -> MicroBatch:
    """Pads rows of `input_ids` and `trained` (lists of one length) on the right, to the longest.

    What is trained is known by position, never by token id, so it does not matter which token pads.
    """
    width = max(len(row["input_ids"]) for row in rows)
    input_ids = torch.full((len(rows), width), pad_token_id)
    trained = torch.zeros((len(rows), width), dtype=torch.bool)
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        input_ids[i, :length] = torch.tensor(row["input_ids"])
        trained[i, :length] = torch.tensor(row["trained"])
    is_target = trained[:, 1:]
    batch_index, position = is_target.nonzero(as_tuple=True)
    return MicroBatch(
        input_ids=input_ids,
        position_ids=torch.arange(width).repeat(len(rows), 1),  # not expanded: that cannot be page-locked
        target_rows=batch_index * width + position,
        targets=input_ids[:, 1:][is_target],
    )


def with_empty_samples(batch: MicroBatch, num_samples: int) -> MicroBatch:
    """The packed micro-batch with so many samples at least: those that it lacks have no tokens and stand at the end."""
    borders = batch.cu_seqlens
    assert borders is not None
    missing = max(0, num_samples + 1 - len(borders))
    return replace(batch, cu_seqlens=F.pad(borders, (0, missing), value=batch.input_ids.numel()), uniform_length=0)


def packed_tokens(lengths: Sequence[int]) -> int:
    """Tokens of the row that collate_packed makes of samples of these lengths."""
    uniform_length = _uniform_length(lengths) if lengths else 0
    return len(lengths) * uniform_length if uniform_length else sum(lengths)


def _uniform_length(lengths: Sequence[int]) -> int:
    """What every sample is filled up to, or has, or 0 where they stay of several lengths."""
    uniform_length = -(-max(lengths) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    if max(lengths) < MIN_UNIFORM_LENGTH or len(lengths) * uniform_length > (1 + MAX_PADDING) * sum(lengths):
        return lengths[0] if len(set(lengths)) == 1 else 0
    return uniform_length


def collate_packed(rows: Sequence[Mapping[str, Any]]) -> MicroBatch:
    """Samples behind one another in one row; a sample's first token is predicted by nothing.

    Long samples of almost one length, pieces of a text, are filled up to one multiple of LENGTH_MULTIPLE where that
    adds 3 % of tokens at most: attention's kernels for them take half the time. Nothing sees the filling.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    uniform_length = _uniform_length(lengths)
    widths = [uniform_length or length for length in lengths]
    starts = list(accumulate(widths, initial=0))
    input_ids = torch.zeros(starts[-1], dtype=torch.int64)
    trained = torch.zeros(starts[-1], dtype=torch.bool)
    for start, length, row in zip(starts, lengths, rows, strict=False):
        input_ids[start : start + length] = torch.tensor(row["input_ids"])
        trained[start + 1 : start + length] = torch.tensor(row["trained"][1:], dtype=torch.bool)
    (positions,) = trained.nonzero(as_tuple=True)
    return MicroBatch(
        input_ids=input_ids[None],
        position_ids=torch.cat([torch.arange(width) for width in widths])[None],
        target_rows=positions - 1,
        targets=input_ids[positions],
        cu_seqlens=torch.tensor(starts, dtype=torch.int32),
        max_length=max(widths),
        uniform_length=uniform_length,
    )

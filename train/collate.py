"""Samples -> one padded or packed micro-batch, with the rows and values of its targets; pure, on the CPU."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F

MIN_UNIFORM_LENGTH = 512  # tokens; attention has faster kernels for samples of one length from here on
LENGTH_MULTIPLE = 128  # tokens
MAX_PADDING = 0.03  # of the tokens, to bring packed samples to one length


def _nobody(chunks: torch.Tensor) -> torch.Tensor:
    raise AssertionError("a process that computes whole micro-batches exchanges nothing")


@dataclass(frozen=True)
class Part:
    """Which of `count` equal parts of a micro-batch's tokens this process computes (context parallelism).

    A group of `count` processes takes the same micro-batches; one alone is a group with a single part, the whole.
    """

    number: int = 0
    count: int = 1
    swap: Callable[[torch.Tensor], torch.Tensor] = _nobody  # [count, ...]: chunk n goes to part n; those of all come
    any_of: Callable[[bool], bool] = bool  # whether it is true in any process of the group

    def rows(self, num_tokens: int) -> slice:
        """Its tokens, of a number that `count` divides."""
        width = num_tokens // self.count
        return slice(self.number * width, (self.number + 1) * width)

    def alone(self) -> "Part":
        """The same for a trial without the others, whom a process that runs out of memory would leave waiting."""
        return replace(self, swap=torch.clone)


WHOLE = Part()


@dataclass(frozen=True)
class MicroBatch:
    """The samples of one forward pass of one process.

    There is no attention mask, so attention takes its fastest kernels. Padding is on the right: under causal attention
    no token of a sample sees it, and no target is in it. Packed samples follow one another in a single row, and
    attention ends at the sequence boundaries `cu_seqlens`, where position_ids start again.
    """

    input_ids: torch.Tensor  # int64 [B, T]
    position_ids: torch.Tensor  # int64 [B, T], from 0 in every sample
    target_rows: torch.Tensor  # int64 [N]: b * T + t of the positions that predict a supervised token
    targets: torch.Tensor  # int64 [N]: that token
    cu_seqlens: torch.Tensor | None = None  # int32 [S + 1], packed rows only: each sample's start, and T
    max_length: int = 0  # packed rows only: tokens of the longest sample
    uniform_length: int = 0  # packed rows only: tokens of every sample; 0 where they differ
    lengths: tuple[int, ...] = ()  # tokens of each sample, in order; in packed rows with its padding
    part: Part = WHOLE  # input_ids, target_rows and targets are of these tokens alone, all else of the whole

    def to(self, device: torch.device) -> "MicroBatch":
        """The same micro-batch on `device`; to a GPU from pinned memory, without waiting for the copy."""
        if self.input_ids.device.type == device.type:
            return self
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        if device.type == "cuda":
            tensors = {name: value.pin_memory() for name, value in tensors.items()}
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in tensors.items()})


@dataclass(frozen=True)
class StepBatch:
    """One process's micro-batches of one optimizer step, and the step's counts over all processes."""

    micro_batches: list[MicroBatch]
    num_supervised_tokens: int  # over the whole step and all processes: the one divisor of the loss
    num_tokens: int  # likewise
    sample_ids: list[int]  # likewise

    def to(self, device: torch.device) -> "StepBatch":
        """The same with its micro-batches on `device`."""
        return replace(self, micro_batches=[each.to(device) for each in self.micro_batches])


def collate(rows: Sequence[Mapping[str, Any]], pad_token_id: int) -> MicroBatch:
    """Pads rows of `input_ids` and `trained` (lists of one length) on the right, to the longest.

    Supervision goes by position, never by token id, so it does not matter which token pads.
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
        position_ids=torch.arange(width).repeat(len(rows), 1),  # not expanded: that cannot be pinned
        target_rows=batch_index * width + position,
        targets=input_ids[:, 1:][is_target],
        lengths=tuple(len(row["input_ids"]) for row in rows),
    )


def with_empty_samples(batch: MicroBatch, num_samples: int) -> MicroBatch:
    """The packed micro-batch with at least `num_samples` samples; those added have no tokens and come last."""
    cu_seqlens = batch.cu_seqlens
    assert cu_seqlens is not None
    missing = max(0, num_samples + 1 - len(cu_seqlens))
    return replace(batch, cu_seqlens=F.pad(cu_seqlens, (0, missing), value=batch.input_ids.numel()), uniform_length=0)


def part_of(batch: MicroBatch, part: Part) -> MicroBatch:
    """The part of a whole packed micro-batch, padded to equal parts by a sample of its own behind the others.

    Targets were shifted before, so the last token of a part predicts the first of the next.
    """
    if part.count == 1:
        return batch
    missing = -batch.input_ids.shape[1] % part.count
    if missing:
        ids, positions = (F.pad(each, (0, missing)) for each in (batch.input_ids, batch.position_ids))
        batch = replace(batch, input_ids=ids, position_ids=positions, max_length=max(batch.max_length, missing))
        batch = with_empty_samples(batch, len(batch.lengths) + 1)
    rows = part.rows(batch.input_ids.shape[1])
    is_here = (batch.target_rows >= rows.start) & (batch.target_rows < rows.stop)
    return replace(
        batch,
        input_ids=batch.input_ids[:, rows],
        target_rows=batch.target_rows[is_here] - rows.start,
        targets=batch.targets[is_here],
        part=part,
    )


def packed_tokens(lengths: Sequence[int]) -> int:
    """Tokens of the row that collate_packed makes of samples with these lengths."""
    uniform_length = _uniform_length(lengths) if lengths else 0
    return len(lengths) * uniform_length if uniform_length else sum(lengths)


def _uniform_length(lengths: Sequence[int]) -> int:
    """The length that every sample has or is padded to; 0 where they keep different lengths."""
    uniform_length = -(-max(lengths) // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    if max(lengths) < MIN_UNIFORM_LENGTH or len(lengths) * uniform_length > (1 + MAX_PADDING) * sum(lengths):
        return lengths[0] if len(set(lengths)) == 1 else 0
    return uniform_length


def collate_packed(rows: Sequence[Mapping[str, Any]]) -> MicroBatch:
    """Puts samples one after another in one row; the first token of each is not a target.

    Long samples of almost one length, such as pieces of a text, are padded to one multiple of LENGTH_MULTIPLE where
    that adds at most 3 % of tokens: attention's kernels for one length take half the time. No token sees the padding.
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
        lengths=tuple(widths),
    )


def collated(rows: Sequence[Mapping[str, Any]], is_packed: bool, pad_token_id: int, part: Part) -> MicroBatch:
    """A micro-batch of these samples, packed or padded; packed this process's part of it."""
    return part_of(collate_packed(rows), part) if is_packed else collate(rows, pad_token_id)

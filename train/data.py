"""The order in which samples are trained, as a pure function of seed and step, and the windows cut from it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import fmean, pstdev
from typing import Any

import torch
from accelerate import Accelerator
from datasets import Dataset

from data_tools.packing import pack
from data_tools.prepare import Prepared, PrepareSettings, prepare
from data_tools.records import DataError
from train.batching import Rows
from train.collate import MicroBatch, collate, collate_packed, packed_tokens
from train.config import BatchConfig, Config, TrainConfig


@dataclass(frozen=True)
class Window:
    """The micro-batches of one process in one optimizer step, and what the step is over all processes."""

    micro_batches: list[MicroBatch]
    num_supervised_tokens: int  # over the whole step and all processes: the one divisor of the loss
    num_tokens: int  # likewise
    sample_ids: list[int]  # likewise


@dataclass(frozen=True)
class Layout:
    """How one optimizer step is cut over processes and forward passes."""

    per_device: int
    accumulation: int
    num_processes: int
    rank: int

    @classmethod
    def of(cls, batch: BatchConfig, accelerator: Accelerator) -> "Layout":
        """Of this process's part of a run."""
        return cls(batch.per_device, batch.accumulation, accelerator.num_processes, accelerator.process_index)

    @property
    def samples_per_step(self) -> int:
        """The global batch size."""
        return self.per_device * self.accumulation * self.num_processes


class TrainingData:
    """The training samples in stateless order: step `s` always holds the same samples, whatever was done before.

    What is ordered are rows: single samples, or with packing bins of samples that share a row of max_length tokens.
    Epoch e visits every row once, in the permutation of (seed, e); its last window may be smaller than the others.
    """

    def __init__(self, samples: Dataset, config: Config, layout: Layout, pad_token_id: int) -> None:
        self.samples = samples
        self.seed = config.train.seed
        self.layout = layout
        self.pad_token_id = pad_token_id
        self.packed = config.data.packing
        self.padding_free = config.data.packing  # the engine wants it of other rows too
        self.most_tokens = 0  # passes are put together or cut to hold so many tokens at most; 0: they stay as they are
        self.group_by_length = config.data.group_by_length
        self.num_tokens: list[int] = samples["num_tokens"][:]
        self.num_supervised_tokens: list[int] = samples["num_supervised_tokens"][:]
        chosen = weighted(samples["path_number"][:], config.data.weights, self.seed) if config.data.weights else None
        self.rows = [[i] for i in (range(len(samples)) if chosen is None else chosen)]
        if self.packed:
            flat = [row[0] for row in self.rows]
            bins = pack([self.num_tokens[i] for i in flat], config.data.max_length)
            self.rows = [[flat[position] for position in members] for members in bins]
        self.row_tokens = [sum(self.num_tokens[i] for i in row) for row in self.rows]
        self._epoch_order: tuple[int, list[int]] = (-1, [])
        self._ahead: tuple[int, Window] | None = None
        self.steps_per_epoch = math.ceil(len(self.rows) / layout.samples_per_step)

    def total_steps(self, train: TrainConfig) -> int:
        """Optimizer steps in the whole run."""
        steps = self.steps_per_epoch * train.epochs
        return min(steps, train.max_steps) if train.max_steps else steps

    def supervised_tokens_per_epoch(self) -> int:
        """Tokens whose loss counts in one epoch."""
        return sum(self.num_supervised_tokens[i] for row in self.rows for i in row)

    def fill_rate(self, max_length: int) -> float:
        """Share of the packed rows' tokens that are samples' tokens."""
        return sum(self.row_tokens) / (len(self.rows) * max_length)

    def row_ids(self, step: int) -> list[int]:
        """The rows of optimizer step `step` (counted from 0) over all processes, in order."""
        epoch, window = divmod(step, self.steps_per_epoch)
        start = window * self.layout.samples_per_step
        return self._order(epoch)[start : start + self.layout.samples_per_step]

    def sample_ids(self, step: int) -> list[int]:
        """The samples of optimizer step `step` over all processes, in order."""
        return [i for row in self.row_ids(step) for i in self.rows[row]]

    def window(self, step: int) -> Window:
        """What this process computes in optimizer step `step`.

        Forward pass a of process r takes the per_device rows from (a * num_processes + r) * per_device on. In an
        epoch's last window there may be none left for it: it then repeats one without any target, so that every
        process takes part in every collective and the sum of the losses stays what it was.
        """
        if self._ahead and self._ahead[0] == step:
            return self._ahead[1]
        row_ids = self.row_ids(step)
        parts = self.cut(self._passes(row_ids), self.num_tokens, not self.padding_free, self.most_tokens)
        micro_batches = []
        for part in parts:
            rows = [self.samples[i] for i in part]
            if not rows:
                first = self.rows[row_ids[0]][0]
                rows = [{**self.samples[first], "trained": [False] * self.num_tokens[first]}]
            micro_batches.append(collate_packed(rows) if self.padding_free else collate(rows, self.pad_token_id))
        ids = [i for row in row_ids for i in self.rows[row]]
        return Window(
            micro_batches,
            num_supervised_tokens=sum(self.num_supervised_tokens[i] for i in ids),
            num_tokens=sum(self.num_tokens[i] for i in ids),
            sample_ids=ids,
        )

    def prepare(self, step: int) -> None:
        """Makes the window of `step` now, while the device is busy, so that asking for it costs nothing."""
        self._ahead = (step, self.window(step))

    def _passes(self, row_ids: Sequence[int]) -> list[list[int]]:
        """The samples of each forward pass of this process in a step with these rows."""
        layout = self.layout
        num_passes = math.ceil(len(row_ids) / (layout.per_device * layout.num_processes))
        passes = []
        for number in range(num_passes):
            start = (number * layout.num_processes + layout.rank) * layout.per_device
            passes.append([i for row in row_ids[start : start + layout.per_device] for i in self.rows[row]])
        return passes

    def cut(
        self, passes: Sequence[list[int]], num_tokens: Sequence[int], is_padded: bool, most_tokens: int
    ) -> list[list[int]]:
        """The samples of the passes put together, or taken apart, to hold `most_tokens` at most (0: as they are).

        With what collating adds: padding to the longest, or filling. A sample that is longer is a pass of its own.
        """
        if not most_tokens:
            return list(passes)

        def fits(samples: list[int]) -> bool:
            lengths = [num_tokens[i] for i in samples]
            size = len(lengths) * max(lengths, default=0) if is_padded else packed_tokens(lengths)
            return size <= most_tokens

        merged: list[list[int]] = []
        for whole in passes:
            for samples in [whole] if fits(whole) else [[i] for i in whole]:
                if merged and fits(merged[-1] + samples):
                    merged[-1] = merged[-1] + samples
                else:
                    merged.append(samples)
        return merged

    def rows_for_plan(self) -> Rows:
        """The lengths, each row filled up as it is alone."""
        count, filled = self.layout.per_device, [packed_tokens([tokens]) for tokens in self.row_tokens]
        lengths = [self.num_tokens[i] for row in self.rows for i in row]
        return Rows(
            longest=tuple(accumulate(sorted(filled, reverse=True)[:count])),
            mean_pass=count * fmean(filled),
            deviation=math.sqrt(count) * pstdev(filled),
            mean_length=fmean(lengths),
            length_deviation=math.inf if self.group_by_length else pstdev(lengths),
            most_samples=sum(sorted(map(len, self.rows), reverse=True)[:count]),
        )

    def _order(self, epoch: int) -> list[int]:
        """The epoch's rows in order, made once an epoch: sorting a million lengths is no work for every step."""
        if self._epoch_order[0] != epoch:
            if self.group_by_length:
                order = _grouped_order(self.row_tokens, self.seed, epoch, self.layout.samples_per_step)
            else:
                order = _permutation(self.seed, epoch, len(self.rows))
            self._epoch_order = (epoch, order)
        return self._epoch_order[1]


def _permutation(seed: int, epoch: int, size: int) -> list[int]:
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    return torch.randperm(size, generator=generator).tolist()


def _grouped_order(lengths: Sequence[int], seed: int, epoch: int, window: int) -> list[int]:
    """The epoch's permutation, sorted by length within pools of fifty windows; equal lengths stay in its order.

    The windows are shuffled afterwards, or the loss would show the lengths as a sawtooth (artidoro/qlora#84); a
    partial window stays last.
    """
    order = _permutation(seed, epoch, len(lengths))
    pools = [order[start : start + 50 * window] for start in range(0, len(order), 50 * window)]
    ordered = [i for pool in pools for i in sorted(pool, key=lambda i: lengths[i])]
    windows = [ordered[start : start + window] for start in range(0, len(ordered), window)]
    num_whole = len(ordered) // window
    shuffled = [windows[i] for i in _permutation(seed + 1, epoch, num_whole)] + windows[num_whole:]
    return [i for members in shuffled for i in members]


def weighted(path_numbers: Sequence[int], weights: Sequence[float], seed: int) -> list[int]:
    """Sample numbers, each as often as its path's weight says; of a fractional part the seed chooses who is in it."""
    draws = torch.rand(len(path_numbers), generator=torch.Generator().manual_seed(seed)).tolist()
    chosen: list[int] = []
    for i, (path_number, draw) in enumerate(zip(path_numbers, draws, strict=True)):
        whole = int(weights[path_number])
        chosen += [i] * (whole + (draw < weights[path_number] - whole))
    if not chosen:
        raise DataError(f"--data.weights {' '.join(map(str, weights))} leave no sample; raise them")
    return chosen


def prepare_settings(config: Config, paths: Sequence[str]) -> PrepareSettings:
    """How the files at `paths` are to be prepared for this run."""
    overlap = int(config.data.max_length * config.data.text_overlap)
    data = config.data
    return PrepareSettings(
        tuple(paths), data.format, data.max_length, overlap, data.truncation, data.fields, data.on_error
    )


def hold_out(config: Config, prepared: Prepared, tokenizer: Any) -> tuple[Dataset, Dataset | None]:
    """(training, validation) samples; there may be no validation."""
    if config.data.validation_path:
        return prepared.dataset, prepare(prepare_settings(config, config.data.validation_path), tokenizer).dataset
    if config.data.validation_fraction:
        return split_validation(prepared, config.data.validation_fraction, config.train.seed)
    return prepared.dataset, None


def split_validation(prepared: Prepared, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """(training, validation) samples; whole records are held out, so no piece of a text stands on both sides.

    Raises DataError when either side would be empty.
    """
    num_records = prepared.statistics.num_records
    num_held = round(num_records * fraction)
    if not 0 < num_held < num_records:
        raise DataError(
            f"--data.validation_fraction {fraction}: of {num_records} records {num_held} would be held out; "
            "both sides need at least one"
        )
    held = set(_permutation(seed, 2**19, num_records)[:num_held])
    records: list[int] = prepared.dataset["record"][:]
    train = [i for i, record in enumerate(records) if record not in held]
    validation = [i for i, record in enumerate(records) if record in held]
    if not (train and validation):
        raise DataError(f"--data.validation_fraction {fraction}: all samples of one side were too long; choose another")
    samples: Any = prepared.dataset
    return samples.select(train), samples.select(validation)

"""The order in which samples are trained, as a pure function of seed and step, and the windows cut from it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from datasets import Dataset

from data_tools.prepare import Prepared, PrepareSettings
from data_tools.records import DataError
from train.collate import MicroBatch, collate
from train.config import Config


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

    @property
    def samples_per_step(self) -> int:
        """The global batch size."""
        return self.per_device * self.accumulation * self.num_processes


class TrainingData:
    """The training samples in stateless order: step `s` always holds the same samples, whatever was done before.

    Epoch e visits every sample once, in the permutation of (seed, e); its last window may be smaller than the others.
    """

    def __init__(self, samples: Dataset, seed: int, layout: Layout, pad_token_id: int) -> None:
        self.samples = samples
        self.seed = seed
        self.layout = layout
        self.pad_token_id = pad_token_id
        self.num_tokens: list[int] = samples["num_tokens"][:]
        self.num_supervised_tokens: list[int] = samples["num_supervised_tokens"][:]
        self.steps_per_epoch = math.ceil(len(samples) / layout.samples_per_step)

    def sample_ids(self, step: int) -> list[int]:
        """The samples of optimizer step `step` (counted from 0) over all processes, in order."""
        epoch, window = divmod(step, self.steps_per_epoch)
        start = window * self.layout.samples_per_step
        return _permutation(self.seed, epoch, len(self.samples))[start : start + self.layout.samples_per_step]

    def window(self, step: int) -> Window:
        """What this process computes in optimizer step `step`.

        Forward pass a of process r takes the per_device samples from (a * num_processes + r) * per_device on. In an
        epoch's last window there may be none left for it: it then repeats one without any target, so that every
        process takes part in every collective and the sum of the losses stays what it was.
        """
        ids, layout = self.sample_ids(step), self.layout
        num_passes = math.ceil(len(ids) / (layout.per_device * layout.num_processes))
        micro_batches = []
        for number in range(num_passes):
            start = (number * layout.num_processes + layout.rank) * layout.per_device
            mine = ids[start : start + layout.per_device]
            rows = [self.samples[i] for i in mine]
            if not rows:
                rows = [{**self.samples[ids[0]], "trained": [False] * self.num_tokens[ids[0]]}]
            micro_batches.append(collate(rows, self.pad_token_id))
        return Window(
            micro_batches,
            num_supervised_tokens=sum(self.num_supervised_tokens[i] for i in ids),
            num_tokens=sum(self.num_tokens[i] for i in ids),
            sample_ids=ids,
        )


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> list[int]:
    generator = torch.Generator().manual_seed((seed << 20) + epoch)
    return torch.randperm(size, generator=generator).tolist()


def prepare_settings(config: Config, paths: Sequence[str]) -> PrepareSettings:
    """How the files at `paths` are to be prepared for this run."""
    overlap = int(config.data.max_length * config.data.text_overlap)
    return PrepareSettings(tuple(paths), config.data.format, config.data.max_length, overlap)


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

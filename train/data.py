"""Which samples each optimizer step trains on, as a pure function of seed and step, and its micro-batches."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from itertools import accumulate
from statistics import fmean, pstdev
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset

from data_tools.formats import MAPPED
from data_tools.packing import pack
from data_tools.prepare import DataSplit, Prepared, PrepareSettings, prepare
from data_tools.render import RenderSettings
from data_tools.report import DataError
from data_tools.similarity import first_equal
from train.batching import LengthStatistics, StepPlan, regroup
from train.collate import WHOLE, StepBatch, collated, packed_tokens
from train.config import Config, TrainConfig, parse_argument
from train.dealing import Limits, deal
from train.layout import BatchLayout
from train.seeds import derived_seed


class TrainingData:
    """The training samples in a stateless order: step `s` holds the same samples whatever ran before.

    Rows are what is ordered: single samples or, with packing, the samples that share a row of max_length tokens.
    Epoch e visits every row once, in the permutation of (seed, e); its last batch may be smaller than the others.
    """

    def __init__(self, samples: Dataset, config: Config, layout: BatchLayout, pad_token_id: int) -> None:
        self.samples = samples
        self.seed = config.train.seed
        self.layout = layout
        self.pad_token_id = pad_token_id
        self.part = WHOLE  # of each micro-batch; assemble knows a group's
        self.packed = config.data.packing
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
        self._prefetched: tuple[int, StepPlan, StepBatch] | None = None
        self.steps_per_epoch = math.ceil(len(self.rows) / layout.samples_per_step)

    def trained_samples(self) -> list[int]:
        """The samples that every epoch visits, in the data's order."""
        return sorted({i for row in self.rows for i in row})

    def visited_samples(self, num_steps: int) -> list[int]:
        """The samples of the first `num_steps` optimizer steps, in the data's order."""
        if num_steps >= self.steps_per_epoch:
            return self.trained_samples()
        return sorted({i for step in range(num_steps) for i in self.sample_ids(step)})

    def total_steps(self, train: TrainConfig) -> int:
        """Optimizer steps in the whole run."""
        steps = self.steps_per_epoch * train.epochs
        return min(steps, train.max_steps) if train.max_steps else steps

    def ends(self, step: int, every: Literal["epoch"] | int | float) -> bool:
        """Whether an interval ends with optimizer step `step`: an epoch, so many steps, or a share of an epoch.

        Of a share it is the first step behind each multiple.
        """
        if isinstance(every, float):
            interval = every * self.steps_per_epoch
            before, after = (math.floor(number / interval + 1e-9) for number in (step - 1, step))
            return before < after
        return step % (self.steps_per_epoch if every == "epoch" else every) == 0

    def supervised_tokens_per_epoch(self) -> int:
        """Tokens whose loss counts in one epoch."""
        return sum(self.num_supervised_tokens[i] for row in self.rows for i in row)

    def fill_rate(self, max_length: int) -> float:
        """Share of the packed rows that holds samples; the rest is empty."""
        return sum(self.row_tokens) / (len(self.rows) * max_length)

    def row_ids(self, step: int) -> list[int]:
        """The rows of optimizer step `step` (counted from 0) over all processes, in order."""
        epoch, number = divmod(step, self.steps_per_epoch)
        start = number * self.layout.samples_per_step
        return self._order(epoch)[start : start + self.layout.samples_per_step]

    def sample_ids(self, step: int) -> list[int]:
        """The samples of optimizer step `step` over all processes, in order."""
        return [i for row in self.row_ids(step) for i in self.rows[row]]

    def batch(self, step: int, plan: StepPlan) -> StepBatch:
        """What this process computes in optimizer step `step`.

        One without samples in a micro-batch computes a sample with all labels masked, so that collectives match and
        the sum of the losses stays right.
        """
        if self._prefetched and self._prefetched[:2] == (step, plan):
            return self._prefetched[2]
        row_ids, is_packed = self.row_ids(step), self.is_packed(plan)
        micro_batches = []
        for members in self.divided(step, plan)[self.layout.rank]:
            rows = [self.samples[i] for i in members]
            if not rows:
                first = self.rows[row_ids[0]][0]
                rows = [{**self.samples[first], "trained": [False] * self.num_tokens[first]}]
            micro_batches.append(collated(rows, is_packed, self.pad_token_id, self.part))
        ids = [i for row in row_ids for i in self.rows[row]]
        return StepBatch(
            micro_batches,
            num_supervised_tokens=sum(self.num_supervised_tokens[i] for i in ids),
            num_tokens=sum(self.num_tokens[i] for i in ids),
            sample_ids=ids,
        )

    def divided(self, step: int, plan: StepPlan) -> list[list[list[int]]]:
        """For each process the samples of its micro-batches in optimizer step `step`.

        Where `plan` merges, several processes are dealt the step's rows by their cost. Otherwise micro-batch a of
        process r takes the per_device rows from (a * num_processes + r) * per_device on; one process may merge or
        split them.
        """
        rows, num_processes = [self.rows[row] for row in self.row_ids(step)], self.layout.num_processes
        is_padded, max_tokens = not self.is_packed(plan), plan.micro_batch_tokens if plan.merges else 0
        if self.is_dealt(plan):
            limits = Limits(max_tokens, plan.num_samples if plan.uses_graphs else sum(map(len, rows)), is_padded)
            return deal(rows, self.num_tokens, num_processes, limits, plan.pair_cost)
        configured = [self._as_configured(rows, rank) for rank in range(num_processes)]
        return [regroup(each, self.num_tokens, is_padded, max_tokens) for each in configured]

    def is_dealt(self, plan: StepPlan) -> bool:
        """Whether the processes take a step's rows by cost, not by position."""
        return self.layout.num_processes > 1 and plan.merges and plan.micro_batch_tokens > 0

    def prefetch(self, step: int, plan: StepPlan, device: torch.device) -> None:
        """Makes the batch of `step` now, on the device, while that is busy, so that asking for it costs nothing."""
        self._prefetched = (step, plan, self.batch(step, plan).to(device))

    def is_packed(self, plan: StepPlan) -> bool:
        """Whether a micro-batch's samples stand behind one another in one row, without padding."""
        return self.packed or plan.is_fused or plan.micro_batch_shape.layout == "unpadded"

    def _as_configured(self, rows: Sequence[list[int]], rank: int) -> list[list[int]]:
        """The samples of each micro-batch of a process in a step with these rows, as per_device says."""
        width, num_processes = self.layout.per_device, self.layout.num_processes
        starts = [
            (number * num_processes + rank) * width for number in range(math.ceil(len(rows) / (width * num_processes)))
        ]
        return [[i for row in rows[start : start + width] for i in row] for start in starts]

    def length_statistics(self) -> LengthStatistics:
        """The lengths that the plan counts with, each row padded as it would be alone.

        What several processes are dealt by cost varies less than what each would draw alone.
        """
        count, filled = self.layout.per_device, [packed_tokens([tokens]) for tokens in self.row_tokens]
        lengths, counts = [self.num_tokens[i] for row in self.rows for i in row], list(map(len, self.rows))
        return LengthStatistics(
            longest=tuple(accumulate(sorted(filled, reverse=True)[:count])),
            mean_micro_batch=count * fmean(filled),
            deviation=math.sqrt(count / self.layout.num_processes) * pstdev(filled),
            mean_length=fmean(lengths),
            length_deviation=math.inf if self.group_by_length else pstdev(lengths),
            row_samples=(fmean(counts), pstdev(counts)),
            max_samples=sum(sorted(counts, reverse=True)[:count]),
            num_processes=self.layout.num_processes,
        )

    def _order(self, epoch: int) -> list[int]:
        """The epoch's rows in order, sorted once an epoch: a million lengths take too long for every step."""
        if self._epoch_order[0] != epoch:
            if self.group_by_length:
                order = _grouped_order(self.row_tokens, self.seed, epoch, self.layout.samples_per_step)
            else:
                order = _permutation(derived_seed(self.seed, "sample order", epoch), len(self.rows))
            self._epoch_order = (epoch, order)
        return self._epoch_order[1]


def _permutation(derived: int, size: int) -> list[int]:
    return torch.randperm(size, generator=torch.Generator().manual_seed(derived)).tolist()


def _grouped_order(lengths: Sequence[int], seed: int, epoch: int, batch_size: int) -> list[int]:
    """The epoch's permutation, sorted by length within pools of fifty batches; equal lengths stay in its order.

    The batches are shuffled afterwards, or the loss would show the lengths as a sawtooth (artidoro/qlora#84); a
    partial batch stays last.
    """
    order = _permutation(derived_seed(seed, "sample order", epoch), len(lengths))
    pools = [order[start : start + 50 * batch_size] for start in range(0, len(order), 50 * batch_size)]
    ordered = [i for pool in pools for i in sorted(pool, key=lambda i: lengths[i])]
    batches = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    num_whole = len(ordered) // batch_size
    shuffled = [batches[i] for i in _permutation(derived_seed(seed, "batch order", epoch), num_whole)]
    return [i for members in (*shuffled, *batches[num_whole:]) for i in members]


def weighted(path_numbers: Sequence[int], weights: Sequence[float], seed: int) -> list[int]:
    """Sample numbers, repeated by their path's weight; of a fractional weight the seed chooses which samples."""
    generator = torch.Generator().manual_seed(derived_seed(seed, "path weights"))
    draws = torch.rand(len(path_numbers), generator=generator).tolist()
    chosen: list[int] = []
    for i, (path_number, draw) in enumerate(zip(path_numbers, draws, strict=True)):
        whole = int(weights[path_number])
        chosen += [i] * (whole + (draw < weights[path_number] - whole))
    if not chosen:
        raise DataError(f"--data.weights {' '.join(map(str, weights))} leave no sample; raise them")
    return chosen


def run_date(config: Config, started: date) -> date:
    """The date that chat templates see: data.date, or the day on which the run started."""
    return started if config.data.date == "auto" else date.fromisoformat(config.data.date)


def prepare_settings(config: Config, paths: Sequence[str], today: date) -> PrepareSettings:
    """How the files at `paths` are to be prepared for this run; templates that ask for the date see `today`."""
    data = config.data
    render = RenderSettings(
        dict(map(parse_argument, data.template_arguments)), today, data.history, data.empty_reasoning, data.leave_out
    )
    overlap = int(data.max_length * data.text_overlap)
    return PrepareSettings(
        tuple(paths), data.format, data.max_length, overlap, data.truncation, data.fields, data.on_error, render
    )


@dataclass(frozen=True)
class Splits:
    """The training data, and the validation data if there is any."""

    training: DataSplit
    validation: DataSplit | None


def read_data(config: Config, tokenizer: Any, today: date) -> Splits:
    """The prepared data of a run, divided; raises DataError where it cannot be used."""
    prepared = prepare(prepare_settings(config, config.data.path, today), tokenizer)
    if config.data.fields and MAPPED not in prepared.statistics.formats:
        named = " ".join(config.data.fields)
        raise DataError(f"--data.fields {named}: no row of data.path has these columns; leave it out, or correct it")
    if config.data.validation_path:
        held_out = prepare(prepare_settings(config, config.data.validation_path, today), tokenizer)
        return Splits(DataSplit(prepared, prepared.dataset), DataSplit(held_out, held_out.dataset))
    if config.data.validation_fraction:
        return split_validation(prepared, config.data.validation_fraction, config.train.seed)
    return Splits(DataSplit(prepared, prepared.dataset), None)


def split_validation(prepared: Prepared, fraction: float, seed: int) -> Splits:
    """Whole records are held out, and with each all that are equal to it but for case, white space and punctuation.

    So no piece of a text stands on both sides. Raises DataError where either side would be empty.
    """
    of_sample: np.ndarray = np.asarray(prepared.dataset["record"][:])
    records = np.unique(of_sample)  # those that were dropped have no sample
    groups = first_equal(prepared.facts["normalised"].to_numpy()[records])
    sizes = Counter(groups.tolist())
    num_held = round(len(records) * fraction)
    held: set[int] = set()
    count = 0
    members = sorted(sizes)
    for position in _permutation(derived_seed(seed, "held out"), len(members)):
        group = members[position]
        if count + sizes[group] <= num_held:
            held.add(group)
            count += sizes[group]
    if num_held and not held:  # every group has more records than are to be held out
        held = {min(members, key=lambda group: sizes[group])}
        count = sizes[min(held)]
    if not held or len(held) == len(members):
        raise DataError(
            f"--data.validation_fraction {fraction}: of {len(records)} records in {len(members)} groups of equal ones "
            f"{count} would be held out; both sides need at least one"
        )
    is_held = np.isin(of_sample, records[np.isin(groups, sorted(held))])
    samples: Any = prepared.dataset
    sides = [samples.select(np.flatnonzero(side).tolist()) for side in (~is_held, is_held)]
    return Splits(*(DataSplit(prepared, side) for side in sides))

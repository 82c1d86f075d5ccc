"""The rows that `handloop plan` counts with: those of the data, where they are here, else what is assumed, and why."""

import glob
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from data_tools.chat_template import NO_TEMPLATE, PLAIN_TEMPLATE
from data_tools.prepare import is_prepared
from data_tools.report import DataError
from data_tools.terminal import seen_from_here
from train.batching import LengthStatistics
from train.commands.forecast import assumed_lengths
from train.config import Config
from train.data import Splits, TrainingData, prepare_settings, read_data, run_date
from train.layout import BatchLayout
from train.memory.cluster import Cluster
from train.models.tokenizer import load_tokenizer
from train.profiles import GLOSSARY, HELD_OUT
from train.recipe import decided
from train.run.exits import ExitWith

# Bytes of data that are tokenised for a plan: about a quarter of a minute on two cores. Prepared data may have any size
MAX_BYTES = 50 * 10**6


@dataclass(frozen=True)
class Counted:
    """What the data are, and the steps that one process makes of them."""

    num_records: int
    num_samples: int
    tokens_per_epoch: int
    supervised_tokens_per_epoch: int
    mean_length: float  # tokens of a sample
    longest: int  # tokens of a row
    steps_per_epoch: int
    total_steps: int
    full_steps: float  # total_steps, the last of an epoch as the share of a step that it is

    @classmethod
    def of(cls, config: Config, splits: Splits, data: TrainingData) -> "Counted":
        """Of the training data of a run."""
        total = data.total_steps(config.train)
        filled = len(data.rows) / (data.steps_per_epoch * data.layout.samples_per_step)
        return cls(
            num_records=splits.training.prepared.statistics.num_records,
            num_samples=len(data.samples),
            tokens_per_epoch=sum(data.row_tokens),
            supervised_tokens_per_epoch=data.supervised_tokens_per_epoch(),
            mean_length=sum(data.num_tokens) / len(data.num_tokens),
            longest=max(data.row_tokens),
            steps_per_epoch=data.steps_per_epoch,
            total_steps=total,
            full_steps=total * filled,
        )


@dataclass(frozen=True)
class PlannedRows:
    """The lengths that a plan counts with."""

    lengths: LengthStatistics
    counted: Counted | None  # None: lengths are assumed
    said: tuple[str, ...]  # where they come from, and the steps

    def as_json(self) -> dict[str, Any]:
        """The counts, or null for each, with what is said to people."""
        names = Counted.__dataclass_fields__
        counts = asdict(self.counted) if self.counted else dict.fromkeys(names)
        assumed = None if self.counted else round(self.lengths.mean_length)
        return {**counts, "assumed_mean_length": assumed, "said": " ".join(self.said)}


def planned_rows(config: Config, mean_length: int | None, cluster: Cluster) -> PlannedRows:
    """The rows of data.path for one of these GPUs, unless their mean is given, or they cannot be counted here.

    Nothing is fetched for it, and at most MAX_BYTES are tokenised; they are then in the cache for the run itself.
    """
    why_not = f"as --mean-length {mean_length} says" if mean_length else _why_not(config)
    if why_not:
        return _assumed(config, mean_length, why_not, cluster)
    try:
        tokenizer = load_tokenizer(config).backend
        today = run_date(config, date.today())
        if too_large := _too_large(config, tokenizer, today):
            return _assumed(config, None, too_large, cluster)
        found = _counted(config, read_data(config, tokenizer, today), tokenizer.pad_token_id, cluster)
        is_plain = tokenizer.chat_template == PLAIN_TEMPLATE
        return replace(found, said=(*found.said, f"warning   {NO_TEMPLATE}")) if is_plain else found
    except (ExitWith, DataError) as error:  # which the run would say in full
        return _assumed(config, None, f"since the data cannot be counted here: {_in_short(error)}", cluster)


def _counted(config: Config, splits: Splits, pad_token_id: int, cluster: Cluster) -> PlannedRows:
    layout = BatchLayout.of_first(config.batch, cluster.num_processes)
    data = TrainingData(splits.training.samples, config, layout, pad_token_id)
    validated = max(splits.validation.samples["num_tokens"][:]) if splits.validation else 0
    found = Counted.of(config, splits, data)
    epochs = f"{config.train.epochs} epochs" if config.train.epochs > 1 else "1 epoch"
    limit = decided(config.train, found.steps_per_epoch) or epochs
    is_several = config.profile == "multi_gpu" and not config.batch.samples and cluster.num_processes == 1
    several = "; with N GPUs a step has N times the samples" if is_several else ""
    said = (
        f"data      {_named(config.data.path)}: {found.num_records:,} rows, {found.num_samples:,} samples of "
        f"{found.mean_length:,.0f} tokens on average, {found.longest:,} at most; {found.tokens_per_epoch:,} tokens an "
        f"epoch, {found.supervised_tokens_per_epoch:,} of them trained",
        f"steps     {found.steps_per_epoch:,} an epoch on {cluster}, {found.total_steps:,} in all ({limit}){several}",
    )
    return PlannedRows(replace(data.length_statistics(), longest_validation=validated), found, said)


def _assumed(config: Config, mean_length: int | None, why: str, cluster: Cluster) -> PlannedRows:
    mean = mean_length or config.data.max_length
    kind = f"rows of {mean:,} tokens on average" if mean_length else f"rows of {mean:,} tokens (data.max_length)"
    remedy = "" if mean_length else " --mean-length N gives the mean of yours"
    said = (
        f"data      {kind} are assumed, {why}.{remedy}",
        "steps     unknown without the data: rows x epochs / "
        f"{BatchLayout.of_first(config.batch, cluster.num_processes).samples_per_step} samples in a step on {cluster}",
    )
    return PlannedRows(assumed_lengths(config, mean), None, said)


def _why_not(config: Config) -> str:
    """Why the data are not even looked at; empty where they are here, and the user's."""
    if config.data.path == (GLOSSARY,) and config.profile not in HELD_OUT:
        return "since no data are named: --data.path FILE counts yours, and says steps and hours"
    away = [path for path in config.data.path + config.data.validation_path if not _files(path)]
    return f"since {_named(away)} is not on this machine" if away else ""


def _too_large(config: Config, tokenizer: Any, today: date) -> str:
    """Why data that are here are not counted; empty where they are small, or prepared by an earlier command."""
    size = sum(os.path.getsize(file) for path in config.data.path for file in _files(path))
    if size <= MAX_BYTES or is_prepared(prepare_settings(config, config.data.path, today), tokenizer):
        return ""
    return (
        f"since {size / 1e6:,.0f} MB take longer to count than a plan should: `handloop audit` with the same options "
        "counts and keeps them, and then this command says steps and hours"
    )


def _files(path: str) -> list[str]:
    """The files that a path names on this machine; a hub data set has none."""
    place = Path(path)
    if place.is_dir():
        return [str(file) for file in place.rglob("*") if file.is_file()]
    return [path] if place.is_file() else [file for file in glob.glob(path, recursive=True) if os.path.isfile(file)]


def _in_short(error: Exception) -> str:
    """What is wrong, and the first place of it."""
    return " ".join(line.strip() for line in str(error).splitlines()[:2])


def _named(paths: Sequence[str]) -> str:
    return ", ".join(map(seen_from_here, paths))

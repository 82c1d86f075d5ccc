"""CUDA graphs recorded before the first step, in all processes the same: while one records, all others wait for it."""

from collections import Counter

import torch

from train.collate import MicroBatch, collate_packed, packed_tokens
from train.data import TrainingData
from train.engine.graph_shapes import Shape, shape_of
from train.engine.graphs import MAX_GRAPHS, Graphs
from train.engine.plan import Plan
from train.models.pass_graphs import PassGraphs
from train.optim import state_bytes
from train.step import Training

LOOK_AHEAD = 32_000  # rows from the run's first whose micro-batches are counted: in 0.2 to 2 seconds


def record_graphs(training: Training) -> int:
    """Captures the graphs that the run needs, as far as memory allows; returns how many. Changes no weight.

    Room is left for the optimizer's state, which is not there yet. Whatever micro-batches behind LOOK_AHEAD have is
    replayed by the next larger one.
    """
    graphs = _graphs(training)
    if graphs is None:
        return 0
    graphs.planned = shapes_of(training.data, training.plan, training.total_steps)
    graphs.reserved = state_bytes(training.parameters.values(), training.config.optim)
    try:
        for num_tokens, num_boundaries in graphs.planned:
            batch = _row(num_tokens, num_boundaries - 2)  # `pad` adds one, and there is one boundary more than samples
            training.model(batch.to(training.accelerator.device)).backward()
    finally:
        graphs.reserved = 0
        training.flat.zero_grad()
        torch.cuda.empty_cache()
    return len(graphs.graphs)


def capture_seconds(training: Training) -> float:
    """Spent in capturing graphs since they were set up."""
    graphs = _graphs(training)
    return 0.0 if graphs is None else graphs.seconds


def _graphs(training: Training) -> Graphs | PassGraphs | None:
    engine = training.model.engine
    return training.model.reference.graphs if engine is None else engine.graphs


def shapes_of(data: TrainingData, plan: Plan, num_steps: int) -> list[Shape]:
    """The shapes of all processes' micro-batches in the run's first steps, the longest first, one a padded length.

    Each has room for the most samples that one of this length has. There are never more than MAX_GRAPHS with the
    largest one: the lengths that are used most.
    """
    uses, most = Counter[int](), Counter[int]()
    for step in range(min(num_steps, max(1, LOOK_AHEAD // data.layout.samples_per_step))):
        for members in (each for micro_batches in data.divided(step, plan) for each in micro_batches):
            has_room = len(members) <= plan.num_samples or not plan.uses_graphs
            if not members or not has_room:  # the largest has no room for it either: it runs eagerly
                continue
            num_tokens, num_boundaries = shape_of(packed_tokens([data.num_tokens[i] for i in members]), len(members))
            uses[num_tokens] += 1
            most[num_tokens] = max(most[num_tokens], num_boundaries)
    frequent = (num_tokens for num_tokens, _ in uses.most_common(MAX_GRAPHS - 1))
    return [(num_tokens, most[num_tokens]) for num_tokens in sorted(frequent, reverse=True)]


def _row(num_tokens: int, num_samples: int) -> MicroBatch:
    """A packed micro-batch of so many tokens, shared by so many samples."""
    shares = [(num_tokens + number) // num_samples for number in range(num_samples)]
    return collate_packed([{"input_ids": [0] * length, "trained": [True] * length} for length in shares])

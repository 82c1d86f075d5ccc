"""Whether a reference engine's passes run as CUDA graphs: tried on one, and left where it does not pay or differs."""

import time
from dataclasses import replace

import torch

from train.collate import MicroBatch
from train.engine.graph_shapes import pad
from train.engine.graphs import is_out_of_memory
from train.models.agreement import random_adapters, relative
from train.models.language_model import LanguageModel
from train.models.pass_graphs import PassGraphs
from train.models.sample_check import TOLERANCE
from train.models.shape import BROKEN, told

ENOUGH = 0.9  # of an eager pass's time at most; captures take some seconds in all
ROOM = 0.5  # of the memory at most: beside what graphs hold, a shape is warmed up eagerly before it is captured


def take_graphs(model: LanguageModel, batch: MicroBatch, limit: float) -> str:
    """Lets training passes run as graphs if those of `batch`, the longest, are faster and give the eager gradient.

    `limit` are the bytes that this process may have allocated. Gradients are zeroed. Returns what was found, in words.
    """
    decoder = model.reference
    ids = torch.randint(model.head.weight.shape[0], batch.input_ids.shape, generator=torch.Generator().manual_seed(0))
    other = replace(batch, input_ids=ids.to(batch.input_ids.device))  # than what is captured
    problem, seconds, eager_seconds = "", 0.0, 0.0
    with random_adapters(model):
        try:
            torch.cuda.reset_peak_memory_stats()
            wanted, eager_seconds = _gradient(model, pad(other))  # a graph computes the same products
            if torch.cuda.max_memory_allocated() > ROOM * limit:
                problem = f"they would hold more than {ROOM:.0%} of the memory"
            else:
                decoder.graphs = PassGraphs(decoder.eager, list(model.trainable().values()))
                model(batch).backward()
                found, seconds = _gradient(model, other)
                difference = relative(found, wanted)
                if not difference <= TOLERANCE[model.compute_dtype]:  # also NaN
                    problem = f"their gradients differ by {difference:.1%}"
                elif seconds > ENOUGH * eager_seconds:
                    problem = f"{seconds * 1e3:.0f} ms instead of {eager_seconds * 1e3:.0f}"
        except (*BROKEN, NotImplementedError, torch.OutOfMemoryError) as error:
            problem = "out of memory" if is_out_of_memory(error) else told(error)
    _zero_gradients(model)
    if problem:
        decoder.graphs = None
        torch.cuda.empty_cache()
        return f"no CUDA graphs ({problem})"
    return f"passes are CUDA graphs: {seconds * 1e3:.0f} ms instead of {eager_seconds * 1e3:.0f}, by trial"


def _gradient(model: LanguageModel, batch: MicroBatch) -> tuple[torch.Tensor, float]:
    """All gradients as one vector, and the seconds of the faster of two passes."""
    seconds = []
    for _ in range(2):
        _zero_gradients(model)
        torch.manual_seed(0)  # the same dropout
        torch.cuda.synchronize()
        start = time.perf_counter()
        model(batch).backward()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    gradients = [each.grad.flatten() for each in model.trainable().values() if each.grad is not None]
    return torch.cat(gradients).clone(), min(seconds)


def _zero_gradients(model: LanguageModel) -> None:
    for parameter in model.trainable().values():
        if parameter.grad is not None:
            parameter.grad.zero_()

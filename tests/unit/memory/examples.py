"""Models, lengths and a GPU that several tests plan with."""

from dataclasses import replace
from typing import Any

from train.batching import LengthStatistics
from train.config import BatchConfig, MemoryConfig
from train.engine.plan import Plan
from train.memory.candidate import Candidate, Job
from train.memory.gpus import Gpu, known_gpu
from train.memory.search import Planner
from train.memory.sizes import ModelSizes

GIB = 2**30
H200: Any = replace(known_gpu("H200"), has_graphs=True)  # type: ignore[type-var]
LLAMA_8B = ModelSizes(
    num_blocks=32,
    hidden=4096,
    qkv=6144,
    query=4096,
    intermediate=14336,
    gate_up=28672,
    norms_behind=0,
    copies_gradient=False,
    is_parallel=False,
    padded_rank=64,
    normed_qk=0,
    has_dropout=False,
    element_bytes=2,
    matrix_bytes=2 * 225_000_000,
    packed_bytes=112_500_000,
    norm_bytes=32 * 16384,
    embedding_bytes=1_050_673_152,
    embedding_on_host=True,
    head_bytes=1_050_673_152,
    chunk_bytes=2**28,
    vocabulary=128_256,
    adapter_bytes=8 * 41_943_040,
    paged_bytes=2 * 41_943_040,
)
SHORT = LengthStatistics(longest=(500, 900), mean_micro_batch=334, deviation=120, mean_length=167)
PACKED = LengthStatistics(longest=(2048, 4096, 6144, 8192), mean_micro_batch=8000, deviation=50, mean_length=2000)
LONG = LengthStatistics(longest=(2048,), mean_micro_batch=2000, deviation=50, mean_length=2000)


def planner_for(
    rows: LengthStatistics,
    batch: BatchConfig,
    memory: MemoryConfig | None = None,
    sizes: ModelSizes = LLAMA_8B,
    gpu: Gpu = H200,
) -> Planner:
    """Of an 8B on an H200, unless told otherwise."""
    return Planner(Job(sizes, rows, batch, gpu), memory or MemoryConfig())


def planned(rows: LengthStatistics, batch: BatchConfig, gib: float | None, memory: MemoryConfig | None = None) -> Plan:
    """The plan of an 8B on an H200 with a budget of `gib` GiB."""
    return planner_for(rows, batch, memory).best(None if gib is None else int(gib * GIB))


def first_candidate(planner: Planner, tokens: int, **changes: Any) -> Candidate:
    """Eager, nothing streamed or offloaded, one block kept; with `changes`."""
    return replace(next(iter(planner._candidates(True, tokens, 0))), **changes)

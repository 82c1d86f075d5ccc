"""What `handloop plan` predicts of a run on one GPU, on every known one, or on several, before a weight is read."""

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from train.batching import LengthStatistics
from train.commands.reference_choices import not_predicted
from train.config import Config, parse_bytes
from train.engine.plan import Plan, unshared
from train.layout import BatchLayout
from train.memory.candidate import Job
from train.memory.cluster import NETWORK_GBITS, Cluster, peer_bytes, reduction_seconds, ring_rate, sent_bytes
from train.memory.gpus import CONTEXT_BYTES, KNOWN_GPUS, Gpu, detect_gpu, gpus_like, gpus_of_size, named_gpu
from train.memory.outlook import GIB, Outlook
from train.run.devices import BF16, FP8, compute_type
from train.run.exits import ExitCode, ExitWith

PROCESS_BYTES = int(2.5 * GIB)  # host memory of a process that has imported torch, transformers and CUDA
# Where only a memory size is given: the rates of a small GPU. They decide what is given up first; no speed is told
SMALL_GPU_RATES = {"flops": 12e12, "fp32_flops": 4e12, "bandwidth": 160e9, "bus": 12e9}


@dataclass(frozen=True)
class Between:
    """What several GPUs send one another in a step, and what that costs."""

    cluster: Cluster
    added_bytes: int  # gradients that each GPU adds to those of the others
    sent_bytes: int  # what each sends of them
    rate: float  # bytes/s of the slowest link
    seconds: float  # all wait for it
    peer_bytes: int  # packed weights that each reads from the others
    num_groups: int  # of GPUs that share rows; without batch.context_parallel each GPU is one
    speedups: dict[float, float]  # of all groups over one with the same work, by Gbit/s between machines

    @classmethod
    def of(cls, job: Job, plan: Plan, cluster: Cluster) -> "Between":
        """Of a plan of the job for each GPU."""
        speedups, num_groups = {}, cluster.num_processes // job.batch.context_parallel
        for gbit in sorted({*NETWORK_GBITS, cluster.network_gbit}):
            waited = reduction_seconds(job, replace(cluster, network_gbit=gbit))
            speedups[gbit] = num_groups * plan.seconds / (plan.seconds + waited)
        return cls(
            cluster=cluster,
            added_bytes=job.sizes.gradient_bytes if cluster.num_processes > 1 else 0,
            sent_bytes=sent_bytes(job, cluster),
            rate=ring_rate(job, cluster),
            seconds=reduction_seconds(job, cluster),
            peer_bytes=peer_bytes(job, plan),
            num_groups=num_groups,
            speedups=speedups,
        )

    @property
    def speedup(self) -> float:
        """Of all groups over one with the same work."""
        return self.speedups[self.cluster.network_gbit]


@dataclass(frozen=True)
class Forecast:
    """What a run would need on a GPU, and do on so many of them."""

    gpu: Gpu
    budget: int  # bytes of GPU memory
    plan: Plan
    tokens_per_second: float | None  # None: it does not fit, or the GPU's rates are not known
    paged_bytes: int  # optimizer state that may move to host memory
    fits: bool
    advice: str  # what would fit; empty where the plan does
    between: Between  # what goes between its GPUs
    notes: tuple[str, ...] = ()  # what a run there may come upon
    step_seconds: float | None = None  # None: as tokens_per_second
    seconds: float | None = None  # of the whole run's steps; None: they, or the speed, are not known

    @property
    def cluster(self) -> Cluster:
        """The GPUs that it is for."""
        return self.between.cluster

    @property
    def is_card(self) -> bool:
        """Whether it is a known GPU, whose rates are known, and not a size."""
        return any(self.gpu.name == known.name for known in KNOWN_GPUS)

    def as_json(self) -> dict[str, Any]:
        """Plain numbers, memory in GiB."""
        return {
            "gpu": self.gpu.name,
            "num_gpus": self.cluster.num_gpus,
            "num_nodes": self.cluster.num_nodes,
            "network_gbit": self.cluster.network_gbit if self.cluster.num_nodes > 1 else None,
            "predicted_speedup": round(self.between.speedup, 3),
            "added_gib": round(self.between.added_bytes / GIB, 4),
            "sent_gib": round(self.between.sent_bytes / GIB, 4),
            "peers_gib": round(self.between.peer_bytes / GIB, 3),
            "predicted_step_seconds": self.step_seconds and round(self.step_seconds, 4),
            "budget_gib": round(self.budget / GIB, 3),
            "fits": self.fits,
            "predicted_peak_gib": round(self.plan.peak_bytes / GIB, 3),
            "predicted_tokens_per_second": self.tokens_per_second and round(self.tokens_per_second),
            "predicted_seconds": self.seconds and round(self.seconds, 3),
            "parts_gib": {name: round(num_bytes / GIB, 4) for name, num_bytes in self.plan.parts},
            "host_gib": round(self.plan.host_bytes / GIB, 3),
            "advice": self.advice,
            "notes": list(self.notes),
            "cards_of_this_size": [] if self.is_card else [gpu.name for gpu in gpus_of_size(self.gpu.memory_bytes)],
            "plan": {key: value for key, value in asdict(self.plan).items() if key != "parts"},
        }


def parse_gpu(text: str) -> Gpu:
    """The GPU that `--gpu` names: a known one, or one of a size such as 4GiB; raises ExitWith(BAD_INPUT) for others."""
    try:
        gpu = named_gpu(text) or _of_size(text)
    except ValueError:
        names, like = ", ".join(gpu.name for gpu in KNOWN_GPUS), " or ".join(gpu.name for gpu in gpus_like(text))
        hint = f"did you mean {like}? " if like else ""
        reason = f"--gpu {text}: {hint}write a size such as 4GiB, or one of {names}"
        raise ExitWith(ExitCode.BAD_INPUT, reason) from None
    if gpu.usable_bytes <= 0:
        raise ExitWith(ExitCode.BAD_INPUT, f"--gpu {text}: CUDA itself takes {CONTEXT_BYTES / GIB:.2f} GiB of a GPU")
    return gpu


def default_gpu(config: Config) -> Gpu | None:
    """The GPU that is here; without one, a GPU that leaves memory.budget free; without a budget, None."""
    if torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
        return detect_gpu(device, compute_type(config.model.dtype, device).dtype)
    if not config.memory.budget:
        return None
    gpu = _of_size(config.memory.budget)
    return replace(gpu, memory_bytes=gpu.memory_bytes + CONTEXT_BYTES)


def _of_size(text: str) -> Gpu:
    return Gpu(text, parse_bytes(text), FP8, **SMALL_GPU_RATES)  # one of a size has what options ask for


def assumed_lengths(config: Config, mean_length: int) -> LengthStatistics:
    """Rows of up to data.max_length tokens, their lengths spread evenly around the mean as a probe's are."""
    count, longest = config.batch.per_device, config.data.max_length
    deviation = (longest - min_length(longest, mean_length)) / math.sqrt(12)  # of a uniform distribution
    return LengthStatistics(
        longest=tuple(longest * n for n in range(1, count + 1)),
        mean_micro_batch=count * (longest if config.data.packing else mean_length),
        deviation=0.0 if config.data.packing else math.sqrt(count) * deviation,
        mean_length=mean_length,
        length_deviation=deviation,
        max_samples=count * (longest // mean_length if config.data.packing else 1),
    )


def min_length(longest: int, mean_length: int) -> int:
    """The shortest row where lengths are spread evenly around the mean; all rows have one length where both agree."""
    return max(2, 2 * mean_length - longest)


def forecast(config: Config, gpu: Gpu, rows: LengthStatistics, num_steps: float | None, cluster: Cluster) -> Forecast:
    """What a run of `num_steps` steps over these rows would need on each GPU.

    Raises ExitWith(BAD_INPUT) where the fused engine cannot run it.
    """
    budget = gpu.usable_bytes
    if config.memory.budget:
        budget = min(budget, parse_bytes(config.memory.budget))
    outlook = Outlook.on_gpu(config, gpu, rows, budget)
    outlook = outlook.on(cluster.num_processes, cluster.num_gpus, shares_host=cluster.num_gpus > 1)
    if outlook.planner is None:
        raise ExitWith(ExitCode.BAD_INPUT, not_predicted(outlook, gpu))
    plan = outlook.planner.best(budget)
    between = Between.of(outlook.planner.job, plan, cluster)
    seconds = plan.seconds + between.seconds
    fits = plan.peak_bytes <= budget
    has_rates = fits and any(gpu.name == known.name for known in KNOWN_GPUS)
    return Forecast(
        gpu=gpu,
        budget=budget,
        plan=plan,
        tokens_per_second=_step_tokens(config, rows, cluster) / seconds if has_rates else None,
        paged_bytes=outlook.planner.job.sizes.paged_bytes,
        fits=fits,
        advice="" if fits else outlook.remedies(plan),
        between=between,
        notes=_notes(config, gpu, plan),
        step_seconds=seconds if has_rates else None,
        seconds=num_steps * seconds if has_rates and num_steps is not None else None,
    )


def _step_tokens(config: Config, rows: LengthStatistics, cluster: Cluster) -> float:
    """Mean tokens of all processes in a step; where its samples do not divide evenly, the largest share decides how
    long it takes, and not how many there are."""
    layout = BatchLayout.of_first(config.batch, cluster.num_processes)
    return layout.samples_per_step * rows.mean_micro_batch / layout.per_device


def _notes(config: Config, gpu: Gpu, plan: Plan) -> tuple[str, ...]:
    """What of the GPU and the plan a user should know before renting so many."""
    notes = [unshared(plan, config.memory)]
    if config.memory.shard and gpu.no_peers:
        way = "where they cannot, a run with memory.shard is refused (78); without it weights are streamed as needed"
        notes.append(f"{gpu.no_peers}: {way}")
    if gpu.is_untried:
        notes.append(f"{gpu.name} is of the Blackwell generation, on which nothing here was ever tried")
    return tuple(filter(None, notes))


def forecast_known_gpus(
    config: Config, rows: LengthStatistics, num_steps: float | None, cluster: Cluster
) -> list[Forecast]:
    """For every known GPU that has the type and the products asked for; raises ExitWith(BAD_INPUT) as `forecast`."""
    wanted = FP8 if config.engine.products == "fp8" else BF16 if config.model.dtype == "bf16" else (0, 0)
    fitting = [gpu for gpu in KNOWN_GPUS if gpu.capability >= wanted]
    return [forecast(config, gpu, rows, num_steps, cluster) for gpu in fitting]

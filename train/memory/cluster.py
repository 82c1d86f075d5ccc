"""Machines with several GPUs each: what goes between GPUs in a step, and how long they wait for it.

Nothing of it was measured between machines. A ring through all GPUs adds the gradients, and its slowest link decides.
"""

from dataclasses import dataclass

from train.engine.plan import NUM_SLOTS, Plan
from train.engine.sharded_blocks import part_bytes
from train.memory.candidate import Job

NETWORK_GBITS = (10.0, 25.0, 100.0, 400.0)  # Gbit/s for which the plan of several machines is told; 400: InfiniBand
NETWORK_SHARE = 0.8  # of a network's rate that a ring gets; the rest are headers and waiting (an estimate)


@dataclass(frozen=True)
class Cluster:
    """So many GPUs on each of so many machines; a process for each."""

    num_gpus: int  # of a machine
    num_nodes: int
    network_gbit: float  # Gbit/s of a machine's network, in each direction

    @property
    def num_processes(self) -> int:
        """Of all machines."""
        return self.num_gpus * self.num_nodes

    def __str__(self) -> str:
        if self.num_processes == 1:
            return "one GPU"
        if self.num_nodes == 1:
            return f"{self.num_gpus} GPUs"
        return f"{self.num_processes} GPUs ({self.num_gpus} on each of {self.num_nodes} machines)"


def sent_bytes(job: Job, cluster: Cluster) -> int:
    """What each GPU sends, and receives, of gradients in a step: 2 (P - 1) / P of them on P GPUs."""
    return 2 * (cluster.num_processes - 1) * job.sizes.gradient_bytes // cluster.num_processes


def ring_rate(job: Job, cluster: Cluster) -> float:
    """Bytes/s of the slowest link that gradients go over: NVLink or PCIe within a machine, the network between."""
    links = [job.gpu.link] if cluster.num_gpus > 1 else []
    links += [NETWORK_SHARE * cluster.network_gbit * 1e9 / 8] if cluster.num_nodes > 1 else []
    return min(links, default=job.gpu.link)


def reduction_seconds(job: Job, cluster: Cluster) -> float:
    """How long all wait once a step, after the last micro-batch, for their gradients to be added."""
    return sent_bytes(job, cluster) / ring_rate(job, cluster)


def num_micro_batches(job: Job, plan: Plan) -> float:
    """Expected, of a GPU's part of a step."""
    accumulation = job.batch.accumulation
    return job.rows.num_micro_batches(accumulation, plan.micro_batch_tokens) if plan.merges else float(accumulation)


def peer_bytes(job: Job, plan: Plan) -> int:
    """What each GPU reads from the others in a step, of packed weights that are shared out: their parts of every block,
    forward and backward, but for those that are in a slot when the pass turns round, or cached."""
    if plan.num_shards == 1:
        return 0
    blocks = plan.num_blocks - len(plan.streamed) - plan.num_cached
    of_others = (plan.num_shards - 1) * part_bytes(job.sizes.largest_packed, plan.num_shards)
    return int(num_micro_batches(job, plan) * (2 * blocks - min(NUM_SLOTS, blocks)) * of_others)

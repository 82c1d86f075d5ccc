"""The plan: tries the combinations of what can be chosen, and takes the fastest that fits the memory budget.

Each way to save memory costs time: smaller micro-batches read the weights more often, recomputed blocks cost a third
more, weights and block inputs in host memory need the bus. cost.py predicts the bytes of a candidate, time.py its
seconds.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product

from train.batching import LengthStatistics, MicroBatchShape
from train.collate import MAX_PADDING
from train.config import MemoryConfig
from train.engine.plan import GRAPH_STEP, NUM_SLOTS, Plan, padded, part_tokens, spread
from train.memory import cost
from train.memory.candidate import Candidate, Job
from train.memory.time import step_seconds

# Share of the budget that is planned with. The rest is for the allocator's waste and for the prediction's error, which
# was -1.4 to +5.8 % in 18 measured cases (docs/LOG.md)
MARGIN = 0.92
MIN_GAIN = 0.02  # share of a step's time by which using host memory must be faster: predictions are no more exact
MLP_TILE = 1024  # tokens of a tile, where the MLP's activations of all tokens do not fit at once
MAX_MERGED_TOKENS = 16384  # matrix products are not faster beyond
# Hosts differ: some take twice as long to launch kernels as the one that was measured, for which steps are predicted.
# A graph, whose capture takes time, must be faster by a share of a step here, or there and MIN_GAIN slower here at most
SLOW_HOST, MIN_GRAPH_GAIN = 2, 0.01
SHORT_GRAPH = 4096  # tokens, up to which attention in a graph may as well be launched for a sample that has them all
ROW_STEP = 64  # tokens; the longest row that fits is told as a multiple of it


@dataclass(frozen=True)
class Planner:
    """Chooses the plan of one job, as far as the user's settings leave a choice."""

    job: Job
    memory: MemoryConfig

    def best(self, budget: int | None, saved: MicroBatchShape | None = None, min_streamed: int = 0) -> Plan:
        """The fastest plan whose peak fits in `budget` bytes; None is no limit.

        Without a limit blocks are streamed only where memory.offload or `min_streamed` asks for it.
        Where nothing fits, MLPs run in tiles; where nothing fits even so, the smallest plan: its peak tells what is
        missing. A resumed run gives the shape that it was `saved` with, which is kept. `min_streamed` blocks are in
        host memory already and stay there.
        """

        def fitting(tile: int) -> tuple[list[Candidate], list[Candidate]]:
            found = self._candidates(budget is not None, saved.tokens if saved else 0, min_streamed)
            tried = [self._filled(replace(candidate, mlp_tile=tile), budget) for candidate in found]
            return [candidate for candidate in tried if self._fits(candidate, budget)], tried

        fits, tried = fitting(saved.mlp_tile if saved else 0)
        if not fits and saved is None and self.job.sizes.mixture is None:  # whose rows are not tiled
            fits, tried = fitting(MLP_TILE)
        if not fits:
            smallest = min(tried, key=lambda each: cost.peak(self.job, each))
            return plan_of(self.job, smallest, budget is not None, needs_host=True)
        fastest = self._fastest(fits)
        needs_host = all(each.uses_host for each in fits) and self.memory.offload == "auto"
        return plan_of(self.job, fastest, budget is not None, needs_host)

    def _fastest(self, fits: list[Candidate]) -> Candidate:
        """By this host's seconds; a graph in its place that is about as fast, if others would launch too slowly."""
        slow, limit = replace(self.job, gpu=replace(self.job.gpu, launch_time=SLOW_HOST)), 1 + MIN_GRAPH_GAIN

        def seconds(c: Candidate, job: Job = self.job) -> float:
            return step_seconds(job, c) * (1 + MIN_GAIN * c.uses_host)

        fastest = min(fits, key=lambda each: seconds(each) * (limit if each.uses_graphs else 1))
        graphs = [each for each in fits if each.uses_graphs and seconds(each) <= seconds(fastest) * (1 + MIN_GAIN)]
        graph = min(graphs, key=seconds, default=fastest)
        return graph if seconds(graph, slow) * limit < seconds(fastest, slow) else fastest

    def longest_row(self, budget: int) -> int:
        """Tokens of the longest single row that can be trained in `budget` bytes, in steps of ROW_STEP; 0: none."""

        def fits(steps: int) -> bool:
            length = ROW_STEP * steps
            batch = replace(self.job.batch, per_device=1)
            job = replace(self.job, rows=LengthStatistics((length,), length, 0.0, length), batch=batch)
            return replace(self, job=job).best(budget).peak_bytes <= budget

        rows = self.job.rows
        return ROW_STEP * _largest(0, (max(rows.longest[0], rows.longest_validation) - 1) // ROW_STEP, fits)

    def _fits(self, candidate: Candidate, budget: int | None) -> bool:
        if budget is None:
            return True
        fits_gpu = cost.peak(self.job, candidate) <= budget * MARGIN
        return fits_gpu and cost.host_bytes(self.job, candidate) <= self.job.gpu.max_host_bytes

    def _candidates(self, has_limit: bool, saved_tokens: int, min_streamed: int) -> Iterator[Candidate]:
        """Every micro-batch with every number of streamed blocks, and block inputs on the GPU or offloaded."""
        blocks, offload = self.job.sizes.num_blocks, self.memory.offload
        counts = [blocks] if offload == "stream" else [min_streamed]
        if offload == "auto" and has_limit:
            counts = list(range(min_streamed, blocks + 1))
        can_offload = (False, True) if has_limit and offload != "none" else (False,)
        rows, accumulation, merges = self.job.rows, self.job.batch.accumulation, self.job.batch.merge == "auto"
        num_parts = self.job.batch.context_parallel
        for tokens, uses_graphs in self._micro_batches(saved_tokens):
            number = rows.num_micro_batches(accumulation, tokens) if merges else float(accumulation)
            mean = accumulation * rows.mean_micro_batch / number / num_parts
            for count, offloads in product(counts, can_offload):
                yield Candidate(tokens, number, mean, count, offloads, uses_graphs, num_parts=num_parts)

    def _micro_batches(self, saved_tokens: int) -> Iterator[tuple[int, bool]]:
        """(tokens, whether it runs as a CUDA graph) of a micro-batch: as configured, merged, or split into fewer rows.

        A graph pads it, so it may as well hold as many tokens as it then has, or one step of padding fewer.
        """
        rows = self.job.rows
        is_given = saved_tokens > 0 or self.job.batch.merge == "off"
        sizes = {saved_tokens or rows.merged_tokens(1)}
        if not is_given:
            merged = (rows.merged_tokens(count) for count in range(2, self.job.batch.accumulation + 1))
            most = MAX_MERGED_TOKENS * self.job.batch.context_parallel
            sizes |= {*rows.longest, *(tokens for tokens in merged if tokens <= most)}
        yield from ((tokens, False) for tokens in sorted(sizes))
        # the work of linear attention and of wide heads depends on each sample's length; an exchange is not captured
        is_fixed = not self.job.sizes.linear and not self.job.sizes.is_wide and self.job.batch.context_parallel == 1
        if self.job.gpu.has_graphs and is_fixed:
            if not is_given:
                wide = {padded(tokens) - less for tokens in sizes for less in (0, GRAPH_STEP)}
                sizes = {tokens for tokens in wide if tokens >= rows.longest[0]}
            # cuDNN's attention, for samples of one length, is not captured, and faster than what is
            is_uniform = rows.longest[0] <= (1 + MAX_PADDING) * rows.mean_length and self.job.sizes.mixture is None
            longest = SHORT_GRAPH if is_uniform else MAX_MERGED_TOKENS
            yield from ((tokens, True) for tokens in sorted(sizes) if tokens <= longest)

    def _filled(self, candidate: Candidate, budget: int | None) -> Candidate:
        """The candidate with as many blocks kept, and then weights cached, as there is room for.

        Kept activations win more time for their memory than cached weights, so those come last.
        """
        room = None if budget is None else int(budget * MARGIN)
        candidate = replace(candidate, num_kept=self._num_kept(candidate, room))
        num_blocks = self.job.sizes.num_blocks
        if room is None or candidate.num_kept < num_blocks or candidate.num_streamed:
            return candidate
        left = (room - cost.peak(self.job, candidate)) // self.job.sizes.matrix_bytes
        return replace(candidate, num_cached=max(0, min(num_blocks, left)))

    def _num_kept(self, candidate: Candidate, room: int | None) -> int:
        """Blocks that keep their activations: as `memory.checkpointing` says, or as many as fit; at least one."""
        blocks, wanted = self.job.sizes.num_blocks, self.memory.checkpointing
        if wanted == "auto":
            if room is None:
                return blocks

            def fits(count: int) -> bool:
                return cost.peak(self.job, replace(candidate, num_kept=count)) <= room

            return _largest(1, blocks, fits) if fits(1) else 1  # most of what is tried does not fit at all
        if wanted == "full":
            return 1
        return blocks if wanted == "none" else max(1, blocks - int(wanted))


def _largest(low: int, high: int, fits: Callable[[int], bool]) -> int:
    """The largest number from `low` to `high` that fits, where less fits too; `low` is not asked about."""
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low


def plan_of(job: Job, candidate: Candidate, has_limit: bool, needs_host: bool) -> Plan:
    """The plan that executes the candidate, with what is predicted of it; no memory without a limit."""
    s, longest = job.sizes, max(candidate.width, part_tokens(job.rows.longest_validation, candidate.num_parts))
    streamed = spread(candidate.num_streamed, s.num_blocks)
    return Plan(
        is_fused=True,
        merges=job.batch.merge == "auto",
        micro_batch_tokens=candidate.tokens,
        num_blocks=s.num_blocks,
        num_kept=candidate.num_kept,
        num_cached=candidate.num_cached,
        products="fp8" if s.in_fp8 else "bf16",
        streamed=streamed,
        num_parts=candidate.num_parts,
        num_shards=job.num_shards,
        num_sharing=job.num_sharing,
        needs_host=needs_host,
        offloads_inputs=candidate.offloads and candidate.num_kept < s.num_blocks,
        uses_graphs=candidate.uses_graphs,
        num_linear=s.num_linear(range(s.num_blocks)),
        mlp_tile=candidate.mlp_tile if candidate.mlp_tile < longest else 0,
        num_samples=job.num_samples(candidate.tokens),
        longest_sample=padded(job.rows.longest[0]) if candidate.uses_graphs and candidate.width > SHORT_GRAPH else 0,
        graph_bytes=cost.graph_bytes(job, candidate),
        fragmentation_bytes=cost.fragmentation_bytes(job, candidate),
        eager_bytes=cost.eager_bytes(job, candidate),
        validation_tokens=cost.validation_tokens(job, candidate),
        parts=tuple(cost.parts(job, candidate).items()) if has_limit else (),
        host_bytes=cost.host_bytes(job, candidate) if has_limit else 0,
        seconds=step_seconds(job, candidate),
        # blocks that are in a slot when the pass turns round are not copied again
        traffic_bytes=(2 * len(streamed) - min(NUM_SLOTS, len(streamed))) * s.largest_packed,
    )

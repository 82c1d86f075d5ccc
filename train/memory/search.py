"""What fits: where weights, activations and inputs of blocks are, and how many tokens one pass holds, from sizes alone.

One budget decides. Each way to save memory costs time: smaller passes read the weights more often, blocks that are
computed again cost a third more, weights and block inputs in host memory cost the bus. Planner tries the
combinations and takes the fastest that fits.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from train.batching import LengthStatistics, MicroBatchShape
from train.config import BatchConfig, MemoryConfig
from train.engine.copies import host_bytes
from train.engine.plan import GRAPH_STEP, NUM_SLOTS, Plan, padded, spread
from train.memory.gpus import Gpu
from train.memory.sizes import ModelSizes
from train.run.devices import FLASH, TRITON

MARGIN = 0.92  # of the budget is planned with; the rest is the allocator's waste
SMALL_TENSOR = 2**20  # bytes, up to which the allocator takes a tensor from segments for small ones
CUBLAS_BYTES = 2**26  # workspaces of cuBLAS
LATENCY_TOKENS = 155  # more than a pass has are as long as it takes: short products are less efficient (measured)
WORTH = 0.02  # of a step's time must be won by what uses host memory
INPUTS_IN_FLIGHT = 3  # block inputs on the device that are on their way to the host or back
MLP_TILE = 1024  # tokens that go through an MLP together, where its activations must not all stand at once
MOST_MERGED = 16384  # products are not faster beyond
GRAPH_TOKENS = 4096  # passes of so many tokens at most run as CUDA graphs, where that is faster: their memory is theirs
GRAPH_BORDERS = 8  # samples of no tokens that a recorded pass may have beside its own (engine.graphs.pad)
# Seconds in which a host launches the kernels of one block (measured: 272 ms for 32, with what is computed again)
LAUNCH_FORWARD, LAUNCH_BACKWARD = 0.0024, 0.0037
ELEMENTWISE = 9  # times a block's activations are read or written by what lies between its products
STREAMING, OFFLOADING = 0.02, 0.01  # copies beside the computation slow it (measured: 1.9 % with all blocks)
SMALL_KERNELS = 0.0004  # seconds a block and pass in which a recorded graph's kernels are too small for the card


@dataclass(frozen=True)
class _Choice:
    """One combination of what can be chosen."""

    tokens: int
    num_micro_batches: float
    mean_tokens: float
    num_streamed: int
    offloads: bool
    graphs: bool
    tile: int = 0
    num_kept: int = 1
    num_cached: int = 0

    @property
    def uses_host(self) -> bool:
        """Whether anything goes to host memory and back in a pass."""
        return self.offloads or self.num_streamed > 0

    @property
    def width(self) -> int:
        """Tokens that the longest pass has on the device."""
        return padded(self.tokens) if self.graphs else self.tokens

    @property
    def is_tiled(self) -> bool:
        """Whether the longest pass goes through an MLP in more than one tile."""
        return 0 < self.tile < self.tokens


class Planner:
    """Chooses for one model, data and card."""

    def __init__(
        self, sizes: ModelSizes, rows: LengthStatistics, batch: BatchConfig, memory: MemoryConfig, card: Gpu
    ) -> None:
        self.host_room = card.host_bytes
        self.sizes = sizes
        self.rows = rows
        self.batch = batch
        self.memory = memory
        self.card = card

    def best(self, budget: int | None, saved: MicroBatchShape | None = None, least_streamed: int = 0) -> Plan:
        """The fastest plan whose peak fits into `budget` bytes (None: there is no limit, and nothing to stream for).

        MLPs take their tokens in tiles only where nothing fits without. Where nothing fits at all, the smallest: its
        peak tells what is missing. A run that is resumed gives the passes that it was started with. Blocks that are in
        host memory already stay there.
        """

        def filled(tile: int) -> list[_Choice]:
            choices = self._choices(budget is not None, saved.tokens if saved else 0, least_streamed)
            return [self._filled(replace(choice, tile=tile), budget) for choice in choices]

        choices = filled(saved.mlp_tile if saved else 0)
        if saved is None and not any(self._fits(choice, budget) for choice in choices):
            choices = filled(MLP_TILE)
        fitting = [choice for choice in choices if self._fits(choice, budget)]
        if not fitting:
            return self._plan(min(choices, key=self.peak), budget is not None, needs_host=True)
        # streaming must be worth it: the model of time is not so exact
        chosen = min(fitting, key=lambda choice: self.seconds(choice) * (1 + WORTH * choice.uses_host))
        needs_host = all(choice.uses_host for choice in fitting) and self.memory.offload == "auto"
        return self._plan(chosen, budget is not None, needs_host)

    def _fits(self, choice: _Choice, budget: int | None) -> bool:
        if budget is None:
            return True
        return self.peak(choice) <= budget * MARGIN and self.host_bytes(choice) <= self.host_room

    def longest_row(self, budget: int) -> int:
        """Tokens of the longest single row that could be trained in `budget` bytes, in steps of 64; 0 for none."""
        low, high = 0, (max(self.rows.longest[0], self.rows.longest_validation) - 1) // 64
        while low < high:
            middle = (low + high + 1) // 2
            shorter = LengthStatistics((64 * middle,), 64 * middle, 0.0, 64 * middle)
            planner = Planner(self.sizes, shorter, replace(self.batch, per_device=1), self.memory, self.card)
            fits = planner.best(budget).peak_bytes <= budget
            low, high = (middle, high) if fits else (low, middle - 1)
        return 64 * low

    def _choices(self, has_limit: bool, saved_tokens: int, least_streamed: int) -> Iterator[_Choice]:
        blocks = self.sizes.num_blocks
        counts = [blocks] if self.memory.offload == "stream" else [least_streamed]
        if self.memory.offload == "auto" and has_limit:
            counts = list(range(least_streamed, blocks + 1))
        can_offload = (False, True) if has_limit and self.memory.offload != "none" else (False,)
        accumulation, is_cut = self.batch.accumulation, self.batch.merge == "auto"
        for tokens, graphs in self._sizes(saved_tokens):
            num_micro_batches = self.rows.num_micro_batches(accumulation, tokens) if is_cut else float(accumulation)
            mean = accumulation * self.rows.mean_micro_batch / num_micro_batches
            for count, offloads in product(counts, can_offload):
                yield _Choice(tokens, num_micro_batches, mean, count, offloads, graphs)

    def _sizes(self, saved_tokens: int) -> Iterator[tuple[int, bool]]:
        """(tokens, whether recorded) of a pass: as it is written, several put together, or one cut into fewer rows.

        A recorded one is padded, so it holds as many tokens as it then has, or a step of padding fewer.
        """
        rows = self.rows
        is_given = saved_tokens > 0 or self.batch.merge == "off"
        sizes = {saved_tokens or rows.tokens(1)}
        if not is_given:
            merged = (rows.tokens(count) for count in range(2, self.batch.accumulation + 1))
            sizes |= {*rows.longest, *(tokens for tokens in merged if tokens <= MOST_MERGED)}
        yield from ((tokens, False) for tokens in sorted(sizes))
        if self.card.has_graphs:
            if not is_given:
                wide = {padded(tokens) - less for tokens in sizes for less in (0, GRAPH_STEP)}
                sizes = {tokens for tokens in wide if tokens >= rows.longest[0]}
            yield from ((tokens, True) for tokens in sorted(sizes) if tokens <= GRAPH_TOKENS)

    def _filled(self, choice: _Choice, budget: int | None) -> _Choice:
        """The choice with as many blocks kept, and weights cached, as there is room for."""
        room = None if budget is None else int(budget * MARGIN)
        blocks, wanted = self.sizes.num_blocks, self.memory.checkpointing
        fixed = {"full": 1, "none": blocks}.get(str(wanted))
        if fixed is None and wanted != "auto":
            fixed = max(1, blocks - int(wanted))
        if fixed is not None:
            choice = replace(choice, num_kept=fixed)
        elif room is None:
            choice = replace(choice, num_kept=blocks)
        else:
            low, high = 1, blocks  # the peak does not fall when more are kept
            while low < high:
                middle = (low + high + 1) // 2
                fits = self.peak(replace(choice, num_kept=middle)) <= room
                low, high = (middle, high) if fits else (low, middle - 1)
            choice = replace(choice, num_kept=low)
        # weights give less for their memory than activations, so they are kept only where all of those are
        if room is None or choice.num_kept < blocks or choice.num_streamed:
            return choice
        spare = room - self.peak(choice)
        return replace(choice, num_cached=max(0, min(blocks, spare // self.sizes.matrix_bytes)))

    def peak(self, choice: _Choice) -> int:
        """Bytes on the device at the worst moment."""
        return sum(self.parts(choice).values())

    def parts(self, choice: _Choice) -> dict[str, int]:
        """The same by component."""
        parts = self._largest_pass(choice)
        gaps = self._gaps(choice, parts) if self.rows.length_deviation else 0
        return {**parts, "gaps between graphs": gaps}

    def _graph_bytes(self, choice: _Choice, parts: dict[str, int]) -> int:
        in_pass = ("inputs of blocks", "kept activations", "working memory")
        return sum(parts[name] for name in in_pass) - self._launched(choice) if choice.graphs else 0

    def _gaps(self, choice: _Choice, parts: dict[str, int]) -> int:
        """A shorter pass finds room in the largest one's memory, but for tensors that are small in it alone.

        Counted as if all were as wide as a hidden state; some are twice as wide, so it is the upper end.
        """
        small_tokens = SMALL_TENSOR // (self.sizes.hidden * self.sizes.element_bytes)
        if choice.width <= small_tokens:
            return 0
        return self._graph_bytes(choice, parts) * small_tokens // choice.width

    def _largest_pass(self, choice: _Choice) -> dict[str, int]:
        """Bytes by component while the largest pass goes through the fused engine.

        The worst moment is the head, or the backward pass of the last block, while all that is kept stands, or a
        validation's sample that is much longer than what is trained on. Terms follow engine.block.Activations and
        Block.backward.
        """
        s, tokens = self.sizes, choice.width
        recomputed = s.num_blocks - choice.num_kept
        wide, element = s.hidden + s.extra, s.element_bytes
        inputs = choice.num_kept + min(INPUTS_IN_FLIGHT, recomputed) if choice.offloads else s.num_blocks
        gate_up, product = 2 * s.inner + s.extra, (1 + s.has_dropout) * s.inner
        whole = 0 if choice.is_tiled else gate_up  # what is kept of it
        activations = element * (2 * wide + s.heads + s.normed_qk + s.query + s.hidden + 2 * s.extra + whole)
        activations += 4 * (s.query + s.normed_qk) // 64 + 8  # attention's log sums and the norms' scales, fp32
        if not gpu_has_flash(self.card, element):  # keys and values of all heads, and each sample's output, are kept
            activations += element * 3 * s.query
        # beside the gradients of the stack's output and of the block's: in the MLP that of its norm's output, and the
        # product (with dropout twice); in attention, where what the MLP has kept is gone, the gradients of its output,
        # of its inputs, and of keys and values of all heads; its dQ is fp32, with 128 rows more for each sample
        num_dq = tokens + 128 * (self._num_samples(tokens) + GRAPH_BORDERS * choice.graphs)
        in_mlp = tokens * s.hidden + (choice.tile * (gate_up + product) if choice.is_tiled else tokens * product)
        in_attention = tokens * (3 * s.query + s.heads - wide - s.hidden - whole) + num_dq * s.query * 4 // element
        backward = element * (tokens * (wide + s.hidden) + max(in_mlp, in_attention))
        in_blocks = tokens * element * (inputs * s.hidden + s.num_blocks * s.extra)
        kept = tokens * choice.num_kept * activations
        if choice.graphs:  # what a graph uses, nothing else can
            working = self._launched(choice) + backward
        else:  # all that is kept is gone while a sample is validated
            validating = self._validating(self.rows.longest_validation, choice.tile) - in_blocks - kept
            working = max(self._head_bytes(tokens), backward, validating)
        return {
            "packed weights": (s.num_blocks - choice.num_streamed) * s.packed_bytes + s.norm_bytes,
            "slots for streamed weights": min(NUM_SLOTS, choice.num_streamed) * s.packed_bytes,
            "dequantised weights": min(choice.num_cached + 1, s.num_blocks) * s.matrix_bytes,
            "head": s.head_bytes,
            "embedding": 0 if s.embedding_on_host else s.embedding_bytes,
            "adapters, gradients, optimizer": s.adapter_bytes,
            "inputs of blocks": in_blocks,
            "kept activations": kept,
            "working memory": working + CUBLAS_BYTES + self._without_triton(),
            "places of graphs": tokens * element * 4 * s.hidden if choice.graphs else 0,
        }

    def _without_triton(self) -> int:
        """What torch's operations take where our kernels take nothing: a whole weight, and fp32 copies of logits."""
        s = self.sizes
        if self.card.capability >= TRITON or not self.card.memory_bytes:
            return 0
        return s.element_bytes * s.hidden * s.inner + (4 * s.chunk_bytes if s.element_bytes == 2 else 0)

    def _num_samples(self, tokens: int) -> int:
        return self.rows.samples(1 if self.batch.merge == "off" else self.batch.accumulation, tokens)

    def _launched(self, choice: _Choice) -> int:
        """What is launched where passes are recorded: the head, and a block at a time of a validation."""
        return max(self._head_bytes(choice.width), self._validating(self._launched_tokens(choice.width), choice.tile))

    def _launched_tokens(self, tokens: int) -> int:
        """Of a validation's passes beside graphs: as many as the head's memory is enough for, or the longest sample."""
        usual = min(tokens, max(self.rows.longest[0], self._head_bytes(tokens) // self._validated_bytes()))
        return max(usual, self.rows.longest_validation)

    def _validating(self, tokens: int, tile: int) -> int:
        """Bytes while so many are validated in one pass, `tile` of them at a time in an MLP (0: all)."""
        spared = max(0, tokens - tile) * 3 * self.sizes.inner * self.sizes.element_bytes if tile else 0
        return max(self._head_bytes(tokens), tokens * self._validated_bytes() - spared) if tokens else 0

    def _validated_bytes(self) -> int:
        """What a token takes in a block of which nothing is kept."""
        s = self.sizes
        block = 4 * s.hidden + 4 * s.extra + s.heads + s.normed_qk + 2 * s.query + 3 * s.inner
        return s.element_bytes * (2 * s.hidden + block)

    def _head_bytes(self, tokens: int) -> int:
        """What the head works with."""
        s = self.sizes
        chunk = min(s.chunk_bytes, tokens * s.vocabulary * s.element_bytes)
        return tokens * s.element_bytes * 3 * s.hidden + chunk

    def host_bytes(self, choice: _Choice) -> int:
        """Page-locked host memory."""
        s = self.sizes
        total = host_bytes(s.packed_bytes, choice.num_streamed)
        if s.embedding_on_host:
            total += host_bytes(s.embedding_bytes, 1)
        if choice.offloads:
            total += host_bytes(padded(choice.tokens) * s.hidden * s.element_bytes, s.num_blocks - choice.num_kept)
        return total

    def seconds(self, choice: _Choice) -> float:
        """Of an optimizer step: what is slower, the card, the bus or the host, forward and backward."""
        s, card, tokens = self.sizes, self.card, choice.mean_tokens
        weights = s.matrix_bytes / s.element_bytes
        attention = 2 * s.query * self.rows.mean_length  # causal, a token
        moved = ELEMENTWISE * s.element_bytes * (3 * s.hidden + s.heads + s.query + 2 * s.inner) * tokens / 3
        dequantise = (s.matrix_bytes + s.packed_bytes) * (1 - choice.num_cached / s.num_blocks)
        memory = (moved + dequantise) / card.bandwidth + SMALL_KERNELS / 2
        rate = card.flops / (tokens + LATENCY_TOKENS)
        forward = (2 * weights + attention) / rate + memory
        backward = (2 * weights + 2.5 * attention) / rate + 2 * moved / card.bandwidth + memory
        again = (2 * (weights - s.hidden * s.inner) + attention) / rate + moved / card.bandwidth
        if choice.is_tiled:  # kept blocks compute gate and up again
            backward += choice.num_kept / s.num_blocks * 4 * s.hidden * s.inner / rate
        recomputed = (s.num_blocks - choice.num_kept) / s.num_blocks
        launches = (LAUNCH_FORWARD, LAUNCH_BACKWARD + LAUNCH_FORWARD * recomputed)
        if choice.graphs:
            launches = (0.0, 0.0)
        block_input = recomputed * tokens * s.element_bytes * s.hidden / card.bus if choice.offloads else 0.0
        bus = choice.num_streamed / s.num_blocks * s.packed_bytes / card.bus
        one_way = max(forward, launches[0], bus, block_input)
        other_way = max(backward + recomputed * again, launches[1], bus + block_input)
        head = 4 * s.head_bytes / s.element_bytes / rate
        beside = 1 + STREAMING * choice.num_streamed / s.num_blocks + OFFLOADING * choice.offloads
        return choice.num_micro_batches * (s.num_blocks * (one_way + other_way) * beside + head)

    def _plan(self, choice: _Choice, has_limit: bool, needs_host: bool) -> Plan:
        s, parts = self.sizes, self.parts(choice)
        streamed = spread(choice.num_streamed, s.num_blocks)
        recomputed = s.num_blocks - choice.num_kept
        return Plan(
            is_fused=True,
            merges=self.batch.merge == "auto",
            micro_batch_tokens=choice.tokens,
            num_blocks=s.num_blocks,
            num_kept=choice.num_kept,
            num_cached=choice.num_cached,
            streamed=streamed,
            needs_host=needs_host,
            offloads_inputs=choice.offloads and recomputed > 0,
            uses_graphs=choice.graphs,
            mlp_tile=choice.tile if choice.tile < max(choice.tokens, self.rows.longest_validation) else 0,
            num_samples=self._num_samples(choice.tokens),
            graph_bytes=self._graph_bytes(choice, parts),
            fragmentation_bytes=self._gaps(choice, parts),
            eager_bytes=self._launched(choice) if choice.graphs else 0,
            validation_tokens=self._launched_tokens(choice.width) if choice.graphs else 0,
            parts=tuple(parts.items()) if has_limit else (),
            host_bytes=self.host_bytes(choice) if has_limit else 0,
            seconds=self.seconds(choice),
            traffic_bytes=(2 * len(streamed) - min(NUM_SLOTS, len(streamed))) * s.packed_bytes,
        )


def gpu_has_flash(card: Gpu, element_bytes: int) -> bool:
    """Whether attention takes grouped heads as they are and keeps nothing but its output."""
    return card.capability >= FLASH and element_bytes == 2

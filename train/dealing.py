"""A step's rows dealt to the processes by their cost, so that none waits for another; by lengths alone.

Every process computes the whole deal, which is the same everywhere, and takes its own part of it.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from train.batching import collated_tokens

Samples = list[int]  # sample numbers


@dataclass(frozen=True)
class Limits:
    """What a micro-batch holds at most."""

    tokens: int  # as collated
    samples: int
    is_padded: bool

    def hold(self, lengths: Sequence[int]) -> bool:
        """Whether samples of these lengths may share a micro-batch."""
        return len(lengths) <= self.samples and collated_tokens(lengths, self.is_padded) <= self.tokens


def cost(lengths: Sequence[int], pair_cost: float) -> float:
    """What samples cost, in tokens: attention's products, quadratic in the length, are `pair_cost` for a token pair."""
    return sum(length * (1 + pair_cost * length) for length in lengths)


def deal(
    rows: Sequence[Samples], num_tokens: Sequence[int], num_processes: int, limits: Limits, pair_cost: float
) -> list[list[Samples]]:
    """For each process the sample numbers of its micro-batches, equally many in all processes; some may be empty.

    A row that `limits` do not hold is dealt by samples, and a sample that they do not hold stays alone.
    """
    units = []
    for row in rows:
        is_held = limits.hold([num_tokens[i] for i in row])
        units += [row] if is_held else [[i] for i in row]
    costs = [cost([num_tokens[i] for i in unit], pair_cost) for unit in units]
    shares = [[units[number] for number in share] for share in spread(costs, num_processes)]
    for count in range(1, len(units) + 1):
        found = [_micro_batches(share, num_tokens, count, limits) for share in shares]
        if all(found):
            return found
    raise AssertionError("a micro-batch for each unit holds them all")


def spread(costs: Sequence[float], num_shares: int) -> list[list[int]]:
    """The numbers of `costs` in `num_shares` shares of about equal sums, each share in order.

    The largest differencing method (Karmarkar & Karp 1982): every cost begins as a partition of its own, and the two
    whose shares differ most are joined, the large shares of one with the small ones of the other, until one is left.
    Of 32 questions and answers (GSM8K) on four processes the largest share exceeds the mean by 0.3 %; 1.0 % where each
    goes to the process with the least so far.
    """
    nothing = [(0.0, []) for _ in range(num_shares - 1)]
    heap: list[tuple[float, int, list[tuple[float, list[int]]]]] = [
        (-each, number, [*nothing, (each, [number])]) for number, each in enumerate(costs)
    ]  # how far the shares differ, a number that decides between equals, shares by their sums
    heapq.heapify(heap)
    for number in range(len(costs), 2 * len(costs) - 1):
        (_, _, one), (_, _, other) = heapq.heappop(heap), heapq.heappop(heap)
        joined = [(a + b, left + right) for (a, left), (b, right) in zip(one, reversed(other), strict=True)]
        joined.sort(key=lambda share: share[0])
        # what all shares have makes no difference
        heapq.heappush(heap, (joined[0][0] - joined[-1][0], number, joined))
    return [sorted(numbers) for _, numbers in heap[0][2]]


def _micro_batches(share: Sequence[Samples], num_tokens: Sequence[int], count: int, limits: Limits) -> list[Samples]:
    """`count` micro-batches of about as many tokens each, in the order of the share; none where it does not fit."""
    lengths = [[num_tokens[i] for i in unit] for unit in share]
    held: list[list[int]] = [[] for _ in range(count)]  # unit numbers
    merged: list[list[int]] = [[] for _ in range(count)]  # their samples' lengths
    for number in sorted(range(len(share)), key=lambda number: -sum(lengths[number])):
        for place in sorted(range(count), key=lambda place: sum(merged[place])):
            if not held[place] or limits.hold(merged[place] + lengths[number]):
                held[place].append(number)
                merged[place] += lengths[number]
                break
        else:
            return []
    return [[i for number in sorted(numbers) for i in share[number]] for numbers in held]

"""Sample lengths -> packed rows by best-fit decreasing; pure and deterministic."""

from bisect import bisect_left, insort
from collections.abc import Sequence


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Bins of sample numbers whose lengths sum to at most `budget` tokens.

    Samples are placed longest first, each into the fullest bin with room for it (Johnson 1974); O(n log n). Ties are
    broken by sample number and by the order in which bins were opened, so equal input gives equal bins. Raises
    ValueError for a sample longer than the budget.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (tokens left, bin number), ascending
    for number in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[number]
        if length > budget:
            raise ValueError(f"sample {number} has {length} tokens, more than the budget of {budget}")
        position = bisect_left(rooms, (length, -1))
        if position < len(rooms):
            room, target = rooms.pop(position)
        else:
            room, target = budget, len(bins)
            bins.append([])
        bins[target].append(number)
        insort(rooms, (room - length, target))
    return bins

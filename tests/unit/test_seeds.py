"""Derived seeds: pinned, since every run and checkpoint depends on them, and apart from one another."""

import pytest

from train.seeds import derived_seed


def test_seeds_stay_what_they_are() -> None:
    """Another value would change the order, the masks or the start of every run with that seed."""
    assert derived_seed(3, "adapters") == derived_seed(3, "random base") == derived_seed(3, "path weights") == 3
    assert derived_seed(3, "sample order", 5) == 3 * 2**20 + 5
    assert derived_seed(3, "batch order", 5) == 4 * 2**20 + 5
    assert derived_seed(3, "held out") == 3 * 2**20 + 2**19
    assert derived_seed(3, "dropout", 7, 1, 2) == 63352155985564100


def test_every_forward_pass_has_a_seed_of_its_own() -> None:
    """Steps, processes and micro-batches of two runs: no two seeds are equal, and none is out of torch's range."""
    seeds = [
        derived_seed(seed, "dropout", *numbers)
        for seed in (0, 1)
        for numbers in [(step, rank, number) for step in range(20) for rank in range(4) for number in range(8)]
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_numbers_that_a_use_does_not_take_are_an_error() -> None:
    """Not a seed that ignores them."""
    with pytest.raises(AssertionError, match="sample order takes other numbers"):
        derived_seed(0, "sample order")

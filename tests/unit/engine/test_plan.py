"""The plan as data: what the reference engine follows, and how a plan reads."""

from itertools import pairwise

from train.config import MemoryConfig
from train.engine.plan import Plan, padded, reference_plan, spread


def test_transformers_recomputes_all_or_nothing() -> None:
    """The reference engine's plan says so."""
    kept = {value: reference_plan(32, MemoryConfig(checkpointing=value)).num_kept for value in ("auto", "full", "none")}
    assert kept == {"auto": 0, "full": 0, "none": 32}


def test_a_plan_is_told_in_full() -> None:
    """Everything that differs from keeping all on the GPU, in words."""
    plain = Plan(True, True, 900, num_blocks=4, num_kept=4)
    assert str(plain) == "4 of 4 blocks keep their activations"
    assert str(Plan(True, True, 900, 4, 4, parts=(("head", 2**30),))) == (
        "4 of 4 blocks keep their activations; all weights are on the GPU, nothing is streamed; predicted peak 1.00 GiB"
    )
    small = Plan(
        True, True, 9000, num_blocks=4, num_kept=1, streamed=(1, 3), needs_host=False, offloads_inputs=True,
        mlp_tile=1024, parts=(("head", 2**30), ("embedding", 2**29)), host_bytes=2**31,
    )  # fmt: skip
    assert str(small) == (
        "1 of 4 blocks keep their activations, 3 recompute them; 2 blocks' weights are streamed from host memory, "
        "which is predicted to be faster (it would fit without); block inputs are offloaded to host memory; "
        "MLPs run in tiles of 1,024 "
        "tokens; predicted peak 1.50 GiB, 2.0 GiB of host memory"
    )
    assert str(Plan(True, True, 900, 4, 4, num_cached=2)).endswith("; 2 keep dequantised weights")


def test_streamed_blocks_are_spread_and_stay_streamed() -> None:
    """About evenly, whatever the number of blocks; a larger count adds to those of a smaller one."""
    for total in (1, 22, 32, 80):
        chosen = [set(spread(count, total)) for count in range(total + 1)]
        assert [len(each) for each in chosen] == list(range(total + 1))
        assert all(less < more for less, more in pairwise(chosen))
    assert spread(8, 32) == (3, 7, 11, 15, 19, 23, 27, 31)


def test_graphs_are_padded_to_the_next_step() -> None:
    """A multiple of 128 tokens stays."""
    assert [padded(tokens) for tokens in (1, 128, 129, 1281)] == [128, 128, 256, 1408]

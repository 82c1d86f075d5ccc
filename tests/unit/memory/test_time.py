"""The predicted time of a step is that of the slowest: the GPU that computes, the host that launches, or the bus."""

from dataclasses import replace

import pytest

from tests.unit.memory.examples import H200, LLAMA_8B, LONG, first_candidate, planner_for
from train.config import BatchConfig
from train.memory import time
from train.memory.sizes import MixtureSizes
from train.memory.time import step_seconds

PLANNER = planner_for(LONG, BatchConfig(1, 4))
JOB = PLANNER.job
EAGER = replace(first_candidate(PLANNER, 2048), num_micro_batches=4.0, mean_tokens=2048.0, num_kept=32)
GRAPHS = replace(EAGER, uses_graphs=True)


def test_terms_by_pencil() -> None:
    """A block of an 8B on an H200: 225 M weights, 2,048 tokens that take as long as 2,203 at 715 TFLOP/s."""
    assert time.products(JOB, EAGER, 2 * time.num_weights(JOB, EAGER)) == pytest.approx(2 * 225e6 * 2203 / 715e12)
    assert time.attention_flops(JOB) == 2 * 4096 * 2000
    width = 3 * 4096 + 6144 + 4096 + 2 * 14336  # 51,200 elements a token
    assert time.elementwise(JOB, EAGER, 3) == pytest.approx(3 * 2 * width * 2048 / 4300e9)
    normed = replace(JOB, sizes=replace(LLAMA_8B, normed_qk=5120))
    assert time.elementwise(normed, EAGER, 3) == pytest.approx((3 * width + 3 * 5120) * 2 * 2048 / 4300e9)
    assert time.dequantisation(JOB, EAGER) == pytest.approx(562.5e6 / 4300e9)
    assert time.dequantisation(JOB, replace(EAGER, num_cached=32)) == 0
    assert time.weights_bus(JOB, replace(EAGER, num_streamed=32)) == pytest.approx(112.5e6 / 54e9)
    one_input = 2048 * 2 * 4096
    assert time.inputs_bus(JOB, replace(EAGER, num_kept=0, offloads=True)) == pytest.approx(one_input / 54e9)
    entropy = 4 * 2 * 128_256 * 2048 / 4300e9
    assert time.head(JOB, EAGER) == pytest.approx(4 * 525_336_576 * 2203 / 715e12 + entropy)
    forward = time.products(JOB, EAGER, 2 * 225e6 + 2 * 4096 * 2000)
    assert time.forward(JOB, EAGER) == pytest.approx(
        forward + time.elementwise(JOB, EAGER, 3) + time.dequantisation(JOB, EAGER) + 0.0002
    )
    without_down = 225e6 - 4096 * 14336
    assert time.recomputation(JOB, EAGER) == pytest.approx(
        time.products(JOB, EAGER, 2 * without_down + 2 * 4096 * 2000) + time.elementwise(JOB, EAGER, 3)
    )


def test_a_step_is_its_micro_batches() -> None:
    """Of every block forward and backward, and the head; twice as many take twice as long."""
    one_block = time.forward(JOB, GRAPHS) + time.backward(JOB, GRAPHS)
    assert step_seconds(JOB, GRAPHS) == pytest.approx(4 * (32 * one_block + time.head(JOB, GRAPHS)))
    twice = replace(GRAPHS, num_micro_batches=8.0)
    assert step_seconds(JOB, twice) == pytest.approx(2 * step_seconds(JOB, GRAPHS))


def test_recomputing_costs_a_forward_pass() -> None:
    """Of the blocks that recompute, less down_proj; the host launches their kernels again."""
    half = replace(GRAPHS, num_kept=16)
    more = step_seconds(JOB, half) - step_seconds(JOB, GRAPHS)
    assert more == pytest.approx(4 * 16 * time.recomputation(JOB, GRAPHS))
    launches = time.backward_launches(JOB, replace(EAGER, num_kept=16)) - time.backward_launches(JOB, EAGER)
    assert launches == pytest.approx(time.LAUNCH_FORWARD / 2)


def test_short_micro_batches_wait_for_the_host() -> None:
    """Without graphs a step of few tokens takes as long as its launches, however few; with graphs it is faster."""
    short, shorter = (replace(EAGER, mean_tokens=tokens) for tokens in (200.0, 100.0))
    launches = 4 * 32 * (time.LAUNCH_FORWARD + time.LAUNCH_BACKWARD)
    for candidate in (short, shorter):
        assert step_seconds(JOB, candidate) - 4 * time.head(JOB, candidate) == pytest.approx(launches)
        assert step_seconds(JOB, replace(candidate, uses_graphs=True)) < step_seconds(JOB, candidate)


def test_a_slow_bus_decides_where_weights_are_streamed() -> None:
    """Half the bus is twice the time where copies are slowest; where they hide, they cost what they slow down."""
    long = replace(GRAPHS, mean_tokens=8192.0)
    streamed = replace(long, num_streamed=32)
    hidden = step_seconds(JOB, streamed) - 4 * time.head(JOB, streamed)
    resident = step_seconds(JOB, long) - 4 * time.head(JOB, long)
    assert hidden == pytest.approx(1.02 * resident)
    slow, slower = (replace(JOB, gpu=replace(H200, bus=bus)) for bus in (2e9, 1e9))
    times = [step_seconds(job, streamed) - 4 * time.head(job, streamed) for job in (slow, slower)]
    assert times[1] == pytest.approx(2 * times[0])
    assert times[0] == pytest.approx(4 * 32 * 2 * 1.02 * 112.5e6 / 2e9)


def test_inputs_that_come_back_share_the_bus_with_weights() -> None:
    """Forward they go the other way, so the larger counts; backward both come to the GPU, so the sum does."""
    job = replace(JOB, gpu=replace(H200, bus=1e9))
    both = replace(GRAPHS, num_streamed=32, num_kept=1, offloads=True)
    weights, inputs = time.weights_bus(job, both), time.inputs_bus(job, both)
    expected = 4 * (32 * (max(weights, inputs) + weights + inputs) * 1.03 + time.head(job, both))
    assert step_seconds(job, both) == pytest.approx(expected)


def test_tiles_compute_gate_and_up_again_in_kept_blocks() -> None:
    """Two products of [T, H] and [H, F], 2 FLOP each; recomputed blocks make them but once."""
    tiled = replace(GRAPHS, mlp_tile=1024)
    again = time.products(JOB, GRAPHS, 4 * LLAMA_8B.hidden * LLAMA_8B.intermediate)
    assert time.backward(JOB, tiled) - time.backward(JOB, GRAPHS) == pytest.approx(again)
    half = replace(tiled, num_kept=16)
    assert time.backward(JOB, half) - time.backward(JOB, GRAPHS) == pytest.approx(again / 2)


def test_small_experts_are_multiplied_at_a_lower_rate() -> None:
    """Of 8,192 tokens each of 128 experts has 512 rows, of 16,384 each of 8 has 4,096; and their sums are longer."""
    shares = []
    for tokens, hidden, intermediate, count, chosen in ((8192.0, 2048, 768, 128, 8), (16384.0, 4096, 14336, 8, 2)):
        mixture = MixtureSizes(count, chosen, weights=1, multiplied=1, gradient_bytes=0, columns=16)
        job = replace(JOB, sizes=replace(LLAMA_8B, hidden=hidden, intermediate=intermediate, mixture=mixture))
        shares.append(time.grouped_share(job, replace(EAGER, mean_tokens=tokens)))
    assert shares[0] == pytest.approx(0.81 / (1 + 64 / 512) / (1 + 480 * (1 / 4096 + 1 / 2304)))
    assert shares == [pytest.approx(0.544, abs=1e-3), pytest.approx(0.745, abs=1e-3)]


def test_gpus_share_the_bandwidth_of_the_host() -> None:
    """Each has its own bus, and eight of 54 GB/s want more than the machine's memory gives: 25 of 200 for each."""
    streamed = replace(EAGER, num_streamed=32)
    for count, rate in ((1, 54e9), (2, 54e9), (8, 25e9)):
        job = replace(JOB, num_local=count)
        assert time.weights_bus(job, streamed) == pytest.approx(112.5e6 / rate)

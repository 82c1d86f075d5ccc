"""What a plan counts of a micro-batch whose tokens several GPUs share: a part's activations, and the exchange."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.tensor_bytes import PeakBytes
from tests.unit.memory.examples import GIB, H200, LLAMA_8B, LONG, first_candidate, planner_for
from train.batching import LengthStatistics
from train.collate import Part
from train.config import BatchConfig, MemoryConfig
from train.engine.split_attention import SplitAttention
from train.memory import cost, time
from train.memory.attention import attention_backward
from train.memory.kept import kept_of


class Flash(torch.autograd.Function):
    """In the place of attention: keeps and makes what a flash kernel does, and computes nothing."""

    @staticmethod
    def forward(ctx: Any, *states: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(states[0].shape)
        ctx.save_for_backward(*states, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.zeros(states.shape) for states in ctx.saved_tensors[:3])


@pytest.mark.parametrize(("num_key_value", "count"), [(8, 2), (2, 2), (2, 4)])
def test_an_exchange_takes_what_is_counted(num_key_value: int, count: int) -> None:
    """What attention keeps of other processes' tokens to the byte; forward and backward no more than there is room."""
    num_tokens, size, query = 512, 16, 8 * 16
    sizes = replace(LLAMA_8B, query=query, qkv=query + 2 * num_key_value * size, num_key_value=num_key_value)
    sizes = replace(sizes, element_bytes=4, vocabulary=1)  # a block takes more than the head
    job = planner_for(LONG, BatchConfig(1, 4), sizes=sizes).job
    whole = first_candidate(planner_for(LONG, BatchConfig(1, 4)), count * num_tokens)
    part = replace(whole, num_parts=count)
    alone = replace(whole, tokens=num_tokens)
    inputs = [torch.randn(num_tokens, heads, size, requires_grad=True) for heads in (8, num_key_value, num_key_value)]
    with PeakBytes() as forward:
        out = SplitAttention(lambda q, k, v, _=None, /: Flash.apply(q, k, v), Part(0, count, torch.clone))(*inputs)
    attended = 4 * num_tokens * query  # counted without an exchange, too
    assert sum(forward.live.values()) - attended == kept_of(job, part, [0]) - kept_of(job, alone, [0])
    more = cost.validation_bytes(job, num_tokens, part) - cost.validation_bytes(job, num_tokens, alone)
    assert forward.peak <= attended + more + attended  # attention's output is there twice without it
    with PeakBytes() as backward:
        torch.autograd.grad(out, inputs, torch.zeros(out.shape))
    more = attention_backward(job, part) - attention_backward(job, alone)
    gradients = 4 * num_tokens * (4 * query + job.sizes.qkv)  # of the output, q, k and v, and of repeated k and v
    assert backward.peak <= gradients + more
    assert cost.peak(job, part) > cost.peak(job, alone)


def rows_of(num_tokens: int) -> LengthStatistics:
    """Rows of one length."""
    return LengthStatistics((num_tokens,), num_tokens, 0.0, num_tokens)


def test_a_part_takes_what_a_row_of_its_length_does() -> None:
    """Of the same plan every term but those of attention; the host holds a part of the block inputs."""
    sizes = replace(LLAMA_8B, num_key_value=8)
    job = planner_for(rows_of(131_072), BatchConfig(1, 1), sizes=sizes).job
    alone = first_candidate(planner_for(LONG, BatchConfig(1, 1)), 32_768, offloads=True, mlp_tile=1024)
    part = replace(alone, tokens=4 * 32_768, num_parts=4)
    assert part.width == alone.width
    parts = [cost.parts(job, candidate) for candidate in (alone, part)]
    attention = ("kept activations", "working memory")
    assert all((parts[1][name] > parts[0][name]) == (name in attention) for name in cost.TERMS)
    assert cost.host_bytes(job, part) == cost.host_bytes(job, alone)


def test_rows_grow_with_the_gpus() -> None:
    """Four GPUs take nearly four times the tokens of one, without graphs; what does not fit says how many would."""

    def longest(count: int) -> int:
        batch = BatchConfig(1, 1, context_parallel=count)
        sizes = replace(LLAMA_8B, num_key_value=8)
        planner = planner_for(rows_of(4_000_000), batch, MemoryConfig(offload="none"), sizes)
        return planner.longest_row(80 * GIB)

    one, four = longest(1), longest(4)
    assert 3 * one < four < 4 * one
    batch = BatchConfig(1, 1, context_parallel=4)
    for tokens in (2048, four):
        plan = planner_for(rows_of(tokens), batch).best(80 * GIB)
        assert (plan.num_parts, plan.uses_graphs, plan.micro_batch_tokens) == (4, False, tokens)
        assert "split over 4 GPUs" in str(plan)
    assert planner_for(rows_of(2048), BatchConfig(1, 1)).best(80 * GIB).uses_graphs


def test_an_exchange_takes_time() -> None:
    """By pencil: of 32,768 tokens of an 8B three quarters of queries, keys, values and output, at the link's rate."""
    sizes = replace(LLAMA_8B, num_key_value=8)
    job = planner_for(rows_of(131_072), BatchConfig(1, 1), sizes=sizes).job
    alone = first_candidate(planner_for(LONG, BatchConfig(1, 1)), 32_768)
    alone = replace(alone, mean_tokens=32_768.0)
    part = replace(alone, tokens=131_072, num_parts=4)
    seconds = 32_768 * 2 * (6144 + 4096) * 0.75 / H200.link
    assert time.exchange(job, part) == pytest.approx(seconds)
    for direction in (time.forward, time.backward, time.recomputation):
        assert direction(job, part) - direction(job, alone) == pytest.approx(seconds)
    repeated = replace(job, sizes=replace(sizes, num_key_value=2, qkv=4096 + 2 * 256))  # two heads for four GPUs
    assert time.exchange(repeated, part) == pytest.approx(32_768 * 2 * (4096 + 2 * 512 + 4096) * 0.75 / H200.link)

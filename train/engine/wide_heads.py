"""Attention of one sample by heads that flash kernels do not take, with a backward pass of products.

SDPA's memory-efficient kernels take heads of 512 elements, but backward they reach a fiftieth of a GPU's rate: 8
samples of 2,048 tokens, 8 heads, on an H200, took 52.5 ms where products over tiles of queries take 9.7.
"""

from collections.abc import Iterator
from typing import Any

import torch

MIN_LENGTH = 512  # tokens of a sample; the products of shorter ones wait for the host that launches them
TILE_BYTES = 2**27  # of fp32 scores at a time: half of it took a tenth to a half longer, twice of it as long
MIN_ROWS = 16  # queries in a tile, at least: products want so many


def tile_rows(heads: int, length: int) -> int:
    """Queries of which scores are kept at a time."""
    return min(length, max(MIN_ROWS, TILE_BYTES // (4 * heads * length) // MIN_ROWS * MIN_ROWS))


def tile_bytes(heads: int, length: int) -> int:
    """What a tile takes: probabilities and their gradient in fp32, each once more in 16 bits."""
    return 12 * tile_rows(heads, length) * heads * length


class WideHeads(torch.autograd.Function):
    """Causal attention of query [L, heads, D] to key and value [L, kv_heads, D] -> [L, heads, D].

    The probabilities of a tile of queries come again from the log of each softmax's sum. Sums over tokens are fp32.
    """

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
        repeats = query.shape[1] // key.shape[1]
        whole = (query, key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1))
        out, log_sum = _attended([part.transpose(0, 1)[None] for part in whole], scale)
        out = out[0].transpose(0, 1)
        ctx.scale = scale
        ctx.save_for_backward(query, key, value, out, log_sum[0, :, : len(query)])
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, log_sum = ctx.saved_tensors
        of_query = torch.empty_like(query)
        of_key, of_value = (torch.zeros_like(part, dtype=torch.float32) for part in (key, value))
        for start, stop in _tiles(query.shape[1], len(query)):
            q, g, o = (_grouped(part[start:stop], key.shape[1]) for part in (query, grad_outputs[0], out))
            k, v = (part[:stop].transpose(0, 1) for part in (key, value))  # [kv_heads, keys, D]
            shares = _scores(q, k, start, ctx.scale)
            shares.sub_(log_sum[:, start:stop].reshape(len(q), -1, 1)).exp_()
            rounded = shares.to(query.dtype)
            of_value[:stop] += _product(rounded.transpose(1, 2), g).transpose(0, 1)
            mean = (g.float() * o.float()).sum(2, keepdim=True)
            shares.mul_(_product(g, v.transpose(1, 2)).sub_(mean)).mul_(ctx.scale)
            rounded = shares.to(query.dtype)
            of_query[start:stop] = _by_token(torch.bmm(rounded, k), stop - start)
            of_key[:stop] += _product(rounded.transpose(1, 2), q).transpose(0, 1)
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype), None


def _attended(states: list[torch.Tensor], scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Of query, key and value [1, heads, L, D]: the output, and the log of each softmax's sum [1, heads, L or more]."""
    aten: Any = torch.ops.aten
    if states[0].is_cuda:  # without a bias, with the sums, without dropout, causal
        return aten._scaled_dot_product_efficient_attention(*states, None, True, 0.0, True, scale=scale)[:2]
    return aten._scaled_dot_product_flash_attention_for_cpu(*states, 0.0, True, scale=scale)


def _tiles(heads: int, length: int) -> Iterator[tuple[int, int]]:
    """First and last + 1 query of each."""
    rows = tile_rows(heads, length)
    for start in range(0, length, rows):
        yield start, min(length, start + rows)


def _grouped(part: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[T, heads, D] as [kv_heads, heads / kv_heads T, D]: rows that read the same keys."""
    return part.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def _by_token(rows: torch.Tensor, count: int) -> torch.Tensor:
    """What `_grouped` did, undone."""
    return rows.unflatten(1, (-1, count)).permute(2, 0, 1, 3).flatten(1, 2)


def _scores(query: torch.Tensor, key: torch.Tensor, start: int, scale: float) -> torch.Tensor:
    """Scores in fp32 of queries [kv_heads, rows, D], whose first is token `start`, with all tokens up to the last."""
    scores = _product(query, key.transpose(1, 2)).mul_(scale)
    count = key.shape[1] - start
    later = torch.ones(count, count, dtype=torch.bool, device=key.device).triu(1)
    scores.unflatten(1, (-1, count))[..., start:].masked_fill_(later, float("-inf"))
    return scores


def _product(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A batch of products, in fp32."""
    if one.is_cuda and one.dtype != torch.float32:
        return torch.bmm(one, other, out_dtype=torch.float32)
    return torch.bmm(one.float(), other.float())

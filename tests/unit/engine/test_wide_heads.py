"""Attention of wide heads by products over tiles, compared with SDPA's own gradients in fp64."""

import pytest
import torch
import torch.nn.functional as F

from train.collate import collate_packed
from train.engine import attention, wide_heads
from train.engine.attention import PackedAttention
from train.engine.wide_heads import WideHeads, tile_bytes, tile_rows

SCALE = 0.2


def states(length: int, kv_heads: int) -> list[torch.Tensor]:
    """Query of eight heads, key and value, and the output's gradient."""
    torch.manual_seed(length)
    return [torch.randn(length, heads, 32) for heads in (8, kv_heads, kv_heads, 8)]


def by_sdpa(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """[L, heads, D], by SDPA with heads repeated."""
    whole = (query, *(part.repeat_interleave(8 // part.shape[1], 1) for part in (key, value)))
    q, k, v = (part.transpose(0, 1)[None] for part in whole)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=SCALE)[0].transpose(0, 1)


def by_tiles(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    return WideHeads.apply(query, key, value, SCALE)


def results(function, tensors: list[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
    """Output and the gradients of query, key and value."""
    *leaves, upstream = (part.to(dtype) for part in tensors)
    leaves = [part.requires_grad_() for part in leaves]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]


@pytest.mark.parametrize("length", [1, 16, 37, 96])
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_gradients_are_those_of_sdpa(length: int, kv_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 to its rounding, in bf16 no further than SDPA's own; one tile, many, and a last one that is not full."""
    tensors = states(length, kv_heads)
    exact = results(by_sdpa, [part.bfloat16() for part in tensors], torch.float64)
    for tile in (2**27, 4 * 8 * length * 32):
        monkeypatch.setattr(wide_heads, "TILE_BYTES", tile)
        for found, wanted in zip(results(by_tiles, [p.bfloat16() for p in tensors], torch.float32), exact, strict=True):
            assert (found - wanted).norm() <= 1e-5 * wanted.norm() + 1e-6
        theirs, ours = (results(function, tensors, torch.bfloat16) for function in (by_sdpa, by_tiles))
        for found, other, wanted in zip(ours, theirs, exact, strict=True):
            assert (found - wanted).norm() <= max(1.2 * (other - wanted).norm(), 0.004 * wanted.norm() + 1e-6)


def test_tiles_cover_a_sample_within_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each query once, and no more scores than allowed unless few queries are."""
    monkeypatch.setattr(wide_heads, "TILE_BYTES", 2**20)
    for heads, length in ((8, 100), (8, 2048), (32, 5000), (32, 131_072)):
        tiles = list(wide_heads._tiles(heads, length))
        assert [start for start, _ in tiles] == [0, *(stop for _, stop in tiles[:-1])]
        assert tiles[-1][1] == length
        rows = max(stop - start for start, stop in tiles)
        assert rows == tile_rows(heads, length)
        assert 4 * rows * heads * length <= 2**20 or rows == wide_heads.MIN_ROWS
        assert tile_bytes(heads, length) == 12 * rows * heads * length


def test_only_long_samples_of_wide_heads_go_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """A packed micro-batch of both has the output and gradients of SDPA, sample by sample; a window's has not tiles."""
    lengths, taken = (40, 7, 33), []
    monkeypatch.setattr(attention, "has_flash", lambda dtype, device: True)
    monkeypatch.setattr(attention, "MAX_FLASH_SIZE", 16)
    monkeypatch.setattr(attention, "MIN_LENGTH", 32)
    one_sample = WideHeads.apply
    monkeypatch.setattr(WideHeads, "apply", lambda *given: taken.append(len(given[0])) or one_sample(*given))
    batch = collate_packed([{"input_ids": [1] * count, "trained": [True] * count} for count in lengths])
    tensors = states(sum(lengths), 2)
    parts = zip(*(part.split(lengths) for part in tensors), strict=True)
    alone = [results(by_sdpa, list(part), torch.float64) for part in parts]
    for window, long in ((None, [40, 33]), (35, [33]), (20, [])):
        taken.clear()
        found = results(PackedAttention(batch, window, SCALE), tensors, torch.float32)
        assert taken == long
        if window is None:
            for number, together in enumerate(found):
                wanted = torch.cat([each[number] for each in alone])
                assert (together - wanted).norm() <= 1e-5 * wanted.norm()

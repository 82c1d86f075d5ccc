"""What flash kernels are given, with the kernel replaced by torch lines that ask for as much."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from train.collate import collate_packed
from train.engine import attention
from train.engine.attention import FLASH_MULTIPLE, PackedAttention

LENGTHS = (5, 1, 9)


def by_sample(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *places: Any, **options: Any) -> Any:
    """varlen_attn without a window; it refuses heads as mha_varlen_fwd does (torch's flash_api.cpp)."""
    assert query.shape[2] % FLASH_MULTIPLE == 0, "head_size must be a multiple of 8"
    outs = []
    for states in zip(*(each.split(LENGTHS) for each in (query, key, value)), strict=True):
        q, k, v = (each.transpose(0, 1)[None] for each in states)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=options["scale"], enable_gqa=True)
        outs.append(out[0].transpose(0, 1))
    return torch.cat(outs)


@pytest.mark.parametrize("size", [16, 10, 100])
def test_heads_of_any_size_by_flash(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and gradients are those without a flash kernel, also where it does not take the size (OpenLLaMA-3B's is
    100), and where the caller leaves the scale to it."""
    batch = collate_packed([{"input_ids": [1] * length, "trained": [True] * length} for length in LENGTHS])
    inputs = [torch.randn(15, heads, size, requires_grad=True) for heads in (4, 2, 2)]
    upstream, found = torch.randn(15, 4, size), []
    for has_flash in (False, True):
        monkeypatch.setattr(attention, "has_flash", lambda *_, answer=has_flash: answer)
        monkeypatch.setattr(attention, "varlen_attn", by_sample)
        out = PackedAttention(batch, None, size**-0.5)(inputs[0], inputs[1], inputs[2])
        found.append([out, *torch.autograd.grad(out, inputs, upstream)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
    monkeypatch.setattr(attention, "_announced", attention._Announced())  # of the process
    attention.announce(batch)
    layouts = [each.detach().transpose(0, 1)[None] for each in inputs]
    out, _ = attention.varlen_attention(torch.nn.Module(), layouts[0], layouts[1], layouts[2], None)
    torch.testing.assert_close(out[0], found[0][0])

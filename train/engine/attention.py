"""Attention over packed rows that ends at every sample's border, without a mask, on cards with a flash kernel.

A block mask over a packed row of T tokens costs T x T bytes and takes the slow kernels. torch's varlen_attn is given
the borders instead, and takes grouped key/value heads as they are.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from train.collate import SHORTEST_EVEN, MicroBatch
from train.config import Config
from train.run import devices

# torch 2.11 takes fewer key/value than query heads unasked, later versions want to be told
GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def attention_kind(config: Config, dtype: torch.dtype, device: torch.device) -> str:
    """The name to give to transformers: `varlen` where rows are packed and a flash kernel exists, else `sdpa`.

    The kernels need compute capability 8.0 (A100, RTX 30) and a 16-bit type. Under `sdpa` transformers isolates packed
    samples by a block mask made from position_ids.
    """
    return "varlen" if config.data.packing and has_flash(dtype, device) else "sdpa"


def has_flash(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether varlen_attn has a kernel for the type on the device."""
    return device.type == "cuda" and dtype != torch.float32 and devices.capability(device) >= devices.FLASH


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sample; query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D].

    `options` holds the borders as LanguageModel passes them, cu_seq_lens_q (int32 [S + 1]) and max_length_q, beside
    what the model's own attention passes (scaling, sliding_window). Rows that are not packed go to SDPA.
    """
    borders = options.get("cu_seq_lens_q")
    if borders is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if options.get("dropout"):
        raise ValueError("the base's attention_dropout is not 0, which attention over packed rows does not have")
    flat = [states[0].transpose(0, 1) for states in (query, key, value)]  # [T, H, D], [T, G, D]
    attended = _varlen(flat, borders, options["max_length_q"], options.get("sliding_window"), options.get("scaling"))
    return attended[None], None


def _varlen(
    states: Sequence[torch.Tensor],
    borders: torch.Tensor,
    longest: int,
    sliding_window: int | None,
    scale: float | None,
) -> torch.Tensor:
    query, key, value = states
    reach = -1 if sliding_window is None else sliding_window - 1
    options: dict[str, Any] = {"scale": scale, "window_size": (reach, 0), **GROUPED}
    attended: Any = varlen_attn(query, key, value, borders, borders, longest, longest, **options)
    return attended


# Not registered as a mask function too: transformers then builds no mask and never looks at position_ids for borders.
AttentionInterface.register("varlen", varlen_attention)

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def attend_packed(batch: MicroBatch, sliding_window: int | None, scale: float) -> Attend:
    """Causal attention within each sample of a packed micro-batch.

    The function takes query [T, H, D], key and value [T, G, D] and gives [T, H, D]; autograd knows its gradient.
    """
    borders = batch.cu_seqlens
    assert borders is not None, "the micro-batch is not packed"
    # long samples of one length go to cuDNN where it has a kernel for them (Hopper): 1.4 ms instead of 2.2 for
    # 4 x 2,048 tokens of Llama-3.1-8B, forward and backward; it plans each new length for some 100 ms: no short ones
    length = batch.uniform_length
    reach = -1 if sliding_window is None else sliding_window - 1
    is_even = (
        length >= SHORTEST_EVEN
        and (reach < 0 or reach >= length)
        and has_flash(torch.bfloat16, borders.device)
        and devices.capability(borders.device)[0] == 9
        and not torch.are_deterministic_algorithms_enabled()
    )

    def even(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.unflatten(0, (-1, length)).transpose(1, 2) for part in (query, key, value))
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)  # [S, H, L, D]
        return out.transpose(1, 2).flatten(0, 1)

    @cache
    def samples() -> list[tuple[int, int]]:
        return list(pairwise(borders.tolist()))  # a host sync, once for all blocks

    def one_by_one(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        outs = []
        # the kernels of GPUs older than Ampere take no grouped heads, and without one the scores of all heads are kept
        repeats = query.shape[1] // key.shape[1]
        heads = [part.repeat_interleave(repeats, 1) for part in (key, value)]
        for start, stop in samples():
            q, k, v = (part[start:stop].transpose(0, 1)[None] for part in (query, *heads))  # [1, H, L, D]
            options: dict[str, Any] = {"is_causal": True}
            if 0 <= reach < stop - start - 1:
                ones = torch.ones(stop - start, stop - start, dtype=torch.bool, device=query.device)
                options = {"attn_mask": ones.tril() & ones.triu(-reach)}
            out = F.scaled_dot_product_attention(q, k, v, scale=scale, **options)
            outs.append(out[0].transpose(0, 1))
        return torch.cat(outs)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if not has_flash(query.dtype, query.device):
            return one_by_one(query, key, value)
        if is_even:
            return even(query, key, value)
        return _varlen((query, key, value), borders, batch.max_length, sliding_window, scale)

    return attend

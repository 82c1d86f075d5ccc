"""Attention over packed rows that ends at every sample's border, without a mask, on cards with a flash kernel.

A block mask over a packed row of T tokens costs T x T bytes and takes the slow kernels. torch's varlen_attn is given
the borders instead, and takes grouped key/value heads as they are.
"""

import inspect
from typing import Any

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from train.config import Config

# torch 2.11 takes fewer key/value than query heads unasked, later versions want to be told
GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


def attention_kind(config: Config, dtype: torch.dtype, device: torch.device) -> str:
    """The name to give to transformers: `varlen` where rows are packed and a flash kernel exists, else `sdpa`.

    The kernels need compute capability 8.0 (A100, RTX 30) and a 16-bit type. Under `sdpa` transformers isolates packed
    samples by a block mask made from position_ids.
    """
    if not (config.data.packing and device.type == "cuda" and dtype != torch.float32):
        return "sdpa"
    return "varlen" if torch.cuda.get_device_capability(device) >= (8, 0) else "sdpa"


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
    longest = options["max_length_q"]
    reach = options.get("sliding_window")
    attended: Any = varlen_attn(
        query[0].transpose(0, 1),  # [T, H, D]
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        borders,
        borders,
        longest,
        longest,
        scale=options.get("scaling"),
        window_size=(-1 if reach is None else reach - 1, 0),
        **GROUPED,
    )
    return attended[None], None


# Not registered as a mask function too: transformers then builds no mask and never looks at position_ids for borders.
AttentionInterface.register("varlen", varlen_attention)

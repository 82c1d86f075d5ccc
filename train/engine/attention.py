"""Attention over packed rows that ends at every sequence boundary, without a mask, on GPUs with a flash kernel.

A block mask over a packed row of T tokens costs T x T bytes and takes the slow kernels. torch's varlen_attn is given
the boundaries (`cu_seqlens`) instead, and takes grouped key/value heads as they are.
"""

import inspect
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from train.collate import MIN_UNIFORM_LENGTH, MicroBatch
from train.engine.wide_heads import MIN_LENGTH, WideHeads
from train.run import devices

# torch 2.11 takes fewer key/value than query heads by itself, later versions want to be told
GROUPED: dict[str, bool] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}

MAX_FLASH_SIZE = 256  # elements of a head, at most, that flash kernels take
FLASH_MULTIPLE = 8  # of which they want them to be a multiple; torch pads heads for SDPA alone


class Attend(Protocol):
    """Attention over the tokens of a micro-batch; autograd knows the gradient."""

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None = None, /
    ) -> torch.Tensor:
        """Query [T, heads, D], key and value [T, kv_heads, D] -> [T, heads, D].

        With frozen `sinks` [heads], the softmax of a head counts its sink as the score of one more token without a
        value (gpt-oss).
        """
        ...


def has_flash(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether varlen_attn has a kernel: compute capability 8.0 (A100, RTX 30) and a 16-bit type."""
    return device.type == "cuda" and dtype != torch.float32 and devices.capability(device) >= devices.FLASH


@dataclass
class _Announced:
    """The sequence boundaries of the pass that runs; none where its rows are padded."""

    cu_seqlens: torch.Tensor | None = None
    max_length: int = 0


_announced = _Announced()


def announce(batch: MicroBatch) -> None:
    """Tells varlen_attention the boundaries of the forward pass that follows, and of what it recomputes backward.

    Not every family hands on what its decoder is called with: StableLM's layers do not.
    """
    _announced.cu_seqlens, _announced.max_length = batch.cu_seqlens, batch.max_length


def varlen_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Causal attention within each sample; query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D].

    `options` holds what the model's own attention passes (scaling, sliding_window). Rows that are not packed go to
    SDPA. Raises ValueError where the model's attention has dropout.
    """
    cu_seqlens = _announced.cu_seqlens
    if cu_seqlens is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if options.get("dropout"):
        raise ValueError("the base's attention_dropout is not 0, and attention over packed rows has no dropout")
    flat = [states[0].transpose(0, 1) for states in (query, key, value)]  # [T, H, D], [T, G, D]
    reach = reach_of(options.get("sliding_window"))
    return _varlen(flat, cu_seqlens, _announced.max_length, reach, options.get("scaling"))[None], None


def reach_of(sliding_window: int | None) -> int:
    """How many tokens before its own a token sees; -1 is all of them."""
    return -1 if sliding_window is None else sliding_window - 1


def _varlen(
    states: Sequence[torch.Tensor],
    cu_seqlens: torch.Tensor,
    max_length: int,
    reach: int,
    scale: float | None,
) -> torch.Tensor:
    size = states[0].shape[-1]
    query, key, value = _padded_heads(states)
    scale = size**-0.5 if scale is None else scale  # of heads as they are
    options: dict[str, Any] = {"scale": scale, "window_size": (reach, 0), **GROUPED}
    attended = varlen_attn(query, key, value, cu_seqlens, cu_seqlens, max_length, max_length, **options)
    return cast(torch.Tensor, attended)[..., :size]  # a tuple only where the softmax's sums are asked for


def _padded_heads(states: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """States [..., D] with zeros behind heads that are no multiple of FLASH_MULTIPLE (100: OpenLLaMA-3B)."""
    missing = -states[0].shape[-1] % FLASH_MULTIPLE
    return [F.pad(each, (0, missing)) for each in states] if missing else states


# Not registered as a mask function too: transformers then builds no mask and does not look for boundaries itself.
AttentionInterface.register("varlen", varlen_attention)


def attentions(batch: MicroBatch, windows: Collection[int | None], scale: float) -> dict[int | None, Attend]:
    """The attention of a packed micro-batch for layers of each window."""
    return {window: PackedAttention(batch, window, scale) for window in windows}


class PackedAttention:
    """Causal attention within each sample of a packed micro-batch, by the fastest kernel there is; an `Attend`."""

    def __init__(self, batch: MicroBatch, sliding_window: int | None, scale: float) -> None:
        assert batch.cu_seqlens is not None, "the micro-batch is not packed"
        self.cu_seqlens = batch.cu_seqlens
        self.max_length = batch.max_length
        self.uniform_length = batch.uniform_length
        self.reach = reach_of(sliding_window)
        self.scale = scale
        self.uses_cudnn = self._uses_cudnn()

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None = None, /
    ) -> torch.Tensor:
        """As Attend; with sinks by flash, which returns the softmax's sums, or sample by sample."""
        if not has_flash(query.dtype, query.device) or query.shape[2] > MAX_FLASH_SIZE:
            return self._sample_by_sample(query, key, value, sinks)
        if sinks is not None:
            padded = _padded_heads((query, key, value))
            return FlashWithSinks.apply(*padded, sinks, self)[..., : query.shape[2]]
        if self.uses_cudnn:
            return self._uniform(query, key, value)
        return _varlen((query, key, value), self.cu_seqlens, self.max_length, self.reach, self.scale)

    def _uses_cudnn(self) -> bool:
        """Whether the samples have one length and are long, on a Hopper GPU.

        cuDNN's kernels for that take 1.4 ms instead of 2.2 for 4 x 2,048 tokens of Llama-3.1-8B, forward and backward.
        cuDNN plans each new length for some 100 ms, so short samples do not go there.
        """
        device = self.cu_seqlens.device
        return (
            self.uniform_length >= MIN_UNIFORM_LENGTH
            and (self.reach < 0 or self.reach >= self.uniform_length)
            and has_flash(torch.bfloat16, device)
            and devices.capability(device)[0] == 9
            and not torch.are_deterministic_algorithms_enabled()
        )

    def _uniform(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """By one SDPA call on [samples, heads, L, D]."""
        q, k, v = (part.unflatten(0, (-1, self.uniform_length)).transpose(1, 2) for part in (query, key, value))
        with sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)

    def _sample_by_sample(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        """By a call for each sample, where flash has no kernel: for the type, the GPU or the size of heads.

        Of SDPA, unless a long sample has wide heads. SDPA's kernels for GPUs older than Ampere take no grouped heads,
        and without a kernel it keeps all heads' scores: so keys and values are repeated first.
        """
        outs = []
        for states in zip(*(part.split(self._lengths) for part in (query, key, value)), strict=True):
            sees_all = self.reach < 0 or self.reach >= len(states[0]) - 1
            if sinks is None and sees_all and len(states[0]) >= MIN_LENGTH and has_flash(query.dtype, query.device):
                outs.append(WideHeads.apply(*states, self.scale))
            else:
                outs.append(self._one_sample(states, None if sees_all else self.reach, sinks))
        return torch.cat(outs)

    def _one_sample(
        self, states: Sequence[torch.Tensor], reach: int | None, sinks: torch.Tensor | None
    ) -> torch.Tensor:
        query, key, value = states
        repeats, length = query.shape[1] // key.shape[1], len(query)
        whole = (query, key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1))
        q, k, v = (part.transpose(0, 1)[None] for part in whole)  # [1, H, L, D]
        options: dict[str, Any] = {"is_causal": True}
        if sinks is not None or reach is not None:
            ones = torch.ones(length, length, dtype=torch.bool, device=query.device)
            options = {"attn_mask": ones.tril() if reach is None else ones.tril() & ones.triu(-reach)}
        if sinks is not None:
            options["attn_mask"] = F.pad(options["attn_mask"], (1, 0), value=True)
            q, k, v = _beside_sinks(q, k, v, sinks / self.scale)
        return F.scaled_dot_product_attention(q, k, v, scale=self.scale, **options)[0].transpose(0, 1)

    @cached_property
    def _lengths(self) -> list[int]:
        """Tokens of each sample: a host sync, once for all blocks."""
        return self.cu_seqlens.diff().tolist()


def _beside_sinks(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scores: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States [1, H, L, D] with one token more in front of keys and values: each query has this score [H] with it.

    Queries get an element of 1 for it, so that no mask a head is needed; kernels want multiples of 8.
    """
    query, key, value = F.pad(query, (0, 8), value=1.0), F.pad(key, (0, 8, 1, 0)), F.pad(value, (0, 0, 1, 0))
    key[0, :, 0, -1] = scores
    return query, key, value


class FlashWithSinks(torch.autograd.Function):
    """varlen_attn whose softmax counts a sink, too: query [T, heads, D], key and value [T, kv_heads, D], sinks [heads].

    With l the log of a softmax's sum and s its sink, the sum with the sink has the log l' = log(e^l + e^s), and all
    probabilities are e^(l - l') times as large. The backward kernel makes them of scores and l: given l', and the
    output made smaller, it computes the gradients with the sink.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: torch.Tensor,
        attention: PackedAttention,
    ) -> torch.Tensor:
        ctx.ends = attention.cu_seqlens, attention.cu_seqlens, attention.max_length, attention.max_length
        reach = attention.reach
        ctx.options = {"scale": attention.scale, "window_size_left": reach, "window_size_right": 0}
        ctx.is_causal = reach < 0
        flash: Any = torch.ops.aten._flash_attention_forward
        # neither dropout nor the mask of one
        out, log_sum, state, _, _ = flash(query, key, value, *ctx.ends, 0.0, ctx.is_causal, False, **ctx.options)
        whole = torch.logaddexp(log_sum, sinks.float()[:, None])  # [heads, T]
        out *= (log_sum - whole).exp().T[..., None]
        ctx.save_for_backward(query, key, value, out, whole, state)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *saved, state = ctx.saved_tensors
        unused = torch.empty(0, device=state.device)
        flash: Any = torch.ops.aten._flash_attention_backward
        gradients = flash(grad_outputs[0], *saved, *ctx.ends, 0.0, ctx.is_causal, state, unused, **ctx.options)
        return *gradients, None, None

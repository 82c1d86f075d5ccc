"""The gated delta rule and the convolution before it over packed rows: each sample starts from an empty state.

S <- exp(g) S (1 - beta k k^T) + beta v k^T, o = S q (Yang et al. 2024, Gated Delta Networks). Where the GPU computes in
16 bits and they are installed, flash-linear-attention and causal-conv1d end both at cu_seqlens. transformers' own torch
code knows no boundaries: it is given samples as rows of padded batches, those of as many chunks together.
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from functools import cache, cached_property
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F

from train.collate import MicroBatch
from train.engine.layers import DeltaHeads

TRIED = (2048, 64)  # tokens of a trial; fla chooses its tiles by the first call's speed, for good: so not a chunk's
CHUNK = 64  # tokens that the rule takes at a time; transformers' torch code pads to a multiple of it
RULE = ("fla.ops.gated_delta_rule", "chunk_gated_delta_rule")
CONVOLUTION = ("causal_conv1d", "causal_conv1d_fn")
ACTIVATIONS = ("silu", "swish")  # that causal-conv1d computes
ALIGNMENT = 8  # elements, to which causal-conv1d wants rows aligned


class PackedSamples:
    """Where the samples of a packed micro-batch are, for what cannot be told by cu_seqlens alone."""

    def __init__(self, batch: MicroBatch) -> None:
        assert batch.cu_seqlens is not None, "the micro-batch is not packed"
        assert sum(batch.lengths) == batch.input_ids.shape[1], "lengths are those of all samples"
        self.cu_seqlens = batch.cu_seqlens
        self.lengths = batch.lengths

    @cached_property
    def numbers(self) -> torch.Tensor:
        """int32 [1, T]: each token's sample."""
        tokens = torch.arange(sum(self.lengths), device=self.cu_seqlens.device, dtype=torch.int32)
        return torch.searchsorted(self.cu_seqlens[1:], tokens, right=True, out_int32=True)[None]

    @cached_property
    def _batches(self) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Tokens [S, L] of samples that have as many chunks, and where each token [T] then is in all of them.

        A sample that is shorter than L ends in its last token, again and again: nothing reads what comes of it.
        """
        starts = list(accumulate(self.lengths, initial=0))
        groups: dict[int, list[int]] = {}
        for sample, length in enumerate(self.lengths):
            if length:
                groups.setdefault(-(-length // CHUNK), []).append(sample)
        batches, places, first = [], torch.empty(starts[-1], dtype=torch.int64), 0
        for samples in groups.values():
            width = max(self.lengths[sample] for sample in samples)
            steps = torch.arange(width)
            rows = [starts[sample] + steps.clamp(max=self.lengths[sample] - 1) for sample in samples]
            for row, sample in enumerate(samples):
                length = self.lengths[sample]
                places[starts[sample] : starts[sample] + length] = first + row * width + steps[:length]
            batches.append(torch.stack(rows))
            first += len(samples) * width
        device = self.cu_seqlens.device
        return [batch.to(device) for batch in batches], places.to(device)

    def apart(self, function: Callable[..., torch.Tensor], *parts: torch.Tensor) -> torch.Tensor:
        """[T, ...] of a causal function of rows [S, L, ...], one sample in each; parts are [T, ...]."""
        batches, places = self._batches
        outs = [function(*(part[batch] for part in parts)).flatten(0, 1) for batch in batches]
        return torch.cat(outs)[places]


def mix(parts: Sequence[torch.Tensor], heads: DeltaHeads, samples: PackedSamples) -> torch.Tensor:
    """What out_proj reads [T, V], of what the projections make: query, key and value together [T, C], z [T, V], and the
    inputs of beta and of the decay [T, num_value].

    Rounded where transformers rounds (Qwen3_5GatedDeltaNet.forward).
    """
    mixed, z, b, a = parts
    query, key, value = _convolved(mixed, heads, samples).split(heads.widths, dim=1)
    query, key = (part.unflatten(1, (heads.num_key, heads.key_size)) for part in (query, key))
    repeats = heads.num_value // heads.num_key
    if repeats > 1:  # not every version of the two takes fewer keys than values
        query, key = (part.repeat_interleave(repeats, 1) for part in (query, key))
    value = value.unflatten(1, (heads.num_value, heads.value_size))
    decay = -heads.log_decay.float().exp() * F.softplus(a.float() + heads.gate_bias)
    out = _ruled((query, key, value, decay, b.sigmoid()), heads, samples)  # [T, num_value, value_size]
    normed = heads.norm(out.reshape(-1, heads.value_size), z.reshape(-1, heads.value_size))
    return normed.view(z.shape)


def _convolved(mixed: torch.Tensor, heads: DeltaHeads, samples: PackedSamples) -> torch.Tensor:
    """Each channel [T, C] over the last K tokens of the same sample."""
    kernel = kernel_for(CONVOLUTION, mixed.device, mixed.dtype)
    options: dict[str, Any] = {"weight": heads.weight, "bias": heads.bias, "activation": heads.activation}
    if kernel is None or heads.activation not in ACTIVATIONS:
        return samples.apart(lambda rows: heads.convolve(rows.transpose(1, 2), **options).transpose(1, 2), mixed)
    if mixed.stride(0) % ALIGNMENT:
        mixed = mixed.contiguous()
    return kernel(mixed.T[None], seq_idx=samples.numbers, **options)[0].T


def _ruled(parts: Sequence[torch.Tensor], heads: DeltaHeads, samples: PackedSamples) -> torch.Tensor:
    """[T, num_value, value_size] of query, key, value, decay and beta, by the rule."""

    def of_rows(*rows: torch.Tensor) -> torch.Tensor:
        return heads.rule(*rows[:3], g=rows[3], beta=rows[4], use_qk_l2norm_in_kernel=True)[0]

    kernel, why_not = rule_for(heads, parts[0].device, parts[0].dtype)
    if why_not:
        return samples.apart(of_rows, *parts)
    query, key, value, decay, beta = (part[None] for part in parts)
    options = {"use_qk_l2norm_in_kernel": True, "cu_seqlens": samples.cu_seqlens}
    return kernel(query, key, value, g=decay, beta=beta, **options)[0][0]


def kernel_for(place: tuple[str, str], device: torch.device, dtype: torch.dtype) -> Any:
    """The function of a package, RULE or CONVOLUTION; None where it is not installed or has no kernel for this."""
    return _imported(*place) if device.type == "cuda" and dtype != torch.float32 else None


def rule_for(heads: DeltaHeads, device: torch.device, dtype: torch.dtype) -> tuple[Any, str]:
    """The package's rule, and why it does not train heads of these sizes here, if it does not."""
    kernel = kernel_for(RULE, device, dtype)
    if kernel is None:
        return None, "without flash-linear-attention's kernel"
    return kernel, _refusal(kernel, (heads.num_value, heads.key_size, heads.value_size), device, dtype)


@cache
def _refusal(kernel: Callable[..., Any], sizes: tuple[int, int, int], device: torch.device, dtype: torch.dtype) -> str:
    """What flash-linear-attention says to zeros, forward and backward; nothing where it computes.

    On Hopper its backward pass alone refuses Triton 3.4 to 3.7.0, which compiles it wrongly (its chunk_bwd_dqkwg).
    """
    for tokens in TRIED:
        try:
            _try(kernel, sizes, tokens, {"device": device, "dtype": dtype, "requires_grad": True})
        except torch.OutOfMemoryError:
            if tokens == TRIED[-1]:
                raise
        except Exception as error:
            first_line = next(iter(str(error).splitlines()), type(error).__name__)
            return f"as flash-linear-attention refuses: {first_line}"
        else:
            break
    return ""


def _try(kernel: Callable[..., Any], sizes: tuple[int, int, int], tokens: int, new: dict[str, Any]) -> None:
    num_heads, key_size, value_size = sizes
    parts = [torch.zeros(1, tokens, num_heads, size, **new) for size in (key_size, key_size, value_size)]
    decay = torch.zeros(1, tokens, num_heads, **(new | {"dtype": torch.float32}))
    beta = torch.zeros(1, tokens, num_heads, **new)
    ends = torch.tensor([0, tokens], device=new["device"], dtype=torch.int32)
    with torch.enable_grad():
        out = kernel(*parts, g=decay, beta=beta, use_qk_l2norm_in_kernel=True, cu_seqlens=ends)[0]
        out.sum().backward()


@cache
def _imported(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name, None)
    except Exception:  # not installed; or whatever a build for another torch, Triton or CUDA raises: `told` says it
        return None


def torch_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """transformers' own code of a function, which it replaces by a package's kernel where that is installed."""
    return inspect.unwrap(function)


def told(heads: DeltaHeads, device: torch.device, dtype: torch.dtype) -> str:
    """What computes linear attention of these heads here, in words."""
    why_not = rule_for(heads, device, dtype)[1]
    rule = f"by torch code, {why_not}" if why_not else "by flash-linear-attention"
    has_convolution = kernel_for(CONVOLUTION, device, dtype) is not None
    convolution = "by causal-conv1d" if has_convolution else "by torch code, without causal-conv1d's kernel"
    return f"linear attention: the gated delta rule {rule}, its convolution {convolution}"

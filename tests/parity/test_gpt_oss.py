"""What gpt-oss alone has: clamped gates, attention with sinks, other swiglus refused."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from tests.parity.models import FAMILIES, close, packed
from train.collate import Part
from train.config import ModelConfig
from train.engine import attention, grouped
from train.engine.attention import PackedAttention
from train.engine.families import family_of
from train.engine.host_stream import HostBlocks
from train.engine.machine_memory import OwnMemory
from train.engine.split_attention import SplitAttention
from train.engine.support import unsupported_reason
from train.models.base import load_base


def test_clamped_gates_and_their_gradients() -> None:
    """Value, gradients and those of the factors are autograd's of transformers' gate, also where it is clamped."""
    experts = GptOssExperts(FAMILIES["gpt-oss"][0])
    gate_up, factors = (6 * torch.randn(9, 64)).requires_grad_(), torch.rand(9, requires_grad=True)
    assert (gate_up[:, ::2] > grouped.CLAMPED_LIMIT).any()
    assert (gate_up[:, 1::2].abs() > grouped.CLAMPED_LIMIT).any()
    wanted, upstream = experts._apply_gate(gate_up) * factors[:, None], torch.randn(9, 32)
    wanted.backward(upstream)
    place, grad, out = gate_up.detach().clone(), upstream.clone(), torch.empty(9, 32)
    grouped.scaled_gate(place, out, grouped.CLAMPED, factors.detach())
    of_factors = grouped.scaled_gate_backward(place, grad, grouped.CLAMPED, factors.detach())
    close(out, wanted.detach())
    close(grad, wanted.detach())
    for found, leaf in ((place, gate_up), (of_factors, factors)):
        assert leaf.grad is not None
        close(found, leaf.grad)


def scores_of(query: torch.Tensor, key: torch.Tensor, reach: int, scale: float, cu_seqlens: torch.Tensor) -> Any:
    """[heads, T, T], -inf where a token is not seen."""
    places = torch.arange(len(query))
    samples = torch.searchsorted(cu_seqlens, places, right=True)
    seen = (samples[:, None] == samples) & (places[:, None] >= places)
    seen &= places[:, None] - places <= (reach if reach >= 0 else len(query))
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    return (scale * torch.einsum("ihd,jhd->hij", query, key)).masked_fill(~seen, -math.inf)


def dense(states: list[torch.Tensor], sinks: torch.Tensor, reach: int, scale: float, ends: torch.Tensor) -> Any:
    """Attention [T, heads, D] by all scores and a softmax over them and the sink."""
    scores = scores_of(states[0], states[1], reach, scale, ends)
    whole = torch.cat([scores, sinks[:, None, None].expand(-1, scores.shape[1], 1)], 2).softmax(2)[..., :-1]
    value = states[2].repeat_interleave(states[0].shape[1] // states[2].shape[1], 1)
    return torch.einsum("hij,jhd->ihd", whole, value)


def flash_forward(query: Any, key: Any, value: Any, ends: Any, *rest: Any, **options: Any) -> tuple[torch.Tensor, ...]:
    """What torch's kernel returns: output, logs of the softmax's sums [heads, T], and what has no meaning here."""
    scores = scores_of(query, key, options["window_size_left"], options["scale"], ends)
    value = value.repeat_interleave(query.shape[1] // value.shape[1], 1)
    nothing = torch.empty(0)
    return torch.einsum("hij,jhd->ihd", scores.softmax(2), value), scores.logsumexp(2), nothing, nothing, nothing


def flash_backward(
    grad: Any, query: Any, key: Any, value: Any, out: Any, log_sum: Any, ends: Any, *rest: Any, **options: Any
) -> tuple[torch.Tensor, ...]:
    """As FlashAttention-2's algorithm 2: probabilities of scores and log_sum, what they lose on average of out."""
    scores = scores_of(query, key, options["window_size_left"], options["scale"], ends)
    repeats = query.shape[1] // key.shape[1]
    probabilities = (scores - log_sum[..., None]).exp()
    wide_key, wide_value = (each.repeat_interleave(repeats, 1) for each in (key, value))
    of_scores = torch.einsum("ihd,jhd->hij", grad, wide_value) - (grad * out).sum(2).T[..., None]
    of_scores *= options["scale"] * probabilities
    found = [
        torch.einsum("hij,ihd->jhd", of_scores, query).unflatten(1, (-1, repeats)).sum(2),
        torch.einsum("hij,ihd->jhd", probabilities, grad).unflatten(1, (-1, repeats)).sum(2),
    ]
    return torch.einsum("hij,jhd->ihd", of_scores, wide_key), *found


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("way", ["sample by sample", "flash"])
def test_sinks_are_one_more_score(way: str, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and gradients are those of a softmax over the seen scores and the sink.

    Of flash, which no CPU has, its published algorithm is in the place of the kernels.
    """
    batch, scale = packed(), 0.3
    states = [torch.randn(15, heads, 8, requires_grad=True) for heads in (4, 2, 2)]
    sinks, upstream = torch.randn(4) + 1, torch.randn(15, 4, 8)
    attend = PackedAttention(batch, window, scale)
    wanted = dense(states, sinks, attend.reach, scale, attend.cu_seqlens)
    expected = torch.autograd.grad(wanted, states, upstream)
    if way == "flash":
        monkeypatch.setattr(attention, "has_flash", lambda *_: True)
        monkeypatch.setattr(torch.ops.aten, "_flash_attention_forward", flash_forward)
        monkeypatch.setattr(torch.ops.aten, "_flash_attention_backward", flash_backward)
        monkeypatch.setattr(attend, "_sample_by_sample", None)
    query, key, value = states
    found = attend(query, key, value, sinks)
    close(found.detach(), wanted.detach())
    for gradient, exactly in zip(torch.autograd.grad(found, states, upstream), expected, strict=True):
        close(gradient, exactly)
    assert (found - attend(query, key, value)).norm() > 0.1 * found.norm()


def test_a_part_of_a_group_has_the_sinks_of_its_heads() -> None:
    """The second of two processes computes the second half of the heads."""
    seen: list[torch.Tensor] = []

    def keep(query: Any, key: Any, value: Any, sinks: Any = None, /) -> torch.Tensor:
        seen.append(sinks)
        return query

    query, key, value = (torch.randn(6, heads, 8) for heads in (4, 2, 2))
    SplitAttention(keep, Part(1, 2, torch.clone))(query, key, value, torch.arange(4))
    assert seen[0].tolist() == [2, 3]


def test_another_swiglu_is_refused() -> None:
    """By its numbers, which transformers 5.17 does not read from config.json."""
    base = T.AutoModelForCausalLM.from_config(FAMILIES["gpt-oss"][0])
    assert not unsupported_reason(base)
    for layer in base.model.layers:
        layer.mlp.experts.limit = 5.0
    assert "clamped_swiglu with 1.702 and 5.0" in unsupported_reason(base)
    assert family_of(base).router == "router"


def test_fp16_has_no_norm_in_fp32(tmp_path: Path) -> None:
    """transformers keeps this family's norms in fp32 beside fp16; the engine's matrices have the norms' type."""
    T.AutoModelForCausalLM.from_config(FAMILIES["gpt-oss"][0]).save_pretrained(tmp_path)
    plain: Any = T.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float16)
    assert plain.model.norm.weight.dtype == torch.float32
    host, config = HostBlocks([], OwnMemory(pin=False)), ModelConfig(str(tmp_path), quantization="none")
    base, _ = load_base(config, torch.float16, torch.device("cpu"), host, 0, False)
    assert {parameter.dtype for parameter in base.parameters()} == {torch.float16}

"""Linear attention by flash-linear-attention and causal-conv1d where they are installed, else by torch code."""

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers.models.qwen3_5 import modeling_qwen3_5

from tests.parity.hybrids import SHAPE, by_transformers, packed, passed, same, small_hybrid
from tests.parity.models import ALL_OF_BOTH, adapted_model
from train.engine import delta_rule
from train.engine.families import decoder_layers
from train.engine.layers import DeltaHeads


@pytest.fixture
def adapted() -> Any:
    return small_hybrid()


def heads_of(adapted: Any) -> DeltaHeads:
    """Those of its first block."""
    heads = decoder_layers(adapted.get_base_model())[0].heads
    assert isinstance(heads, DeltaHeads)
    return heads


def packages(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stand-ins for the packages, which take what those take, and isolate samples by it; and what was called."""
    called: list[str] = []

    def rule(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> tuple[torch.Tensor, None]:
        called.append("rule")
        assert query.shape[:3] == key.shape[:3] == value.shape[:3] == (1, *options["g"].shape[1:])
        cuts, outs = options.pop("cu_seqlens").tolist(), []
        gates = options.pop("g"), options.pop("beta")
        for start, stop in pairwise(cuts):
            parts = [part[:, start:stop] for part in (query, key, value, *gates)]
            own = delta_rule.torch_code(modeling_qwen3_5.torch_chunk_gated_delta_rule)
            outs.append(own(*parts[:3], g=parts[3], beta=parts[4], **options)[0])
        return torch.cat(outs, 1), None

    def convolution(x: torch.Tensor, weight: torch.Tensor, bias: Any, seq_idx: torch.Tensor, activation: str) -> Any:
        called.append("convolution")
        assert x.stride(1) == 1, "seq_idx needs channels last"
        assert x.stride(2) % 8 == 0
        assert seq_idx.dtype == torch.int32
        outs, width = [], weight.shape[1]
        for number in range(int(seq_idx.max()) + 1):
            own = x[:, :, seq_idx[0] == number]
            outs.append(F.conv1d(F.pad(own, (width - 1, 0)), weight[:, None], bias, groups=len(weight)))
        return F.silu(torch.cat(outs, 2))

    found = {delta_rule.RULE: rule, delta_rule.CONVOLUTION: convolution}
    monkeypatch.setattr(delta_rule, "kernel_for", lambda place, device, dtype: found[place])
    return called


def test_what_the_packages_are_told(adapted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where flash-linear-attention and causal-conv1d are installed: one row with its boundaries, the same numbers."""
    batch = packed()
    wanted = by_transformers(adapted, batch)
    called = packages(monkeypatch)
    same(passed(adapted, batch), wanted)
    # a trial of the rule; two blocks forward; the recomputed one and both backward passes again
    assert called == ["convolution", "rule", "rule", *["convolution", "rule"] * 4]
    assert delta_rule.told(heads_of(adapted), torch.device("cpu"), torch.float32) == (
        "linear attention: the gated delta rule by flash-linear-attention, its convolution by causal-conv1d"
    )


def test_a_package_that_does_not_train_is_left_alone(adapted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """flash-linear-attention refuses some versions of Triton, in its backward pass alone: torch code, and a reason."""

    class Refusing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, value: torch.Tensor) -> torch.Tensor:
            return value.clone()

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> Any:
            raise RuntimeError("Triton 3.6 is wrong here\nupgrade it")

    batch = packed()
    wanted = by_transformers(adapted, batch)
    packages(monkeypatch)
    rule = delta_rule.kernel_for(delta_rule.RULE, torch.device("cpu"), torch.float32)

    def refuses(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> Any:
        return Refusing.apply(rule(query, key, value, **options)[0]), None

    convolution = delta_rule.kernel_for(delta_rule.CONVOLUTION, torch.device("cpu"), torch.float32)
    found = {delta_rule.RULE: refuses, delta_rule.CONVOLUTION: convolution}
    monkeypatch.setattr(delta_rule, "kernel_for", lambda place, device, dtype: found[place])
    same(passed(adapted, batch), wanted)
    assert delta_rule.told(heads_of(adapted), torch.device("cpu"), torch.float32) == (
        "linear attention: the gated delta rule by torch code, as flash-linear-attention refuses: Triton 3.6 is wrong "
        "here, its convolution by causal-conv1d"
    )


def test_on_a_cpu_it_is_always_torch_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the packages are installed, and transformers' functions stand for their kernels."""
    monkeypatch.setattr(delta_rule, "_imported", lambda *place: pytest.fail("asked for a kernel"))
    assert delta_rule.kernel_for(delta_rule.RULE, torch.device("cpu"), torch.bfloat16) is None
    assert delta_rule.kernel_for(delta_rule.RULE, torch.device("cuda"), torch.float32) is None
    heads = heads_of(adapted_model(SHAPE, ALL_OF_BOTH))
    for function in (heads.rule, heads.convolve):
        assert function.__module__ == modeling_qwen3_5.__name__
        assert not hasattr(function, "__wrapped__")
    assert delta_rule.told(heads, torch.device("cpu"), torch.float32) == (
        "linear attention: the gated delta rule by torch code, without flash-linear-attention's kernel, "
        "its convolution by torch code, without causal-conv1d's kernel"
    )

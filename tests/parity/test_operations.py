"""Each function of the fused engine, forward and backward, computes what torch, PEFT or bitsandbytes computes."""

from collections.abc import Sequence
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
import torch.nn.functional as F

from tests.parity.models import close
from train.engine import operations
from train.engine.layers import Norm
from train.engine.linears import Projection
from train.engine.lora_linear import LoraGroup, dequantize
from train.engine.operations import Dropout, Rotation


@pytest.mark.parametrize(("is_centred", "is_offset"), [(False, False), (False, True), (True, False)])
def test_norms_and_their_gradients(is_centred: bool, is_offset: bool) -> None:
    """Value and input gradient are autograd's, added to what stands in the place."""
    x, weight, bias = torch.randn(7, 24, requires_grad=True), torch.randn(24), torch.randn(24)
    norm = Norm(weight, bias if is_centred else None, 1e-5, is_centred, is_offset, not is_centred and not is_offset)
    wanted = F.rms_norm(x, (24,), weight + is_offset, 1e-5)
    if is_centred:
        wanted = F.layer_norm(x, (24,), weight, bias, 1e-5)
    upstream, before = torch.randn(7, 24), torch.randn(7, 24)
    wanted.backward(upstream)
    wide, grad = torch.zeros(7, 30), before.clone()
    rstd = operations.normalize(x.detach(), norm, wide[:, :24])
    operations.normalize_backward(upstream, x.detach(), norm, rstd, grad, add=True)
    assert x.grad is not None
    close(wide[:, :24], wanted.detach())
    close(grad - before, x.grad)
    assert not wide[:, 24:].any()


@pytest.mark.parametrize("is_gated", [True, False])
@pytest.mark.parametrize("activation", operations.ACTIVATIONS)
def test_activations_and_their_gradients(activation: str, is_gated: bool) -> None:
    """Gradients replace their inputs, and the product its gradient."""
    gate_up = torch.randn(7, 24, requires_grad=True)
    wanted = operations.ACTIVATIONS[activation](gate_up[:, :12]) * (gate_up[:, 12:] if is_gated else 1.0)
    upstream = torch.randn(7, 12)
    wanted.backward(upstream)
    place, grad, out = torch.cat([gate_up.detach(), torch.ones(7, 3)], 1), upstream.clone(), torch.empty(7, 12)
    operations.gate(place, out, activation, is_gated)
    operations.gate_backward(place, grad, activation, is_gated)
    assert gate_up.grad is not None
    close(out, wanted.detach())
    close(grad, wanted.detach())
    num_columns = 24 if is_gated else 12
    close(place[:, :num_columns], gate_up.grad[:, :num_columns])
    assert torch.equal(place[:, num_columns:24], gate_up.detach()[:, num_columns:])
    assert (place[:, 24:] == 1).all()


@pytest.mark.parametrize(("num_pairs", "is_interleaved"), [(8, False), (4, False), (4, True)])
def test_turning_back_is_the_gradient_of_turning(num_pairs: int, is_interleaved: bool) -> None:
    """<turn(x), y> = <x, turn back(y)>, turning back undoes turning, and what is beyond the pairs stays."""
    angle = torch.randn(7, num_pairs)
    by = Rotation(angle.cos(), angle.sin(), 16, is_interleaved)
    x, y, turned, back = (torch.randn(7, 48) for _ in range(4))
    operations.rotate(x, turned, by)
    operations.rotate(y, back, by, sign=-1)
    assert (turned != x).float().mean() == 2 * num_pairs / 16
    torch.testing.assert_close((turned * y).sum(), (x * back).sum())
    operations.rotate(turned, back, by, sign=-1)
    torch.testing.assert_close(back, x)


def test_dropout_is_a_function_of_seed_and_place() -> None:
    """As many survive as p says, scaled; the same again for the same seed, others for another seed or place."""
    x = torch.ones(500, 400)
    masks = []
    for seed, place in ((1, 0), (1, 0), (2, 0), (1, 1)):
        out = torch.empty_like(x)
        operations.dropout(x, out, Dropout(0.25, torch.tensor(operations.mixed(seed)), place))
        assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
        assert (out > 0).float().mean() == pytest.approx(0.75, abs=0.005)
        masks.append(out > 0)
    assert torch.equal(masks[0], masks[1])
    rest = torch.empty(200, 400)
    operations.dropout(x[300:], rest, Dropout(0.25, torch.tensor(operations.mixed(1)), 0, first=300))
    assert torch.equal(rest > 0, masks[0][300:])
    for other in masks[2:]:  # independent: 0.75^2 + 0.25^2 agree
        assert (masks[0] == other).float().mean() == pytest.approx(0.625, abs=0.01)


def layers(bias: bool, quantized: bool, use_rslora: bool, targets: Sequence[str]) -> Any:
    """q, k and v as PEFT's layers with adapters that do something."""
    kind = (lambda i, o: bnb.nn.LinearNF4(i, o, bias=bias)) if quantized else (lambda i, o: torch.nn.Linear(i, o, bias))
    module = torch.nn.ModuleDict({"q": kind(64, 48), "k": kind(64, 24), "v": kind(64, 24)})
    module.to("cpu")  # bitsandbytes quantises here
    lora = peft.LoraConfig(r=3, lora_alpha=7, use_rslora=use_rslora, target_modules=list(targets))
    adapted: Any = peft.inject_adapter_in_model(lora, module)
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    return adapted


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("targets", [("q", "k", "v"), ("k",), ("q", "v")])
@pytest.mark.parametrize("num_tokens", [1, 13])
def test_a_group_is_its_layers(
    bias: bool, quantized: bool, use_rslora: bool, targets: tuple[str, ...], num_tokens: int
) -> None:
    """Output, input gradient and every adapter's gradient are PEFT's own, also behind the input in one buffer."""
    adapted = layers(bias, quantized, use_rslora, targets)
    x, upstream = torch.randn(num_tokens, 64, requires_grad=True), torch.randn(num_tokens, 96)
    wanted = torch.cat([adapted[name](x) for name in "qkv"], dim=1)
    wanted.backward(upstream)
    group = LoraGroup([Projection.of(adapted[name]) for name in "qkv"])
    matrix = torch.zeros(group.shape)
    group.fill_base(matrix, [base.weight for base in group.bases])
    for place, parameter, factor in group.adapter_places(matrix):
        place.copy_(parameter.detach() * factor)
    wide = torch.zeros(num_tokens, 64 + group.padded_rank)
    wide[:, :64] = x.detach()
    for read, low in ((wide[:, :64], wide[:, 64:]), (x.detach(), torch.empty(num_tokens, group.padded_rank))):
        out, grad_x = torch.empty(num_tokens, 96), torch.empty(num_tokens, 64)
        group.forward(matrix, read, low, out, None)
        close(out, wanted.detach())
        grad_out = torch.cat([upstream, torch.full((num_tokens, group.padded_rank), torch.nan)], dim=1)
        group.input_gradient(matrix, grad_out, None, grad_x)
        gradients = group.adapter_gradients(grad_out, read, low, None)
        assert x.grad is not None
        close(grad_x, x.grad)
        for found, parameter in zip(gradients, group.parameters, strict=True):
            assert parameter.grad is not None
            assert parameter.grad.norm() > 0
            close(found, parameter.grad)


def test_a_group_with_dropout_is_its_layers_with_the_same_masks() -> None:
    """PEFT's layers given our masks: the same output and gradients. Each layer has a mask of its own."""
    adapted = layers(False, False, False, ("q", "k", "v"))
    group = LoraGroup([Projection.of(adapted[name]) for name in "qkv"])
    drop = Dropout(0.3, torch.tensor(operations.mixed(7)), 8)
    masks = []
    for number in range(3):
        mask = torch.empty(13, 64)
        operations.dropout(torch.ones(13, 64), mask, drop, number)
        masks.append(mask)
    assert not torch.equal(masks[0], masks[1])
    x, upstream = torch.randn(13, 64, requires_grad=True), torch.randn(13, 96)
    outs = []
    for mask, name in zip(masks, "qkv", strict=True):
        layer = adapted[name]
        low = F.linear(x * mask, layer.lora_A["default"].weight)
        outs.append(layer.base_layer(x) + layer.scaling["default"] * F.linear(low, layer.lora_B["default"].weight))
    wanted = torch.cat(outs, dim=1)
    wanted.backward(upstream)
    matrix, low, out, grad_x = torch.zeros(group.shape), torch.empty(13, 64), torch.empty(13, 96), torch.empty(13, 64)
    group.fill_base(matrix, [base.weight for base in group.bases])
    for place, parameter, factor in group.adapter_places(matrix):
        place.copy_(parameter.detach() * factor)
    group.forward(matrix, x.detach(), low, out, drop)
    grad_out = torch.cat([upstream, torch.empty(13, group.padded_rank)], dim=1)
    group.input_gradient(matrix, grad_out, drop, grad_x)
    close(out, wanted.detach())
    assert x.grad is not None
    close(grad_x, x.grad)
    for found, parameter in zip(
        group.adapter_gradients(grad_out, x.detach(), low, drop), group.parameters, strict=True
    ):
        assert parameter.grad is not None
        close(found, parameter.grad)


@pytest.mark.parametrize("compress", [False, True])
def test_dequantised_weights_are_bitsandbytes(compress: bool) -> None:
    """To the bit, into a range of columns."""
    kind: Any = bnb.nn.Params4bit
    weight = kind(torch.randn(48, 128), requires_grad=False, compress_statistics=compress, quant_type="nf4")
    weight = weight.to("cpu")
    out = torch.zeros(48, 130)
    dequantize(weight, out[:, :128])
    assert torch.equal(out[:, :128], bnb.functional.dequantize_4bit(weight.data, weight.quant_state))


def kept_of_small_adapters(device: str) -> list[float]:
    """The share of an adapter's output of a thousandth that is there on average: in one buffer with the input, and
    not; in bf16."""
    adapted = layers(False, False, False, ("q",))
    group, num_tokens, shares = LoraGroup([Projection.of(adapted["q"])]), 2048, []
    matrix = torch.zeros(group.shape).normal_().bfloat16().to(device)
    matrix[:, 64:] *= 2.0**-13  # the adapter reads numbers of size 8
    x = torch.randn(num_tokens, 64).bfloat16().to(device)
    wide = x.new_zeros(num_tokens, 64 + group.padded_rank)
    wide[:, :64] = x
    for read, low in ((wide[:, :64], wide[:, 64:]), (x, x.new_empty(num_tokens, group.padded_rank))):
        out = x.new_empty(num_tokens, group.num_outputs)
        group.forward(matrix, read, low, out, None)
        weight = matrix[: group.num_outputs].double()
        wanted = low.double() @ weight[:, 64:].T
        found = out.double() - x.double() @ weight[:, :64].T
        shares.append(float((found * wanted).sum() / wanted.square().sum()))
        assert wanted.norm() < 0.002 * out.double().norm()
    return shares


def test_a_small_adapter_is_not_lost_in_rounding() -> None:
    """All of it is there, either way."""
    assert kept_of_small_adapters("cpu") == pytest.approx([1, 1], abs=0.05)

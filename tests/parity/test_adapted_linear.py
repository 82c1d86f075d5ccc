"""Our function in the place of PEFT's adapted linear layers gives PEFT's hidden states and gradients."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from accelerate import Accelerator

from tests.conftest import training_of
from tests.unit.models.test_agreement import SIZES, SPARSE, for_all_linear, write
from train.config import Config
from train.models import adapted_linear
from train.models.adapted_linear import restore_products, use_own_products
from train.models.agreement import random_adapters
from train.models.language_model import LanguageModel
from train.models.sample_check import TOLERANCE, SampleCheck, computed

IDS = list(range(5, 60))
SHAPES: dict[str, Any] = {
    "stablelm": lambda: T.StableLmConfig(**SIZES, use_qkv_bias=True),
    "gpt_neox": lambda: T.GPTNeoXConfig(**SPARSE, hidden_dropout=0.0, attention_dropout=0.0),
}


def model_of(config: Config, folder: Path, name: str = "stablelm", dtype: Any = "fp32") -> LanguageModel:
    config = for_all_linear(config, write(folder / "base", SHAPES[name]()))
    return training_of(replace(config, model=replace(config.model, dtype=dtype)), Accelerator(cpu=True)).model


def forwards(model: LanguageModel) -> int:
    return sum("forward" in vars(module) for module in model.adapted.modules())


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_products_are_peft_s(name: str, dtype: str, config: Config, tmp_path: Path) -> None:
    """Hidden states and gradients of layers with and without a bias; within rounding."""
    model = model_of(config, tmp_path, name, dtype)
    with random_adapters(model):
        check, wanted = SampleCheck(model, IDS), computed(model, IDS)
        assert use_own_products(model, IDS).startswith(f"adapters: {forwards(model)} layers")
        assert forwards(model) >= 8
        found = computed(model, IDS)
        assert not check.problem()
    if dtype == "bf16":
        assert not torch.equal(wanted[1], found[1])
    else:
        error = (wanted[1] - found[1]).norm() / wanted[1].norm()
        assert error < 1e-5 < TOLERANCE[torch.float32]


def test_products_of_an_nf4_base(config: Config, tmp_path: Path) -> None:
    """The dequantised weights are those that bitsandbytes multiplies by."""
    config = for_all_linear(config, write(tmp_path / "base", SHAPES["stablelm"]()))
    model = training_of(
        replace(config, model=replace(config.model, quantization="nf4", dtype="fp32")), Accelerator(cpu=True)
    ).model
    with random_adapters(model):
        wanted = computed(model, IDS)
        use_own_products(model, IDS)
        found = computed(model, IDS)
    assert forwards(model) == 14
    for one, two in zip(wanted, found, strict=True):
        assert (one - two).norm() < 1e-5 * one.norm()


def test_dropout_is_of_the_adapters_input_alone(config: Config, tmp_path: Path) -> None:
    """With dropout, gradients of the layer's input and of the adapter are autograd's of the same mask."""
    config = replace(config, lora=replace(config.lora, dropout=0.5))
    model = model_of(config, tmp_path)
    layer: Any = next(module for module in model.adapted.modules() if adapted_linear._is_plain(module, torch.float32))
    a, b, scale = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
    torch.nn.init.normal_(b)
    x = torch.randn(2, 7, layer.in_features, requires_grad=True)
    upstream = torch.randn(2, 7, layer.out_features)
    torch.manual_seed(1)
    mask = torch.nn.functional.dropout(torch.ones_like(x), 0.5)
    wanted = layer.base_layer(x) + scale * (x * mask) @ a.T @ b.T
    torch.manual_seed(1)
    found = adapted_linear._Forward(layer)(x)
    for one, two in zip(
        [wanted, *torch.autograd.grad(wanted, (x, a, b), upstream)],
        [found, *torch.autograd.grad(found, (x, a, b), upstream)],
        strict=True,
    ):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("name", ["stablelm", "gpt_neox"])
def test_a_small_adapter_is_not_lost_in_rounding(
    name: str, few: bool, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of an output, or an input's gradient, of a thousandth of the base's all is there on average; PEFT loses half."""
    monkeypatch.setattr(adapted_linear, "FEW_TOKENS", 0 if few else 4)
    model = model_of(config, tmp_path, name, "bf16")
    layers = [each for each in model.adapted.modules() if adapted_linear._is_plain(each, torch.bfloat16)]
    layer: Any = max(layers, key=lambda each: each.in_features)
    assert (layer.base_layer.bias is not None) == (name == "gpt_neox")
    a, b, base = layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.base_layer
    torch.manual_seed(0)
    base.weight.data.normal_()
    a.data, b.data = torch.randn_like(a).bfloat16().float(), torch.randn_like(b).bfloat16().float()
    scale = 2.0**-10 / layer.scaling["default"] / a.shape[0] ** 0.5
    b.data *= scale
    x = torch.randn(1, 1024, layer.in_features).bfloat16().requires_grad_()  # [1, T, K]
    upstream = torch.randn(1, 1024, layer.out_features).bfloat16()
    added = layer.scaling["default"] * b.detach().double() @ a.detach().double()  # [N, K]
    # what the base gives beside what the adapter adds, of the output and of the input's gradient
    plain = x.detach().double() @ base.weight.double().T + (0 if base.bias is None else base.bias.double())
    for forward, least, most in ((adapted_linear._Forward(layer), 0.93, 1.07), (layer.forward, 0.0, 0.7)):
        out = forward(x)
        (grad,) = torch.autograd.grad(out, x, upstream)
        kept = share_of(out.detach().double() - plain, x.detach().double() @ added.T)
        kept_grad = share_of(grad.double() - upstream.double() @ base.weight.double(), upstream.double() @ added)
        assert least < kept < most
        assert least < kept_grad < most


def share_of(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """How much of `wanted` there is in `found`."""
    return float((found * wanted).sum() / wanted.square().sum())


def too_much(b: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    return 1.1 * scale * b.to(dtype)


def fails(*_: Any) -> torch.Tensor:
    raise RuntimeError("no kernel for this card")


@pytest.mark.parametrize(("scaled", "reason"), [(too_much, "hidden states differ by"), (fails, "no kernel for this")])
def test_products_that_differ_are_taken_back(
    scaled: Any, reason: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter that counts for a tenth too much is noticed, as is an error; the model is PEFT's to the bit again."""
    model = model_of(config, tmp_path)
    monkeypatch.setattr(adapted_linear, "_scaled", scaled)
    wanted = computed(model, IDS)
    assert f"taken back ({reason}" in use_own_products(model, IDS)
    assert forwards(model) == 0
    assert all(torch.equal(one, two) for one, two in zip(wanted, computed(model, IDS), strict=True))


@pytest.mark.parametrize("factor", [1.0, 1.1])
def test_rounding_is_told_from_error(
    factor: float, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no tolerance but what another rounding changes, the products pass; adapters a tenth too large do not."""
    monkeypatch.setitem(TOLERANCE, torch.bfloat16, 0.0)
    own = adapted_linear._scaled
    monkeypatch.setattr(adapted_linear, "_scaled", lambda b, scale, dtype: own(b, factor * scale, dtype))
    assert ("taken back" in use_own_products(model_of(config, tmp_path, "gpt_neox", "bf16"), IDS)) == (factor > 1)


def test_the_base_answers_without_adapters(config: Config, tmp_path: Path) -> None:
    """Where PEFT switches adapters off, ours are off too; restored, all is PEFT's."""
    model = model_of(config, tmp_path)
    with random_adapters(model):
        use_own_products(model, IDS)
        with model.without_adapters(), torch.no_grad():
            off = computed_hidden(model)
        on = computed_hidden(model)
        restore_products(model)
        assert forwards(model) == 0
        with model.without_adapters(), torch.no_grad():
            assert torch.equal(off, computed_hidden(model))
        assert not torch.allclose(off, on)


def computed_hidden(model: LanguageModel) -> torch.Tensor:
    ids = torch.tensor([IDS])
    return model.causal_lm.base_model(
        input_ids=ids, position_ids=torch.arange(len(IDS))[None], use_cache=False, cu_seq_lens_q=None, max_length_q=0
    ).last_hidden_state.detach()

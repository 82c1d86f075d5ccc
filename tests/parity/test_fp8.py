"""fp8 products: what they compute, to the last digit; how far that is from exact ones; every way gives the same."""

from dataclasses import replace
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from accelerate import Accelerator

from tests.conftest import splits_of, training_of
from tests.parity.models import FAMILIES, NOTHING, adapted_model, close, gradients_of, packed, plan
from train.checkpoints.identity import differences, identity
from train.config import Config, EngineConfig, MemoryConfig
from train.deliver.finished import inference_plan
from train.engine import fp8
from train.engine.decoder import FusedDecoder
from train.engine.fp8 import E4M3, FORMS, Form, Fp8Group
from train.engine.linears import Adapter, Projection
from train.engine.lora_linear import LoraGroup, Pass
from train.engine.plan import Plan
from train.engine.support import not_in_fp8
from train.models.language_model import choose_engine, sketch
from train.run.exits import ExitWith
from train.step import optimizer_step

# without mixtures and Gemma 4, which are refused
DENSE = [name for name, (shape, _) in FAMILIES.items() if not hasattr(shape, "num_experts_per_tok")]
DENSE = [name for name in DENSE if "gemma4" not in name]
PLAIN = ["llama", "llama with biases", "some layers adapted", "qwen3", "phi3", "granite", "cohere2", "starcoder2"]


def in_e4m3(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What fp8 makes of x, in fp32."""
    return (x / scale).to(E4M3).float() * scale


def by_rows(x: torch.Tensor) -> torch.Tensor:
    return in_e4m3(x, x.abs().amax(1, keepdim=True) / 448)


def projections(bias: bool, quantized: bool) -> list[Projection]:
    """Two layers of 64 inputs, of unequal size, with adapters of rank 3."""
    made = []
    for num_outputs, size in ((32, 0.02), (48, 0.3)):
        layer: Any = torch.nn.Linear(64, num_outputs, bias=bias)
        layer.weight.data.normal_(0, size)
        if quantized:
            plain, layer = layer, bnb.nn.Linear4bit(64, num_outputs, bias=bias, compute_dtype=torch.float32)
            layer.load_state_dict(plain.state_dict())
            layer.to("cpu")
        layer.requires_grad_(False)
        a, b = (torch.nn.Parameter(torch.randn(shape) / 8) for shape in ((3, 64), (num_outputs, 3)))
        adapter = Adapter(a, b, 2.0, 0.0)
        made.append(Projection(layer, adapter))
    return made


def filled(group: LoraGroup, run: Pass) -> Any:
    matrix = group.new_matrix(torch.empty(0))
    assert group.begin(matrix, run) == (type(group) is LoraGroup)
    group.fill_base(matrix, [base.weight for base in group.bases])
    assert group.begin(matrix, run)
    for place, parameter, factor in group.adapter_places(matrix):
        place.copy_(parameter.detach() * factor)
    return matrix


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
def test_a_group_is_the_products_of_its_rounded_operands(bias: bool, quantized: bool) -> None:
    """Output and input gradient are those of W, x and dY rounded to e4m3, with the adapters as they are; the adapters'
    gradients are those of x itself."""
    layers = projections(bias, quantized)
    exact, group = LoraGroup(layers), Fp8Group(layers)
    reference, matrix = filled(exact, Pass.RECOMPUTED), filled(group, Pass.RECOMPUTED)
    weight = reference[:80, :64].clone()
    assert group.scale is not None
    assert weight.abs().max() / group.scale <= 448
    reference[:80, :64] = in_e4m3(weight, group.scale)
    assert not torch.equal(reference[:80, :64], weight)
    x, upstream = torch.randn(13, 64), torch.randn(13, 80)
    outs = []
    rounded, given = (by_rows(x), by_rows(upstream)), (x, upstream)
    for each, made, (read, grad_read) in ((exact, reference, rounded), (group, matrix, given)):
        low, out, grad_x = torch.empty(13, 64), torch.empty(13, 80), torch.empty(13, 64)
        each.forward(made, read, low, out, None)
        grad_out = torch.cat([grad_read, torch.empty(13, 64)], dim=1)
        each.input_gradient(made, grad_out, None, grad_x)
        outs.append((out, grad_x))
    up, down = reference[:80, 64:], reference[80:, :64]
    close(outs[1][0], outs[0][0] + (x - by_rows(x)) @ down.T @ up.T)
    close(outs[1][1], outs[0][1] + (upstream - by_rows(upstream)) @ up @ down)
    low = torch.zeros(13, 64)
    low[:, :6] = x @ down[:6].T
    grad_out = torch.cat([upstream, upstream @ up], dim=1)
    for ours, theirs in zip(
        group.adapter_gradients(grad_out, x, low, None), exact.adapter_gradients(grad_out, x, low, None), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_a_bias_without_adapters_is_added() -> None:
    """To the output of layers that have none."""
    layers = [Projection(each.base, None) for each in projections(True, True)]
    outs = []
    for group in (LoraGroup(layers), Fp8Group(layers)):
        matrix, out = filled(group, Pass.FORWARD), torch.empty(3, 80)
        group.forward(matrix, torch.zeros(3, 64), torch.empty(3, 0), out, None)
        outs.append(out)
    assert outs[0].any()
    assert torch.equal(outs[1], outs[0])


def test_both_forms_hold_the_same_numbers() -> None:
    """[K, N] is the transpose of [N, K]: the input gradient is that of the function that was computed."""
    matrix = filled(Fp8Group(projections(False, True)), Pass.RECOMPUTED)
    assert matrix.filled == {Form.ROWS, Form.COLUMNS}
    assert torch.equal(matrix.weights[Form.ROWS].float().T, matrix.weights[Form.COLUMNS].float())
    assert (matrix.weights[Form.ROWS].float() != 0).float().mean() > 0.9


@pytest.mark.parametrize(
    ("scale", "outlier", "most"), [(1.0, 1.0, 0.029), (1e-6, 1.0, 0.029), (1.0, 300.0, 0.02), (3e4, 1.0, 0.029)]
)
def test_rows_lose_two_bits_and_a_half_whatever_their_size(scale: float, outlier: float, most: float) -> None:
    """Rows of any magnitude differ by 2.6 % (norm); one with an outlier, which is exact, by less."""
    x = torch.randn(50, 1000) * scale
    x[:, 7] *= outlier
    rows = fp8.quantize(x)
    found = rows.values.float() * rows.scales
    assert 0 < (found - x).norm() / x.norm() < most
    assert torch.equal(rows.values.float().abs().amax(1), torch.full((50,), 448.0))


def test_rows_of_zeros_and_of_what_is_not_finite() -> None:
    """Zeros stay zeros; infinity and NaN stay in their row, so that a step with them is seen."""
    x = torch.ones(4, 32)
    x[0], x[1, 3], x[2, 3] = 0, torch.inf, torch.nan
    rows = fp8.quantize(x)
    found = rows.values.float() * rows.scales
    assert torch.equal(found[0], x[0])
    assert torch.equal(found[3], x[3])
    assert not found[1].isfinite().all()
    assert not found[2].isfinite().all()


def run(adapted: Any, how: Plan, upstream: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    engine = FusedDecoder(adapted.get_base_model(), how, NOTHING)
    batch = packed_once(adapted)
    out = engine(batch)
    out.backward(upstream)
    return out.detach(), gradients_of(adapted)


def packed_once(adapted: Any) -> Any:
    torch.manual_seed(1)
    return packed()


def fp8_plan(num_kept: int, num_cached: int, tile: int = 0) -> Plan:
    return replace(plan(num_kept, num_cached, tile), products="fp8")


@pytest.mark.parametrize("family", PLAIN)
def test_gradients_are_within_fp8_of_exact_ones(family: str) -> None:
    """Hidden states and all gradients together differ by some per cent, and by something. Norms behind a half amplify
    it in tiny models, so families with such are not among these."""
    adapted = adapted_model(*FAMILIES[family])
    upstream = torch.randn(15, 64)
    out, wanted = run(adapted, plan(2, 0), upstream)
    found_out, found = run(adapted, fp8_plan(2, 0), upstream)
    assert 0.001 < (found_out - out).norm() / out.norm() < 0.12
    flat, exact = (torch.cat([each[name].flatten() for name in wanted]) for each in (found, wanted))
    assert 0.001 < (flat - exact).norm() / exact.norm() < 0.25
    assert torch.dot(flat, exact) / (flat.norm() * exact.norm()) > 0.97


def test_kept_recomputed_and_cached_blocks_give_the_same_bits() -> None:
    """Whichever blocks keep activations or weights, and in tiles, whose gradients are summed in another order."""
    adapted, upstream = adapted_model(*FAMILIES["llama"]), torch.randn(15, 64)
    out, wanted = run(adapted, fp8_plan(1, 0), upstream)
    for how in (fp8_plan(2, 1), fp8_plan(3, 3), fp8_plan(3, 0)):
        found_out, found = run(adapted, how, upstream)
        assert torch.equal(found_out, out)
        for name, gradient in found.items():
            assert torch.equal(gradient, wanted[name]), name
    out, found = run(adapted, fp8_plan(2, 0, 4), upstream)
    for name, gradient in found.items():  # what is rounded in fp32 otherwise falls on another number of e4m3 at times
        assert (gradient - wanted[name]).norm() < 0.02 * wanted[name].norm()


@pytest.mark.parametrize("family", DENSE)
def test_products_that_stay_wide_are_the_exact_ones(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every product of the table in the compute type nothing is rounded; with any one in fp8 something is."""
    adapted, upstream = adapted_model(*FAMILIES[family]), torch.randn(15, 64)
    out, wanted = run(adapted, plan(1, 0), upstream)
    wide = {run: tuple(form and Form.WIDE for form in forms) for run, forms in FORMS.items()}
    for name, forms in wide.items():
        monkeypatch.setitem(fp8.FORMS, name, forms)
    found_out, found = run(adapted, fp8_plan(1, 0), upstream)
    close(found_out, out)
    for name, gradient in found.items():
        close(gradient, wanted[name])
    one_in_fp8 = (
        (Pass.FORWARD, (Form.ROWS, None)),
        (Pass.RECOMPUTED, (Form.ROWS, Form.WIDE)),
        (Pass.RECOMPUTED, (Form.WIDE, Form.COLUMNS)),
    )
    for name, forms in one_in_fp8:
        with monkeypatch.context() as patched:
            patched.setitem(fp8.FORMS, name, forms)
            found_out, found = run(adapted, fp8_plan(1, 0), upstream)
        assert torch.allclose(found_out, out, rtol=1e-4, atol=1e-5) == (name is not Pass.FORWARD)
        assert any((found[each] - wanted[each]).norm() > 1e-3 * wanted[each].norm() for each in wanted)


def test_a_checked_block_is_computed_exactly() -> None:
    """What is compared with transformers before the first step runs in the compute type."""
    adapted = adapted_model(*FAMILIES["llama"])
    blocks = []
    for how in (plan(1, 0), fp8_plan(1, 0)):
        engine = FusedDecoder(adapted.get_base_model(), how, NOTHING)
        store = engine.stack.store
        store.begin(engine.stack.forward_order)
        block = engine.stack.blocks[0]
        torch.manual_seed(2)
        context, x = engine.context(packed_once(adapted)), torch.randn(15, 64)
        matrices = store.matrices(0, Pass.CHECKED)
        blocks.append(block.finish(matrices, block.forward(matrices, x, context), context)[0])
    close(blocks[1].detach(), blocks[0].detach())


def test_where_fp8_is_not_offered(config: Config) -> None:
    """Each reason names the option; on a CPU it must be asked for, since there it only shows what a GPU computes."""
    wanted = replace(config, engine=EngineConfig(products="fp8"))
    sketched = sketch(wanted, torch.float32)
    with pytest.raises(ExitWith, match=r"there is no GPU; --engine\.kind fused multiplies the same numbers"):
        choose_engine(sketched, wanted, torch.device("cpu"))
    assert choose_engine(sketched, wanted, torch.device("cuda")) == (True, "")
    asked = replace(config, engine=EngineConfig("fused", products="fp8"))
    assert choose_engine(sketched, asked, torch.device("cpu")) == (True, "")
    exact = adapted_model(*FAMILIES["llama"]).get_base_model()
    assert not_in_fp8(exact) == "a layer of its blocks is not in NF4"
    assert "grouped" in not_in_fp8(adapted_model(*FAMILIES["qwen3-moe"]).get_base_model())
    assert "Gemma 4" in not_in_fp8(adapted_model(*FAMILIES["gemma4"]).get_base_model())
    odd = replace(asked, model=replace(asked.model, quantization="none"))
    with pytest.raises(ExitWith, match=r"--engine\.products fp8: a layer of its blocks is not in NF4; or leave it out"):
        choose_engine(sketch(odd, torch.float32), odd, torch.device("cpu"))


def test_steps_in_fp8_follow_exact_ones(config: Config) -> None:
    """A run's losses, checked against transformers at its start, stay within 2 % of those in the compute type, and the
    plan says how it multiplies."""
    losses = []
    for products in ("bf16", "fp8"):
        how = replace(config, engine=EngineConfig("fused", products=products))
        training = training_of(how, Accelerator(cpu=True))
        assert training.plan.products == products
        assert ("in fp8" in str(training.plan)) == (products == "fp8")
        losses.append([optimizer_step(training, step).loss for step in range(6)])
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize("products", ["bf16", "fp8"])
def test_a_run_keeps_its_products(products: Any, config: Config) -> None:
    """They are part of what makes a run this run; a checkpoint that says nothing of them was in the compute type."""
    prepared, data = splits_of(config).training.prepared, training_of(config, Accelerator(cpu=True)).data
    how = replace(config, engine=EngineConfig(products=products))
    saved, now = (identity(each, prepared, data, torch.device("cpu")) for each in (config, how))
    wanted = [] if products == "bf16" else ["engine.products bf16 -> fp8"]
    assert differences(saved, now) == wanted
    del saved["engine.products"]
    assert differences(saved, now) == wanted


def test_a_model_trained_in_fp8_answers_without_a_gpu(config: Config) -> None:
    """Whoever talks to it, compares or merges it may have another machine: only training needs the products."""
    trained = replace(config, engine=EngineConfig(products="fp8"), batch=replace(config.batch, context_parallel=8))
    wanted = inference_plan(config, torch.device("cpu"))
    assert inference_plan(trained, torch.device("cpu")) == wanted
    away = replace(trained, memory=MemoryConfig(offload="stream"))
    streamed = inference_plan(away, torch.device("cpu"))
    assert streamed.streamed
    assert (streamed.products, streamed.num_parts) == ("bf16", 1)

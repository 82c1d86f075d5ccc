"""fp8 products on a GPU that has them: kernels are their torch lines, products those of the rounded numbers, a run's
gradients those of bf16 within fp8's noise, eager or captured."""

from dataclasses import replace
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from accelerate import Accelerator

from tests.conftest import training_of, with_batch
from tests.gpu.kernel_calls import GPU, random
from tests.gpu.test_engine_cuda import gradient
from train.config import Config, EngineConfig, MemoryConfig
from train.engine import fp8_operations as fp8
from train.engine.fp8_operations import E4M3
from train.engine.operations import ACTIVATIONS, gate, gate_backward
from train.run import devices

HAS_FP8 = torch.cuda.is_available() and devices.capability(GPU) >= devices.FP8
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not HAS_FP8, reason="needs a GPU with fp8 products; the CPU suite covers the same code"),
]


@pytest.mark.parametrize("rank", [0, 16, 48])
@pytest.mark.parametrize("width", [576, 4096, 14336, 28672])
def test_quantised_rows_are_torch_s(width: int, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, with and without adapters' columns, with rows of zeros, infinity and NaN."""
    x, factors = random(77, width + 64), torch.tensor([0.5, 0.125], device=GPU)
    x[0], x[1, 3], x[2, 5], x[3] = 0, torch.inf, torch.nan, x[3] * 1e-8
    beside = fp8.Beside(x[:, width : width + rank], factors[1]) if rank else None
    if rank == 16:  # as with dropout, whose part of the gradient is added elsewhere
        beside = fp8.Beside(x.new_zeros(1, rank).expand(77, rank), factors[1])
    ours = fp8.quantize(x[:, :width], beside)
    monkeypatch.setattr(fp8, "kernels_for", lambda _: None)
    wanted = fp8.quantize(x[:, :width], beside)
    assert ours.values.shape == (77, width + 3 * rank)
    finite = torch.ones(77, dtype=torch.bool, device=GPU)
    finite[1:3] = False
    assert torch.equal(ours.scales[finite], wanted.scales[finite])
    assert torch.equal(ours.values[finite].view(torch.uint8), wanted.values[finite].view(torch.uint8))
    products = [(each.values.float() * each.scales)[~finite] for each in (ours, wanted)]
    assert all(not row.isfinite().all() for product in products for row in product)


@pytest.mark.parametrize("rank", [0, 48])
@pytest.mark.parametrize("width", [576, 3000, 14336])
@pytest.mark.parametrize("is_gated", [True, False])
def test_gates_make_rows_of_what_they_store(width: int, rank: int, is_gated: bool) -> None:
    """To the bit what a gate, or its gradient, and then `quantize` make; also where adapters' columns are largest."""
    gate_up, grad = random(77, (1 + is_gated) * width + 64), random(77, width)
    gate_up[0], gate_up[1, 3], grad[2, 5] = 0, torch.inf, torch.nan
    low_rank = random(77, 64)
    low_rank[5::7] *= 1000
    beside = fp8.Beside(low_rank[:, :rank], torch.tensor(0.5, device=GPU)) if rank else None
    for activation in ACTIVATIONS:
        product, other = (torch.zeros(77, width + 64, device=GPU).bfloat16() for _ in range(2))
        rows = fp8.gate_rows(gate_up, product[:, :width], activation, is_gated, rank)
        gate(gate_up, other[:, :width], activation, is_gated)
        same(product, other)
        same_rows(fp8.quantize(product[:, :width], beside, rows), fp8.quantize(other[:, :width], beside))
        one, two, upstream, again = gate_up.clone(), gate_up.clone(), grad.clone(), grad.clone()
        rows = fp8.gate_backward_rows(one, upstream, activation, is_gated, rank)
        gate_backward(two, again, activation, is_gated)
        same(one, two)
        same(upstream, again)
        read = slice((1 + is_gated) * width)
        same_rows(fp8.quantize(one[:, read], beside, rows), fp8.quantize(two[:, read], beside))


def same(one: torch.Tensor, two: torch.Tensor) -> None:
    """To the bit, but for the payload of NaN."""
    assert torch.equal(one.isnan(), two.isnan())
    assert torch.equal(one.nan_to_num(), two.nan_to_num())


def same_rows(one: fp8.Rows, two: fp8.Rows) -> None:
    same(one.scales, two.scales)
    same(one.values.float(), two.values.float())


@pytest.mark.parametrize("rank", [16, 48, 768])
def test_adapters_sizes_are_torch_s(rank: int) -> None:
    """Of columns of wider rows, whatever was measured before; NaN is larger than all."""
    up, down = random(1000, 768), random(768, 4096)
    up[997, rank - 1], down[rank - 1, 3] = -70.0, 90.0
    if rank < 768:
        up[0, rank] = down[rank, 0] = 1000.0  # not theirs
    sizes = fp8.AdapterSizes(torch.full((2,), 5000.0, device=GPU), torch.ones(2, device=GPU))
    fp8.measure(sizes, up[:, :rank], down[:rank].T)
    assert sizes.largest.tolist() == [70.0, 90.0]
    down[0, 4095] = torch.nan
    fp8.measure(sizes, up[:, :rank], down[:rank].T)
    assert sizes.largest[0] == 70.0
    assert sizes.largest[1].isnan()


@pytest.mark.parametrize("own", [0, 1])
@pytest.mark.parametrize("rank", [16, 48, 768])
def test_adapters_columns_are_torch_s(own: int, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, beside what stands before them."""
    up, down = random(1000, 768) * 3e-3, random(768, 4096) / 64
    side = (up[:, :rank], down[:rank].T)[own]
    largest = torch.stack([each.abs().max().float() for each in (up, down)])
    found = []
    for _ in range(2):
        sizes = fp8.AdapterSizes(largest, torch.ones(2, device=GPU))
        out = torch.ones(side.shape[0], 64 + 3 * rank, device=GPU).to(E4M3)
        width = (down.T, up)[own].shape[0]
        fp8.adapter_columns(side, sizes, own, torch.tensor(2.0**-11, device=GPU), width, out[:, 64:])
        assert (out[:, :64].float() == 1).all()
        found.append((out.float(), sizes.factors))
        monkeypatch.setattr(fp8, "kernels_for", lambda _: None)
    assert torch.equal(found[0][1], found[1][1])
    assert torch.equal(found[0][0], found[1][0])
    both = found[0][0][:, 64:]
    wanted = side.float() * found[0][1][own] * 2.0**11
    assert ((both[:, :rank] + both[:, rank : 2 * rank]) - wanted).norm() < 2**-8 * wanted.norm()


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("shape", [(1024, 4096), (208, 576), (4096, 14336)])
def test_weights_go_to_e4m3_in_one_launch(compress: bool, shape: tuple[int, int]) -> None:
    """Both forms are what bitsandbytes dequantises to in fp32, divided by the scale and rounded once."""
    kind: Any = bnb.nn.Params4bit
    options = {"requires_grad": False, "compress_statistics": compress, "quant_type": "nf4"}
    weight = kind(torch.randn(shape) * 0.02, **options).to(GPU)
    scale = fp8.scale_of([weight])
    weight.quant_state.dtype = torch.float32
    exact = bnb.functional.dequantize_4bit(weight.data, weight.quant_state) / scale
    assert 112 < exact.abs().max() <= 448  # a bound of two scales of scales may be loose by a power of two
    for with_along, with_across in ((True, True), (True, False), (False, True)):
        along = torch.zeros(shape[0], shape[1] + 48, dtype=E4M3, device=GPU)
        across = torch.zeros(shape[1], shape[0] + 64, dtype=E4M3, device=GPU)
        inner, outer = along[:, : shape[1]], across[:, : shape[0]]
        fp8.dequantize_e4m3(weight, scale, inner if with_along else None, outer if with_across else None)
        for is_wanted, found in ((with_along, inner), (with_across, outer.T)):
            # products of scale and level may round otherwise in the last bit of fp32
            other = found.float() != exact.to(E4M3).float() if is_wanted else found.float() != 0
            assert other.float().mean() < 1e-4
        assert not across[:, shape[0] :].float().any()
        assert not along[:, shape[1] :].float().any()


@pytest.mark.parametrize("num_tokens", [1, 77, 1408])
@pytest.mark.parametrize("widths", [(4096, 6144), (576, 960)])
@pytest.mark.parametrize("at_once", [True, False])
def test_products_are_those_of_the_rounded_numbers(
    num_tokens: int, widths: tuple[int, int], at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Into a range of wider rows, whose other columns stay, within bf16's last bit and what the tensor core adds;
    at once, where the card's kernel heeds the range, and through dense rows."""
    if not at_once:
        monkeypatch.setattr(fp8, "writes_ranges", lambda _: False)
        monkeypatch.setattr(fp8, "CHUNK_BYTES", 500 * 2 * widths[1])
    x, weight = fp8.quantize(random(num_tokens, widths[0])), random(widths[1], widths[0]).to(E4M3)
    scales = torch.full((1, max(widths)), 0.25, device=GPU)
    out = torch.zeros(num_tokens, widths[1] + 64, dtype=torch.bfloat16, device=GPU)
    fp8.scaled_product(x, weight.T, scales, out[:, : widths[1]])
    wanted = (x.values.float() @ weight.float().T) * x.scales * 0.25
    assert (out[:, : widths[1]].float() - wanted).norm() <= 5e-3 * wanted.norm()
    assert not out[:, widths[1] :].any()


def build(config: Config, products: Any, **changes: Any) -> Any:
    config = replace(config, run=replace(config.run, device="cuda"), engine=EngineConfig(products=products), **changes)
    return training_of(config, Accelerator())


def test_gradients_point_where_those_of_bf16_do(config: Config) -> None:
    """On an NF4 base, dropout off: loss within 2 %, gradients within fp8's noise."""
    ours, bf16 = (build(config, products) for products in ("fp8", "bf16"))
    assert ours.plan.products == "fp8"
    for step in range(3):
        one, two = gradient(ours, step), gradient(bf16, step)
        assert not torch.equal(one, two)
        assert torch.cosine_similarity(one, two, dim=0) > 0.95
        assert one.norm().item() == pytest.approx(two.norm().item(), rel=0.1)


def test_recomputed_streamed_and_captured_passes_agree(config: Config) -> None:
    """All blocks recomputed, with weights from the host, by CUDA graphs or eagerly: the gradients of kept blocks."""
    config = with_batch(config, 2, 4)
    kept = build(config, "fp8")
    others = [
        build(config, "fp8", memory=MemoryConfig(checkpointing="full")),
        build(config, "fp8", memory=MemoryConfig(checkpointing="full", offload="stream")),
    ]
    for step in range(4):  # the first is eager, later ones are replayed
        wanted = gradient(kept, step)
        for other in others:
            found = gradient(other, step)
            assert torch.cosine_similarity(found, wanted, dim=0) > 0.99

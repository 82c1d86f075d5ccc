"""What only a GPU can show of single functions: Triton kernels, cuDNN, the host's embedding."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import bitsandbytes as bnb
import pytest
import torch

from tests.gpu.kernel_calls import GPU, cross_entropy, dropout, gates, groups, norms, random, rotate
from train.collate import collate_packed
from train.engine import attention, grouped, lora_linear, operations
from train.engine.attention import PackedAttention
from train.engine.embedding import HostEmbedding
from train.engine.lora_linear import dequantize
from train.engine.machine_memory import OwnMemory
from train.engine.mxfp4 import dequantize_mxfp4, mxfp4_parameter
from train.engine.wide_heads import tile_bytes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; the CPU suite covers the same code"),
]


@pytest.mark.parametrize("operation", [norms, rotate, gates, dropout, cross_entropy, groups])
def test_kernels_are_their_torch_lines(
    operation: Callable[[], list[torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same inputs through Triton and through torch: equal up to bf16's last bit, also beside the written range."""
    assert operations.kernels_for(GPU) is not None
    torch.manual_seed(0)
    ours = operation()
    for module in (operations, grouped):
        monkeypatch.setattr(module, "kernels_for", lambda _: None)
    torch.manual_seed(0)
    for found, wanted in zip(ours, operation(), strict=True):
        assert (found.float() - wanted.float()).norm() <= 4e-3 * wanted.float().norm()


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("shape", [(1024, 4096), (256, 2048), (2048, 5632), (6, 96, 512)])
def test_one_launch_dequantises_as_bitsandbytes(compress: bool, shape: tuple[int, ...]) -> None:
    """To the bit, with nested scales and without, also of all experts at once."""
    assert lora_linear.kernels_for(GPU) is not None
    kind: Any = bnb.nn.Params4bit
    weight = kind(torch.randn(shape), requires_grad=False, compress_statistics=compress, quant_type="nf4").to(GPU)
    out = torch.zeros(*shape[:-2], shape[-2] + 64, shape[-1] + 64, device=GPU, dtype=torch.bfloat16)
    inside = out[..., : shape[-2], : shape[-1]]
    dequantize(weight, inside)
    wanted = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).to(torch.bfloat16)
    assert torch.equal(inside, wanted)
    inside.zero_()
    assert not out.any()


def test_the_embedding_in_host_memory() -> None:
    """The GPU reads the rows that it is asked for, and the weights take no GPU memory."""
    table = torch.randn(1000, 100, device=GPU, dtype=torch.bfloat16)
    embedding = HostEmbedding(table, OwnMemory(pin=True))
    assert not embedding.weight.is_cuda
    ids = torch.randint(1000, (3, 57), device=GPU)
    assert torch.equal(embedding(ids), table[ids])


def test_samples_of_one_length_go_to_cudnn(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN's attention and its gradients are varlen_attn's within bf16's noise."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("cuDNN is used on Hopper only")
    rows = [{"input_ids": [1] * 1024, "trained": [True] * 1024}] * 3
    batch: Any = collate_packed(rows).to(GPU)
    inputs = [random(3072, heads, 128).requires_grad_() for heads in (8, 2, 2)]
    upstream = random(3072, 8, 128)
    called: list[int] = []
    real: Any = attention.varlen_attn
    monkeypatch.setattr(attention, "varlen_attn", lambda *a, **k: called.append(1) or real(*a, **k))
    results = []
    for each in (batch, replace(batch, uniform_length=0)):
        out = PackedAttention(each, None, 128**-0.5)(inputs[0], inputs[1], inputs[2])
        results.append([out, *torch.autograd.grad(out, inputs, upstream)])
        assert len(called) == len(results) - 1
    for found, wanted in zip(*results, strict=True):
        assert (found.float() - wanted.float()).norm() < 1e-2 * wanted.float().norm()


@pytest.mark.parametrize("window", [None, 60])
def test_flash_with_sinks(window: int | None) -> None:
    """Output and gradients are those of fp32, where a sink is one more token, within bf16's noise."""
    rows = [{"input_ids": [1] * length, "trained": [True] * length} for length in (1, 300, 77)]
    batch, sinks = collate_packed(rows).to(GPU), random(8) + 2
    attend, upstream = PackedAttention(batch, window, 0.125), random(378, 8, 64)
    states = [random(378, heads, 64) for heads in (8, 2, 2)]
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        inputs = [each.to(dtype).requires_grad_() for each in states]
        out = attend(inputs[0], inputs[1], inputs[2], sinks.to(dtype))
        results.append([out, *torch.autograd.grad(out, inputs, upstream.to(dtype))])
    for found, wanted in zip(*results, strict=True):
        assert (found.float() - wanted).norm() < 1e-2 * wanted.norm()


def test_attention_of_wide_heads() -> None:
    """Output and gradients of heads of 512 are those of fp32 within bf16's noise; in the bytes that are planned."""
    lengths = (2048, 100, 700)
    rows = [{"input_ids": [1] * length, "trained": [True] * length} for length in lengths]
    attend = PackedAttention(collate_packed(rows).to(GPU), None, 0.05)
    states, upstream = [random(sum(lengths), heads, 512) for heads in (8, 2, 2)], random(sum(lengths), 8, 512)
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        inputs = [each.to(dtype).requires_grad_() for each in states]
        out = attend(inputs[0], inputs[1], inputs[2])
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results.append([out, *torch.autograd.grad(out, inputs, upstream.to(dtype))])
        if dtype == torch.bfloat16:
            taken = torch.cuda.max_memory_allocated() - before
            assert taken < tile_bytes(8, 2048) + 6 * upstream.nbytes
    for found, wanted in zip(*results, strict=True):
        assert (found.float() - wanted).norm() < 1e-2 * wanted.norm()


def test_one_launch_dequantises_mxfp4() -> None:
    """To the bit what torch's lines make of codes and powers, in rows wider than it."""
    blocks = torch.randint(256, (3, 70, 5, 16), dtype=torch.uint8, device=GPU)
    scales = torch.randint(100, 140, (3, 70, 5), dtype=torch.uint8, device=GPU)
    weight: Any = mxfp4_parameter(blocks, scales, torch.bfloat16)
    found, wanted = (torch.zeros(3, 80, 224, dtype=torch.bfloat16, device=GPU) for _ in range(2))
    dequantize(weight, found[:, :70, :160])
    dequantize_mxfp4(weight.data, weight.quant_state, wanted[:, :70, :160])
    assert torch.equal(found, wanted)

"""fp8 products into a range of wider rows, where torch's kernel heeds the stride of its output or does not."""

from typing import Any

import pytest
import torch

from train.engine import fp8
from train.engine.fp8 import E4M3


def test_a_product_is_written_where_it_belongs_by_kernels_that_write_dense_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where torch's kernel ignores the stride of its output (8.9), all of it comes through dense rows, in chunks."""
    x, weight, scales = fp8.quantize(torch.randn(50, 64)), torch.randn(32, 64).to(E4M3), torch.full((1, 64), 0.5)
    wanted, found = torch.zeros(50, 48), torch.zeros(50, 48)
    fp8.scaled_product(x, weight.T, scales, wanted[:, :32])
    multiply = fp8._multiply

    def dense_rows(a: Any, b: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
        multiply(a, b, scales, torch.as_strided(out, out.shape, (out.shape[1], 1)))

    monkeypatch.setattr(fp8, "_multiply", dense_rows)
    fp8.scaled_product(x, weight.T, scales, found[:, :32])
    assert not torch.equal(found, wanted)  # what such a kernel does
    found.zero_()
    monkeypatch.setattr(fp8, "writes_ranges", lambda _: False)
    monkeypatch.setattr(fp8, "CHUNK_BYTES", 20 * 32 * 4)  # the last chunk has ten rows
    fp8.scaled_product(x, weight.T, scales, found[:, :32])
    assert torch.equal(found, wanted)
    assert not found[:, 32:].any()


@pytest.mark.parametrize(
    ("capability", "cuda", "wanted"),
    [((9, 0), "13.0", True), ((9, 0), "12.9", True), ((9, 0), "12.8", False), ((8, 9), "13.0", False),
     ((10, 0), "13.0", False), ((12, 0), "13.0", False)],
)  # fmt: skip
def test_only_cublas_writes_ranges(
    capability: tuple[int, int], cuda: str, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On Hopper, in builds that have it for scales of rows."""
    monkeypatch.setattr(fp8.devices, "capability", lambda _: capability)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert fp8.writes_ranges(torch.device("cuda")) == wanted
    assert fp8.writes_ranges(torch.device("cpu"))

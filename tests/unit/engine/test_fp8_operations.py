"""Rows in e4m3; fp8 products into a range of wider rows, where torch's kernel heeds the stride of its output or not."""

from typing import Any

import pytest
import torch

from train.engine import fp8_operations as fp8
from train.engine.fp8_operations import E4M3


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

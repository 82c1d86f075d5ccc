"""benchmarks.fp8_layers: what it notes of each layer is what was rounded there; tried on a tiny model."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks import fp8_layers
from benchmarks.fp8_layers import LAYERS, Seen

OUTLIER = 3  # the element of every token that is made large


@pytest.fixture(scope="module")
def base(shape: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama whose first norm makes one element of what q, k and v read thirty times as large."""
    folder = tmp_path_factory.mktemp("fp8_layers") / "base"
    shutil.copytree(shape, folder)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(shape), dtype=torch.bfloat16)
    model.model.layers[0].input_layernorm.weight.data[OUTLIER] = 30
    model.save_pretrained(folder)
    return folder


def test_each_layer_has_its_figures(
    base: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Outliers are seen where they are; products are off by e4m3's rounding, gradients by more than bf16's."""
    out = tmp_path / "layers.json"
    words = ["--model", str(base), "--data", str(pairs), "--steps", "3", "--out", str(out), "--"]
    words += ["--batch.per_device", "2", "--batch.accumulation", "2"]
    monkeypatch.setattr(sys, "argv", ["fp8_layers", *words])
    fp8_layers.main()
    found = json.loads(out.read_text())
    rows = {(row["block"], row["layers"]): row for row in found["rows"]}
    assert list(rows) == [(block, name) for block in (0, 1) for name in LAYERS]
    most = {place: row["input_peak_most"] for place, row in rows.items()}
    assert most[0, LAYERS[0]] == pytest.approx(64**0.5, abs=0.1)  # one of 64 elements is all of the norm
    assert most[0, LAYERS[0]] > 1.5 * most[1, LAYERS[0]]
    assert rows[0, LAYERS[0]]["input_gradient_error"] is None  # of a frozen embedding
    for row in found["rows"]:
        assert row["input_peak"] <= row["input_peak_most"]
        assert row["gradient_peak"] <= row["gradient_peak_most"]
        errors = [row["product_error"], row["input_gradient_error"]]
        assert all(0.01 < error < 0.06 for error in errors if error is not None)
        assert 0.8 < row["fp8_cosine"] < row["bf16_cosine"] <= 1
        assert row["fp8_distance"] == pytest.approx((2 - 2 * row["fp8_cosine"]) ** 0.5, abs=0.1)
    fp32, bf16, fp8 = found["losses"].values()
    assert 0 < abs(bf16 - fp32) < abs(fp8 - fp32) < 0.1 * fp32
    told = capsys.readouterr().out
    assert f"| {LAYERS[0]}: median, worst |" in told
    assert told.count("\nblock ") == fp8_layers.WORST


def test_what_is_noted_is_added_up() -> None:
    """Two products: peaks of all tokens, one error over both; without a product no error."""
    seen = Seen()
    seen.note(torch.tensor([[2.0, 0.0, 0.0, 0.0]]), torch.tensor([[3.0]]), torch.tensor([[0.0]]))
    seen.note(torch.tensor([[1.0, 1.0, 1.0, 1.0]]), torch.tensor([[4.0]]), torch.tensor([[6.0]]))
    seen.note(torch.tensor([[0.0, 3.0, 0.0, 4.0], [0.0, 0.0, 0.0, 0.0]]), None, torch.tensor([[9.0]]))
    told = seen.told("peak", "error")
    assert told == {"peak": pytest.approx(1.6), "peak_most": 2.0, "error": pytest.approx((13 / 36) ** 0.5)}
    unseen = Seen()
    unseen.note(torch.ones(1, 4), None, torch.ones(1, 1))
    assert unseen.told("peak", "error")["error"] is None

"""benchmarks.fidelity compares runs in bf16 with fp32, step by step; tried on a tiny model."""

import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

from benchmarks.fidelity import MEASURES, SHARES, layer, main
from train.config import Config


def test_a_row_for_each_system_and_setting(
    config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both engines in fp32 agree closely, bf16 is further away; every measure has a number a step and a picture."""
    out = tmp_path / "fidelity.json"
    words = ["--base", config.model.name_or_path, "--data", config.data.path[0], "--steps", "2", "--seeds", "0"]
    words += ["--rates", "1e-3", "--quantizations", "none", "--out", str(out)]
    words += ["--", "--model.random_init", "true", "--data.max_length", "128", "--batch.accumulation", "1"]
    monkeypatch.setattr(sys, "argv", ["fidelity", *words])
    main()
    found = json.loads(out.read_text())
    rows = {row["system"]: row for row in found["rows"]}
    assert rows.keys() == {"fp32, fused", "bf16, fused", "bf16, reference"}
    assert all(len(row[measure]) == 2 for row in rows.values() for measure in MEASURES)
    control = max(rows["fp32, fused"]["gradient_at_fp32"])
    assert control < 1e-4
    for system in ("bf16, fused", "bf16, reference"):
        assert min(rows[system]["gradient_at_fp32"]) > 10 * control
    for measure in MEASURES:
        assert ElementTree.parse(tmp_path / f"fidelity_{measure}.svg").getroot().tag.endswith("svg")
    assert capsys.readouterr().out.count("at most:") == 3


def test_one_product_rounds_once() -> None:
    """It is as good as the exact result rounded; an output that is added to a rounded one is not."""
    rows = layer(torch.device("cpu"), size=256)
    assert [row["share"] for row in rows] == list(SHARES)
    for row in rows[1:]:  # where the adapter's own operands are not most of the error
        assert row["one product"] == pytest.approx(row["rounding"], rel=0.03)
        assert 1.05 * row["one product"] < row["added in fp32"] <= 1.01 * row["added in bf16"]

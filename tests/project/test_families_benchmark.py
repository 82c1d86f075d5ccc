"""What docs/PERFORMANCE.md says of the shapes of benchmarks/families.py: as measured, and as predicted."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.families import OPTIONS, RESULTS, SHAPES, line, longer_at, rate_here
from tests.conftest import ROOT
from train.cli import parse
from train.commands.forecast import assumed_lengths, forecast, parse_gpu
from train.memory.cluster import Cluster
from train.memory.outlook import GIB

WEIGHTS = {"Gemma-4-31B": 30.7e9, "Gemma-4-E4B": 7.5e9}  # the card's 30.7B; 8B without encoders


@pytest.mark.parametrize("name", WEIGHTS)
def test_gemma_4_fits_an_h200(name: str, tmp_path: Path) -> None:
    """As many weights as published; in NF4 nothing is streamed or recomputed, in the memory that the page says."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(SHAPES[name])
    assert model.num_parameters() == pytest.approx(WEIGHTS[name], rel=0.01)
    SHAPES[name].save_pretrained(tmp_path)
    words = ["--profile", "a100", "--model.name_or_path", str(tmp_path), "--engine.kind", "fused", *OPTIONS.split()]
    config = parse([*words, "--batch.accumulation", "4"])
    rows = assumed_lengths(config, config.data.max_length)
    found = forecast(config, parse_gpu("H200"), rows, None, Cluster(1, 1, 25.0))
    assert found.fits
    assert (len(found.plan.streamed), found.plan.num_kept) == (0, SHAPES[name].num_hidden_layers)
    said = f"{name.rpartition('-')[2]} {'takes ' if '31B' in name else ''}{found.plan.peak_bytes / GIB:.1f} GiB"
    assert said in (ROOT / "docs" / "PERFORMANCE.md").read_text(encoding="utf-8")


def test_the_table_holds_what_was_measured() -> None:
    """Each shape of the results is in one row with its GPU, tokens/s and peak; of 16 rows a step, where that is."""
    page = (ROOT / "docs" / "PERFORMANCE.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| [^|]+ \| ([\w.-]+) \| (H\d+) \| ([\d,]+) \| ([\d.]+) GiB \|$", page, re.MULTILINE)
    found = json.loads(RESULTS.read_text()).items()
    measured = {name: kinds.get("fused") or kinds["fused, 4 rows a step"] for name, kinds in found}
    wanted = {
        name: (found["gpu"].split()[1], f"{found['tokens_per_second']:,.0f}", f"{found['peak_gib']:.1f}")
        for name, found in measured.items()
    }
    assert {name: tuple(rest) for name, *rest in rows} == wanted
    assert len(rows) == len(wanted)


def test_a_slower_card_is_expected_to_take_longer(tmp_path: Path) -> None:
    """By less than its products are slower, as other parts of a step are not; of an unknown card nothing is known."""
    SHAPES["Llama-3.1-8B"].save_pretrained(tmp_path)
    words = ["--profile", "a100", "--model.name_or_path", str(tmp_path), "--engine.kind", "fused", *OPTIONS.split()]
    words += ["--batch.accumulation", "4"]
    assert longer_at(words, "NVIDIA H200", 715e12) == 1.0
    assert 1.1 < longer_at(words, "NVIDIA H200", 621e12) < 715 / 621
    assert longer_at(words, "Some Card", 1e12) == 1.0


def test_a_line_tells_of_the_rate() -> None:
    """The prediction by the table, and the one at the card's own rate; without a GPU there is no rate."""
    found = {"tokens_per_second": 1e4, "peak_gib": 10.0, "predicted_peak_gib": 10.1, "seconds": 2.0, "plan": "all kept"}
    found |= {"predicted_seconds": 1.8}
    assert "+1.0% memory, -10.0% time; all kept" in line("A", "fused", found)
    found |= {"predicted_seconds_at_rate": 2.04, "matmul_tflops": 621}
    assert "-10.0% time, +2.0% at its 621 TFLOP/s; all kept" in line("A", "fused", found)
    if not torch.cuda.is_available():
        assert rate_here() == 0.0

"""The plans that are chosen for a grid of models, lengths, GPUs, budgets and settings are those of before.

chosen_plans.json holds the models, the lengths, and one case a line. After a change that is meant to choose other
plans, write them anew and read the diff:

    python -m tests.unit.memory.test_chosen_plans
"""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from train.batching import LengthStatistics, MicroBatchShape
from train.config import BatchConfig, MemoryConfig
from train.memory.candidate import Job
from train.memory.gpus import KNOWN_GPUS, known_gpu
from train.memory.search import Planner
from train.memory.sizes import ModelSizes

PATH = Path(__file__).with_name("chosen_plans.json")
TABLE: dict[str, Any] = json.loads(PATH.read_text(encoding="utf-8"))


def chosen(case: dict[str, Any]) -> dict[str, Any]:
    """What is planned for a case, as the table has it; seconds in full precision."""
    sizes = ModelSizes(**TABLE["models"][case["model"]])
    rows = TABLE["rows"][case["rows"]]
    gpu = known_gpu(case["gpu"])
    assert gpu is not None
    gpu = gpu.computing(sizes.element_bytes == 4, case["deterministic"])
    if case["host_gib"]:
        gpu = replace(gpu, max_host_bytes=case["host_gib"] * 2**30)
    lengths = {"length_deviation": float(rows.get("length_deviation", 0.0))}  # JSON has no infinity, so it is a string
    statistics = LengthStatistics(**rows | lengths | {"longest": tuple(rows["longest"])})
    planner = Planner(Job(sizes, statistics, BatchConfig(**case["batch"]), gpu), MemoryConfig(**case["memory"]))
    budget = case["budget_gib"] and case["budget_gib"] * 2**30
    saved = MicroBatchShape(*case["saved"]) if case["saved"] else None
    plan = planner.best(budget, saved, case["min_streamed"])
    found = asdict(plan) | {"streamed": list(plan.streamed), "parts": [num_bytes for _, num_bytes in plan.parts]}
    found |= {"longest_row": planner.longest_row(budget)} if "longest_row" in case["plan"] else {}
    not_chosen = ("is_fused", "num_blocks", "num_linear", "num_parts", "num_sharing", "pair_cost", "products")
    return {name: value for name, value in found.items() if name not in not_chosen}


@pytest.mark.parametrize("gpu", sorted({case["gpu"] for case in TABLE["cases"]}))
def test_chosen_plans_are_those_of_before(gpu: str) -> None:
    """Every choice and every byte exactly, seconds to nine digits."""
    for case in TABLE["cases"]:
        if case["gpu"] == gpu:
            found, expected = chosen(case), case["plan"]
            assert found | {"seconds": 0} == expected | {"seconds": 0}, case
            assert found["seconds"] == pytest.approx(expected["seconds"], rel=1e-9, abs=0), case


def test_the_table_covers_what_can_be_chosen() -> None:
    """Every GPU, and both sides of every choice."""
    plans = [case["plan"] for case in TABLE["cases"]]
    assert {gpu.name for gpu in KNOWN_GPUS} == {case["gpu"] for case in TABLE["cases"]}
    for name in ("merges", "needs_host", "offloads_inputs", "uses_graphs", "mlp_tile", "num_cached", "streamed"):
        assert {bool(plan[name]) for plan in plans} == {False, True}, name
    num_blocks = {name: sizes["num_blocks"] for name, sizes in TABLE["models"].items()}
    for name in ("num_kept", "num_cached", "streamed"):
        counts = [(plan[name], num_blocks[case["model"]]) for case, plan in zip(TABLE["cases"], plans, strict=True)]
        assert any(1 < (len(some) if isinstance(some, list) else some) < blocks for some, blocks in counts), name
    assert {bool(case["saved"]) for case in TABLE["cases"]} == {False, True}


def write(table: dict[str, Any]) -> None:
    """One case a line."""
    head = json.dumps({"models": table["models"], "rows": table["rows"]}, indent=1)[:-2]
    cases = ",\n".join(json.dumps(case) for case in table["cases"])
    PATH.write_text(f'{head},\n "cases": [\n{cases}\n ]\n}}\n', encoding="utf-8")


if __name__ == "__main__":
    write(TABLE | {"cases": [case | {"plan": chosen(case)} for case in TABLE["cases"]]})

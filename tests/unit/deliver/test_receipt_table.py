"""Receipts on the terminal: every figure, its limit and the verdict, within 80 columns."""

import io
from typing import Any

from rich.console import Console

from train.deliver.receipt import Limits, Receipt
from train.deliver.receipt_table import show_files, show_merged

GOOD = Receipt("held out", 29, 1024, 1234.5, 1.2e-05, 0.5, 0.987, 10.4958, 11.4963, 8, 7)
POOR = Receipt("held out", 29, 1024, 44.0, 0.3, 2.9, 0.404, 10.4958, 12.5, 8, 0)


def printed(show: Any, *told: Any) -> list[str]:
    console = Console(file=io.StringIO(), width=80)
    show(console, *told)
    file: Any = console.file
    lines = file.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in file.getvalue(), "nothing is cut"
    return [" ".join(line.split()) for line in lines]


def test_a_merged_model_s_figures_have_limits_and_verdicts() -> None:
    """Each limit stands beside its figure, each is judged for itself, and merge_and_unload's are in a column."""
    lines = printed(show_merged, GOOD.as_json(), Limits(0.02, 0.99), POOR.as_json())
    assert "mean KL, nats 1.2e-05 <= 0.02 ok 0.3" in lines
    assert "top-1 agreement 98.7% >= 99% too far 40.4%" in lines
    assert "largest logit difference 1.2e+03 44" in lines
    assert "loss (trained: 10.4958) 11.4963 12.5000" in lines
    assert "equal greedy answers 7 of 8 0 of 8" in lines
    alone = printed(show_merged, POOR.as_json(), Limits(0.02, 0.4), None)
    assert "mean KL, nats 0.3 <= 0.02 too far" in alone
    assert "top-1 agreement 40.4% >= 40% ok" in alone
    assert not any("merge_and_unload" in line for line in alone)


def test_exported_files_are_judged_one_by_one() -> None:
    """Each file by its own limits; a long name is folded; without limits the figures stand alone."""
    name = f"{'long-name-' * 4}Q4_K_M.gguf"
    receipts = {"x-F16.gguf": GOOD.as_json(), name: POOR.as_json()}
    lines = printed(show_files, receipts, {"x-F16.gguf": Limits(0.02, 0.9), name: Limits(1.0, 0.5)})
    assert "x-F16.gguf 1.2e-05 <= 0.02 98.7% >= 90% 7 of 8 ok" in lines
    assert any(line.endswith("0.3 <= 1 40.4% >= 50% 0 of 8 too far") for line in lines)
    assert name in "".join(line.split()[0] for line in lines[-4:] if line)
    assert "x-F16.gguf 1.2e-05 98.7% 7 of 8" in printed(show_files, receipts, {})

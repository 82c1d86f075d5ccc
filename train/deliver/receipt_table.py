"""Receipts as tables for the terminal, at 80 columns: each figure with its limit and the verdict."""

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from train.deliver.receipt import Limits

KL, AGREEMENT = "mean KL, nats", "top-1 agreement"
JsonReceipt = Mapping[str, Any]  # as Receipt.as_json has it


def asked_of(receipt: JsonReceipt) -> str:
    """What the figures are of."""
    return (
        f"receipt: {receipt['num_positions']:,} predictions in {receipt['num_rows']} {receipt['kind']} rows, "
        "against base and adapter as trained"
    )


def show_merged(console: Console, receipt: JsonReceipt, limits: Limits, unloaded: JsonReceipt | None) -> None:
    """A merged model's figures, one a row, beside those of merge_and_unload where there are any."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("")
    for name in ("this model", "limit", "verdict", *(["merge_and_unload"] if unloaded else [])):
        table.add_column(name, justify="right", no_wrap=True)
    judged = {
        KL: (_at_most(limits), _verdict(limits.allows_kl(receipt["mean_kl"]))),
        AGREEMENT: (_at_least(limits), _verdict(limits.allows_agreement(receipt["agreement"]))),
    }
    others = _figures(unloaded) if unloaded else {}
    for name, figure in _figures(receipt).items():
        table.add_row(name, figure, *judged.get(name, ("", "")), *([others[name]] if unloaded else []))
    console.print(table)


def show_files(console: Console, receipts: Mapping[str, JsonReceipt], limits: Mapping[str, Limits]) -> None:
    """The figures of exported files, one file a row; without limits where they are not known."""
    table = Table(box=box.SIMPLE_HEAD, padding=0)  # names need the room
    table.add_column("file", overflow="fold")
    for name in ("mean KL", "limit", "agreement", "limit", "answers", "verdict"):
        if limits or name not in ("limit", "verdict"):
            table.add_column(name, justify="right", no_wrap=True)
    for name, found in receipts.items():
        kl, agreement, answers = f"{found['mean_kl']:.2g}", f"{found['agreement']:.1%}", _answers(found)
        if not limits:
            table.add_row(name, kl, agreement, answers)
            continue
        own = limits[name]
        verdict = _verdict(own.allows_kl(found["mean_kl"]) and own.allows_agreement(found["agreement"]))
        table.add_row(name, kl, _at_most(own), agreement, _at_least(own), answers, verdict)
    console.print(table)


def _figures(receipt: JsonReceipt) -> dict[str, str]:
    figures = {
        KL: f"{receipt['mean_kl']:.2g}",
        AGREEMENT: f"{receipt['agreement']:.1%}",
        "largest logit difference": f"{receipt['largest_difference']:.2g}",
        f"loss (trained: {receipt['loss_trained']:.4f})": f"{receipt['loss_served']:.4f}",
    }
    return {**figures, **({"equal greedy answers": _answers(receipt)} if receipt["num_questions"] else {})}


def _answers(receipt: JsonReceipt) -> str:
    return f"{receipt['equal_answers']} of {receipt['num_questions']}" if receipt["num_questions"] else "-"


def _at_most(limits: Limits) -> str:
    return f"<= {limits.max_kl:g}"


def _at_least(limits: Limits) -> str:
    return f">= {100 * limits.min_agreement:.4g}%"


def _verdict(is_allowed: bool) -> str:
    return "ok" if is_allowed else "too far"

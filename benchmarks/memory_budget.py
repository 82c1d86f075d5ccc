"""What a memory budget costs: the plan's predictions beside real steps on random weights, by shape and budget.

    python -m benchmarks.memory_budget --big FOLDER --small FOLDER --out benchmarks/results/memory_budget.json

The folders hold the config.json of Llama-3.1-8B and of TinyLlama-1.1B. Each case is what `handloop plan --probe`
does, its allocator held to the budget. Two cases are pairs, streamed and resident: with deterministic kernels, whose
losses and gradient norms must be equal to the bit, and with graphs, for the time.
`--picture FILE` draws tokens a second against the budget from the JSON and needs no GPU.
"""

import argparse
import gc
import json
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.interrupted_run import commit
from train.cli import parse
from train.commands.probe import probe
from train.run.exits import ExitWith
from train.run.versions import versions

ROOT = Path(__file__).resolve().parent.parent
LLAMA = ("--profile", "a100", "--lora.r", "16", "--lora.alpha", "32")
BIG = (*LLAMA, "--lora.dropout", "0")
ONE_ROW = ("--batch.per_device", "1", "--batch.accumulation", "4")
ROWS = (*BIG, *ONE_ROW)
LITERAL = ("--batch.merge", "off", "--memory.checkpointing", "full")  # the same work, streamed or not
RESIDENT = ("--memory.offload", "none")
SAME_BITS = ("--run.deterministic", "true")
SMALL = ("--profile", "4gb_tinyllama", "--lora.r", "16", "--lora.alpha", "32")
MORE_STEPS = 11  # where lengths differ some of them still record a graph, and the median must be none of those
BUDGETS = (3, 4, 6, 8, 12, 24)
PEAK_SHARE = 0.05  # the prediction may be off by


@dataclass(frozen=True)
class Case:
    """One probe."""

    shape: str  # 8b or tinyllama
    words: tuple[str, ...]
    budget_gib: float = 0.0  # 0: what is free
    max_length: int = 2048
    mean_length: int = 0  # 0: all rows have max_length
    num_steps: int = 4


CASES = {
    **{f"budget {gib}": Case("8b", ROWS, gib) for gib in BUDGETS},
    "literal 4": Case("8b", (*ROWS, *LITERAL), 4),
    "literal resident": Case("8b", (*ROWS, *LITERAL, *RESIDENT)),
    "bits 4": Case("8b", (*ROWS, *LITERAL, *SAME_BITS), 4, num_steps=1),
    "bits resident": Case("8b", (*ROWS, *LITERAL, *RESIDENT, *SAME_BITS), num_steps=1),
    "dropout 4": Case("8b", (*LLAMA, *ONE_ROW, "--lora.dropout", "0.05"), 4),
    "long 4": Case("8b", ROWS, 4, 9000),
    "longer 4": Case("8b", ROWS, 4, 13000),  # in tiles
    "small 4": Case("tinyllama", SMALL, 4, 512, 211, MORE_STEPS),
    "small 2": Case("tinyllama", SMALL, 2, 512, 211, MORE_STEPS),
    "short rows": Case("8b", BIG, 0, 512, 167, MORE_STEPS),
    "packed 37": Case("8b", (*BIG, "--batch.per_device", "4"), 37),
    "small fp16": Case("tinyllama", (*SMALL, "--model.dtype", "fp16"), 4, 512, 211, MORE_STEPS),
    "small fp32": Case("tinyllama", (*SMALL, "--model.dtype", "fp32"), 4, 512, 211),
    "small int8": Case("tinyllama", (*SMALL, "--model.quantization", "int8"), 4, 512, 211, 2),
    "small reference": Case("tinyllama", (*SMALL, "--engine.kind", "reference"), 4, 512, 211, 2),
}


def main() -> None:
    """Runs the cases, adds their rows to the JSON and prints the table; or draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--big", type=Path, help="folder with Llama-3.1-8B's config.json")
    parser.add_argument("--small", type=Path, help="folder with TinyLlama-1.1B's config.json")
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=CASES)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "memory_budget.json")
    parser.add_argument("--picture", type=Path, help="draw this SVG instead")
    options = parser.parse_args()
    if options.picture:
        options.picture.write_text(picture(json.loads(options.out.read_text())["rows"]), encoding="utf-8")
        return
    found = json.loads(options.out.read_text()) if options.out.exists() else {"rows": []}
    bus = bus_rate()
    release()
    for name in options.cases:
        case = CASES[name]
        row = run(name, case, options.big if case.shape == "8b" else options.small)
        if row is None:
            continue
        row["bus_gb_per_second"] = round(bus / 1e9, 1)
        found["rows"] = [each for each in found["rows"] if each["case"] != name] + [row]
        found |= {"device": torch.cuda.get_device_name()}
        found |= {"versions": versions()}
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    table(found)


def run(name: str, case: Case, shape: Path) -> dict[str, Any] | None:
    """The row of one case, or None where its probe failed, which is shown; all cases share this process."""
    words = [
        *case.words,
        "--data.max_length",
        str(case.max_length),
        "--model.name_or_path",
        str(shape),
        "--track.wandb",
        "off",
    ]
    words += ["--memory.budget", f"{case.budget_gib}GiB"] if case.budget_gib else []
    start = time.perf_counter()
    try:
        measured = probe(parse(words), case.mean_length or case.max_length, case.num_steps)
    except (ExitWith, RuntimeError):
        print(f"{name} failed: {traceback.format_exc()[-2500:]}", flush=True)
        return None
    finally:
        release()
    row = {"case": name, "shape": case.shape, "budget_gib": case.budget_gib, "settings": " ".join(case.words)}
    row |= {"commit": commit(), **measured}
    print(f"{name}: {line(row)} ({time.perf_counter() - start:.0f} s)", flush=True)
    return row


def release() -> None:
    """Nothing of a case is left for the next: no memory, no cap, no deterministic kernels."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()  # which the next plan counts as well
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.use_deterministic_algorithms(False)


def line(row: dict[str, Any]) -> str:
    """One row for people."""
    return (
        f"{row['tokens_per_second']:,.0f} tokens/s, {row['seconds']:.3f} s a step ({row['predicted_seconds']:.3f} "
        f"predicted), peak {row['peak_gib']:.2f} GiB ({row['predicted_peak_gib']:.2f} predicted, "
        f"{row['reserved_gib']:.2f} reserved), "
        f"host {row['host_gib']:.1f} GiB, {row['num_streamed']} streamed, passes of {row['micro_batch_tokens']}"
        + (f", {row['alloc_retries']} retries of the allocator" if row.get("alloc_retries") else "")
    )


def table(found: dict[str, Any]) -> None:
    """Prints all rows, whether the bits are equal, and how well copies hide."""
    rows = {row["case"]: row for row in found["rows"]}
    for name, row in rows.items():
        print(f"{name:18} {line(row)}")
    if {"bits 4", "bits resident"} <= rows.keys():
        one, other = rows["bits 4"], rows["bits resident"]
        same = (one["losses"], one["grad_norms"]) == (other["losses"], other["grad_norms"])
        print(f"streamed and resident, deterministic: losses and gradient norms {'equal' if same else 'DIFFER'}")
    if {"literal 4", "literal resident"} <= rows.keys():
        streamed, resident = rows["literal 4"], rows["literal resident"]
        moved = 4 * streamed["traffic_gib"] * 2**30 / (streamed["bus_gb_per_second"] * 1e9)
        bound = max(resident["seconds"], moved)
        print(
            f"a step streamed {streamed['seconds']:.3f} s, resident {resident['seconds']:.3f} s, copies alone "
            f"{moved:.3f} s: {streamed['seconds'] / bound - 1:+.1%} over the larger"
        )
    for row in rows.values():
        if row["predicted_peak_gib"]:
            off = row["predicted_peak_gib"] / row["peak_gib"] - 1
            print(f"{row['case']:18} prediction {off:+.1%}{'' if abs(off) <= PEAK_SHARE else '  MORE THAN 5 %'}")


def bus_rate() -> float:
    """Bytes a second from pinned host memory to the GPU."""
    host = torch.empty(2**28, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(2**28, dtype=torch.uint8, device="cuda")
    for _ in range(3):
        device.copy_(host, non_blocking=True)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(20):
        device.copy_(host, non_blocking=True)
    torch.cuda.synchronize()
    return 20 * 2**28 / (time.perf_counter() - start)


def picture(rows: list[dict[str, Any]]) -> str:
    """An SVG: tokens a second of Llama-3.1-8B against the budget."""
    points = sorted((row["budget_gib"], row["tokens_per_second"]) for row in rows if row["case"].startswith("budget "))
    left, bottom, width, height = 70, 290, 560, 240
    top = max(speed for _, speed in points)
    scale = 2000 * (1 + int(top) // 2000)

    def place(gib: float, speed: float) -> tuple[float, float]:
        return left + width * gib / 26, bottom - height * speed / scale

    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" width="680" height="350" font-family="sans-serif" font-size="13">',
        '<rect width="680" height="350" fill="white"/>',
        '<text x="340" y="24" text-anchor="middle" font-size="15">Llama-3.1-8B, rows of 2,048 tokens: '
        "tokens a second by memory budget</text>",
    ]
    for speed in range(0, scale + 1, 4000):
        x, y = place(0, speed)
        parts.append(f'<line x1="{x}" y1="{y}" x2="{x + width}" y2="{y}" stroke="#ddd"/>')
        parts.append(f'<text x="{x - 8}" y="{y + 4}" text-anchor="end">{speed:,}</text>')
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))
    parts.append(f'<polyline points="{path}" fill="none" stroke="#1f6feb" stroke-width="2"/>')
    for gib, speed in points:
        x, y = place(gib, speed)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#1f6feb"/>')
        parts.append(f'<text x="{x:.1f}" y="{y - 10:.1f}" text-anchor="middle">{speed:,.0f}</text>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{gib:g}</text>')
    parts.append(f'<text x="{left + width / 2}" y="{bottom + 42}" text-anchor="middle">memory budget, GiB</text></svg>')
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    main()

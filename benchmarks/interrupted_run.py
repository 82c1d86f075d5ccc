"""Kills a run in its second epoch, repeats the command, and compares it with the run that was left alone.

    python -m benchmarks.interrupted_run --out benchmarks/results/NAME.json -- --profile a100 --data.path reports/ ...

Everything behind `--` goes to train/main.py. Writes speed, memory, the loss of every step before and after the kill,
and whether the two runs agree to the bit (on a GPU add --run.deterministic true).
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from train.run.exits import ExitCode
from train.run.folder import RunFolder
from train.run.versions import versions
from train.track.metrics_file import read_metrics

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Runs, kills, resumes, compares, writes the JSON and prints a short table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kill-in-epoch", type=int, default=2)
    parser.add_argument("words", nargs="+", help="arguments for train/main.py, behind --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        whole, broken = Path(scratch) / "whole", Path(scratch) / "broken"
        seconds = {"whole": start([*options.words, "--run.dir", str(whole)])}
        reference = read_metrics(RunFolder(whole).metrics)
        epoch_steps = sum(row["epoch"] <= 1 for row in reference)
        kill_after = (options.kill_in_epoch - 1) * epoch_steps + max(1, epoch_steps // 2)
        words = [*options.words, "--run.dir", str(broken)]
        start(words, kill_after=kill_after)
        lost = read_metrics(RunFolder(broken).metrics)
        seconds["resumed"] = start(words)
        resumed = read_metrics(RunFolder(broken).metrics)
        same_adapter = adapter(whole) == adapter(broken)
    report = summarise(reference, lost, resumed, epoch_steps) | {
        "command": " ".join(["train/main.py", *options.words]),
        "adapters_bitwise_equal": same_adapter,
        "process_seconds": seconds,
        "versions": versions(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "commit": commit(),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for key in (
        "tokens_per_second",
        "peak_allocated_gib",
        "peak_reserved_gib",
        "killed_after_step",
        "resumed_from_step",
    ):
        print(f"{key:>28}  {report[key]}")
    for key in ("losses_bitwise_equal", "adapters_bitwise_equal", "largest_loss_difference", "process_seconds"):
        print(f"{key:>28}  {report[key]}")
    print("losses", [round(loss, 4) for loss in report["loss_by_step"]])


def start(words: list[str], kill_after: int = 0) -> float:
    """Seconds of one whole run of the command, or of its life until SIGKILL after so many steps."""
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, str(ROOT / "train" / "main.py"), *words], cwd=ROOT)
    metrics = RunFolder(Path(words[-1])).metrics
    while kill_after and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= kill_after):
        if process.poll() is not None:
            raise SystemExit(f"the run ended with {process.returncode} before step {kill_after}")
        time.sleep(0.02)
    if kill_after:
        process.send_signal(signal.SIGKILL)
    code = process.wait()
    if code != (-signal.SIGKILL if kill_after else ExitCode.FINISHED):
        raise SystemExit(f"the run ended with {code}")
    return round(time.monotonic() - began, 1)


def summarise(reference: list[Any], lost: list[Any], resumed: list[Any], epoch_steps: int) -> dict[str, Any]:
    """The figures; speed is the median over the steps after the first, which allocates and tunes."""
    pairs = zip(reference, resumed, strict=True)
    differences = [abs(one["train/loss"] - two["train/loss"]) for one, two in pairs]
    last = reference[-1]
    return {
        "tokens_per_second": round(statistics.median(row["perf/tokens_per_second"] for row in reference[1:]), 1),
        "median_step_seconds": statistics.median(row["perf/step_seconds"] for row in reference[1:]),
        "tokens_per_step": statistics.median(row["data/tokens"] for row in reference[1:]),
        "mfu": statistics.median(row.get("perf/mfu", 0.0) for row in reference[1:]) or None,
        "peak_allocated_gib": last.get("memory/peak_allocated_gib"),
        "peak_reserved_gib": last.get("memory/peak_reserved_gib"),
        "steps": len(reference),
        "steps_per_epoch": epoch_steps,
        "killed_after_step": lost[-1]["step"],
        "resumed_from_step": epoch_steps * (lost[-1]["step"] // epoch_steps),
        "losses_bitwise_equal": not any(differences),
        "largest_loss_difference": max(differences),
        "loss_by_step": [row["train/loss"] for row in reference],
        "loss_by_step_resumed": [row["train/loss"] for row in resumed],
        "grad_norm_by_step": [row["train/grad_norm"] for row in reference],
    }


def adapter(run_dir: Path) -> bytes:
    """The bytes of the final weights."""
    return (RunFolder(run_dir).final / "adapter_model.safetensors").read_bytes()


def commit() -> str:
    """The project's commit, or what HANDLOOP_COMMIT says where the files were copied without their history."""
    known = os.environ.get("HANDLOOP_COMMIT")
    if known:
        return known
    answer = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return answer.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()

"""Kills a run at random moments again and again, and compares it with the run that was left alone.

    python -m benchmarks.killed_run --out benchmarks/results/NAME.json --kills 10 -- --profile a100 ...

Everything behind `--` goes to train/main.py, with deterministic kernels; choose --checkpoint.every so that there are
many checkpoints. The moments of the kills are drawn evenly, from late in loading to a few steps into training. Writes
the losses and weights compared to the bit, the time of every save and resume, the GPU memory with and without a resume,
and, with --twice, how far two runs without deterministic kernels lie apart.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.interrupted_run import ROOT, adapter, commit, start
from train.run.folder import RunFolder
from train.run.json_lines import last_step as last_metrics_step
from train.run.versions import versions
from train.track.metrics_file import read_metrics


def main() -> None:
    """Runs once whole, once with kills, perhaps once more without determinism; writes the JSON, prints a summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--twice", action="store_true", help="also without deterministic kernels, twice")
    parser.add_argument("words", nargs="+", help="arguments for train/main.py, behind --")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        whole, broken = Path(scratch) / "whole", Path(scratch) / "broken"
        exact = [*options.words, "--run.deterministic", "true"]
        seconds = start([*exact, "--run.dir", str(whole)])
        reference = read_metrics(RunFolder(whole).metrics)
        training = sum(column(reference, "perf/step_seconds")) + sum(column(reference, "perf/save_seconds"))
        loading = seconds - training
        moments = (0.7 * loading, loading + 2 * training / max(1, options.kills))
        kills = kill_until_done([*exact, "--run.dir", str(broken)], broken, options, moments)
        found = read_metrics(RunFolder(broken).metrics)
        report: dict[str, Any] = {
            "command": " ".join(["train/main.py", *options.words]),
            "seed": options.seed,
            "seconds_left_alone": seconds,
            "seconds_to_load": round(loading, 1),
            "kills": kills,
            "losses_bitwise_equal": losses(reference) == losses(found),
            "adapters_bitwise_equal": adapter(whole) == adapter(broken),
            "save_seconds": column(reference, "perf/save_seconds"),
            "peak_gib_left_alone": column(reference, "memory/peak_reserved_gib")[-1:],
            "peak_gib_after_resume": column(found, "memory/peak_reserved_gib")[-1:],
            "adapter_mib": round(len(adapter(whole)) / 2**20, 1),
            "versions": versions(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            "commit": commit(),
        }
        write(options.out, report)
        if options.twice:
            report["largest_loss_difference_without_determinism"] = apart(options.words, Path(scratch))
            write(options.out, report)
    print(json.dumps({key: value for key, value in report.items() if key not in ("command", "versions")}))


def write(out: Path, report: dict[str, Any]) -> None:
    """What is known so far, to the file."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def kill_until_done(
    words: list[str], run_dir: Path, options: Any, moments: tuple[float, float]
) -> list[dict[str, Any]]:
    """One record a start: when it was killed, how long it took to its first step, what it reached and left behind."""
    draw = random.Random(options.seed)
    kills: list[dict[str, Any]] = []
    command = [sys.executable, str(ROOT / "train" / "main.py"), *words]
    while True:
        before = last_step(run_dir)
        began = time.monotonic()
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        limit = draw.uniform(*moments) if len(kills) < options.kills else float("inf")
        first_step = None
        while process.poll() is None and time.monotonic() - began < limit:
            if first_step is None and wrote_after(run_dir, before, began):
                first_step = round(time.monotonic() - began, 1)
            time.sleep(0.05)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        code = process.wait()
        kills.append({"seconds": round(time.monotonic() - began, 1), "code": code, "first_step_after": first_step})
        kills[-1] |= {"step_reached": last_step(run_dir), "checkpoints": checkpoints(run_dir)}
        if code == 0:
            return kills
        if code != -signal.SIGKILL:
            raise SystemExit(f"the run ended with {code} after {len(kills)} kills")


def apart(words: list[str], scratch: Path) -> float:
    """The largest difference of a step's loss between two runs that are left alone, without deterministic kernels."""
    rows = []
    for name in ("one", "two"):
        start([*words, "--run.dir", str(scratch / name)])
        rows.append(losses(read_metrics(RunFolder(scratch / name).metrics)))
    return max(abs(a - b) for a, b in zip(*rows, strict=True))


def wrote_after(run_dir: Path, step: int, began: float) -> bool:
    """Whether this start has completed a step: metrics.jsonl was written since, and goes beyond its checkpoint."""
    metrics = RunFolder(run_dir).metrics
    if not metrics.exists():
        return False
    since = time.time() - (time.monotonic() - began)
    return metrics.stat().st_mtime > since and last_step(run_dir) > newest(run_dir)


def newest(run_dir: Path) -> int:
    """Step of the newest checkpoint folder, 0 where there is none."""
    return max((int(name[5:]) for name in checkpoints(run_dir)), default=0)


def checkpoints(run_dir: Path) -> list[str]:
    """Names of the checkpoint folders."""
    return sorted(path.name for path in RunFolder(run_dir).checkpoints.glob("step-*"))


def last_step(run_dir: Path) -> int:
    """The last step in metrics.jsonl."""
    return last_metrics_step(RunFolder(run_dir).metrics)


def losses(rows: list[Any]) -> list[float]:
    """The loss of every step."""
    return [row["train/loss"] for row in rows]


def column(rows: list[Any], name: str) -> list[float]:
    """What the rows hold under `name`."""
    return [row[name] for row in rows if name in row]


if __name__ == "__main__":
    main()

"""What fp8 products cost in quality: the same run with products in 16 bits and in fp8, several seeds, in turn.

    python -m benchmarks.fp8_quality [--ways bf16 fp8] [--seeds 0 1 2] [--epochs 3] [--data ROWS --held-out ROWS]

The base is SmolLM2-135M-Instruct in NF4 (python -m train.models.smollm2 makes it), or --base. Without --data the
bundled certification rows are trained and asked about in other wordings. Each run is the real job in a process of its
own. Of each are told: the mean loss of the last tenth of the steps, the held-out loss and the answers that are exact at
the end; and of each step's loss how far it lies from the same seed's in 16 bits. The held-out loss is that of the run's
own products, and that of its adapters with products in 16 bits, as they are used afterwards (a run that starts from
them measures it before its first step). The spread between seeds is the noise that a difference has to exceed. On a CPU
fp8 is emulated.

`forward`, `gradient` and `full` are fp8 with only those products rounded, or with sums in fp32 registers.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.interrupted_run import commit
from train.cli import parse
from train.engine import fp8, fp8_operations
from train.engine.fp8 import Form
from train.engine.lora_linear import Pass
from train.main import run
from train.models.smollm2 import name_or_path
from train.profiles import CERTIFICATION, HELD_OUT
from train.report.record import read_run
from train.report.summary import summary_of
from train.run.devices import device_name
from train.run.folder import RunFolder
from train.run.versions import versions
from train.track.metrics_file import read_metrics

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "fp8_quality.json"
WAYS = ("bf16", "fp8", "forward", "gradient", "full")
RECIPE = "--profile smollm2 --model.quantization nf4 --run.device auto --engine.kind fused --track.wandb off"
RECIPE += " --validate.general_text off --validate.num_questions 0 --checkpoint.every 1000000"


def main() -> None:
    """Runs every way with every seed, prints the table and writes the JSON."""
    if sys.argv[1:2] == ["--worker"]:
        return worker(sys.argv[2], sys.argv[3:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["bf16", "fp8"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--base", default=name_or_path())
    parser.add_argument("--data", nargs="+", default=CERTIFICATION, help="JSONL to train on")
    parser.add_argument("--held-out", default=HELD_OUT["smollm2"], help="JSONL to measure on")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("words", nargs="*", help="behind --: further options of train/main.py")
    options = parser.parse_args()
    words = [*RECIPE.split(), "--model.name_or_path", options.base, "--train.epochs", str(options.epochs)]
    words += ["--data.path", *options.data, "--data.validation_path", options.held_out]
    device = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    about = {"device": device, "commit": commit(), "versions": versions(), "words": words[: len(RECIPE.split())]}
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in options.ways}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in options.seeds:
            for way in options.ways:
                place = Path(scratch) / f"{way}-{seed}"
                own = [*words, *options.words, "--train.seed", str(seed), "--run.dir", str(place)]
                found[way].append({"seed": seed, **measured(way, own, place)})
                print(f"{way} seed {seed}: {told(found[way][-1])}", flush=True)
                options.out.write_text(json.dumps({**about, "runs": found}, indent=1) + "\n", encoding="utf-8")
    report(found)


def worker(way: str, words: list[str]) -> None:
    """The job itself."""
    if way == "forward":
        fp8.FORMS.update({Pass.BACKWARD: (None, Form.WIDE), Pass.RECOMPUTED: (Form.ROWS, Form.WIDE)})
    if way == "gradient":
        fp8.FORMS.update({Pass.FORWARD: (Form.WIDE, None), Pass.RECOMPUTED: (Form.WIDE, Form.COLUMNS)})
    if way == "full":
        fp8_operations.FAST_ACCUMULATION = False
    run(parse([*words, "--engine.products", "bf16" if way == "bf16" else "fp8"]))


def measured(way: str, words: list[str], place: Path) -> dict[str, Any]:
    """One run's figures."""
    worked(way, words)
    afterwards = place.with_name(f"{place.name}-afterwards")
    folder = RunFolder(place)
    own = ["--lora.init_from", str(folder.final), "--train.max_steps", "1", "--run.dir", str(afterwards)]
    worked("bf16", [*without(words, *own[::2]), *own])
    losses = [row.get("train/loss") for row in read_metrics(folder.metrics) if row["step"]]  # a skipped step has none
    known = [loss for loss in losses if loss is not None]
    of_run = read_run(place)
    asked = {kind: json.loads(path.read_text(encoding="utf-8")) for kind, path in folder.asked.items() if path.exists()}
    return {
        "losses": losses,
        "last_loss": statistics.fmean(known[-max(1, len(known) // 10) :]),
        "held_out_losses": list(of_run.held_out.values),
        "held_out_loss_in_16_bits": next(iter(read_run(afterwards).values("eval/loss")), None),
        "exact": {kind: [sum(row["exact"] for row in rows), len(rows)] for kind, rows in asked.items()},
        "tokens_per_second": summary_of(of_run).tokens_per_second,
    }


def worked(way: str, words: list[str]) -> None:
    """Runs the job in a process of its own; ends this one where it fails."""
    command = [sys.executable, "-m", "benchmarks.fp8_quality", "--worker", way, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{way} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def without(words: list[str], *options: str) -> list[str]:
    """A command line less these options and the value of each."""
    kept = zip(words, ["", *words], strict=False)
    return [word for word, before in kept if word not in options and before not in options]


def told(figures: dict[str, Any]) -> str:
    """A run in a line."""
    exact = ", ".join(f"{kind} {count} of {total}" for kind, (count, total) in figures["exact"].items())
    held_out = figures["held_out_losses"]
    afterwards = figures["held_out_loss_in_16_bits"] or math.nan
    return (
        f"{len(figures['losses'])} steps, last tenth's loss {figures['last_loss']:.4f}, held-out "
        f"{held_out[-1] if held_out else math.nan:.4f}, in 16 bits {afterwards:.4f}; exact: {exact}; "
        f"{figures['tokens_per_second']} tokens/s"
    )


def report(found: dict[str, list[dict[str, Any]]]) -> None:
    """Means over seeds with their spread, and each step's distance from the same seed's in 16 bits."""
    for way, runs in found.items():
        held_out = [each["held_out_losses"][-1] for each in runs if each["held_out_losses"]]
        last = [each["last_loss"] for each in runs]
        afterwards = [each["held_out_loss_in_16_bits"] for each in runs if each["held_out_losses"]]
        line = f"{way:9s} loss {_spread(last)}, held-out {_spread(held_out)}, in 16 bits {_spread(afterwards)}"
        for each, exact in zip(runs, found.get("bf16", []), strict=False):
            pairs = zip(each["losses"], exact["losses"], strict=True)
            apart = [one / other - 1 for one, other in pairs if None not in (one, other)]
            line += f"; seed {each['seed']}: {statistics.fmean(apart):+.3%} +- {statistics.pstdev(apart):.3%} a step"
        print(line)


def _spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.4f} +- {statistics.pstdev(values):.4f}" if values else "-"


if __name__ == "__main__":
    main()

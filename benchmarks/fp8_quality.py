"""What fp8 products cost in quality: the same run with products in 16 bits and in fp8, several seeds, in turn.

    python -m benchmarks.fp8_quality [--ways bf16 fp8] [--seeds 0 1 2] [--epochs 3] [--data ROWS --held-out ROWS]
    python -m benchmarks.fp8_quality --join FILE FILE ...

The base is SmolLM2-135M-Instruct in NF4 (python -m train.models.smollm2 makes it), or --base. Without --data the
bundled certification rows are trained and asked about in other wordings. Each run is the real job in a process of its
own. Of each are told: the mean loss of the last tenth of the steps, the held-out loss and the answers that are exact at
the end; and of each step's loss how far it lies from the same seed's in 16 bits. The held-out loss is that of the run's
own products, and that of its adapters with products in 16 bits, as they are used afterwards (a run that starts from
them measures it before its first step). The spread between seeds is the noise that a difference has to exceed. On a CPU
fp8 is emulated.

A run is added to the JSON as it ends, and one that is there, of whatever commit and device, is not repeated without
--again. Runs of another base, other data or other options are refused: they need an --out of their own. So do calls at
the same time, which would lose one another's runs; --join then adds the runs of all files to --out. --at-once runs
share a GPU, as a small model does not fill it; their speeds say nothing.

`forward`, `gradient` and `full` are fp8 with only those products rounded, or with sums in fp32 registers.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch

from benchmarks.interrupted_run import commit
from benchmarks.real_job import ROOT, digest
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
from train.run.durable import write_atomically
from train.run.exits import ExitCode, ExitWith
from train.run.folder import RunFolder
from train.run.last_words import say_end
from train.run.versions import versions
from train.track.metrics_file import read_metrics

RESULTS = ROOT / "benchmarks" / "results" / "fp8_quality.json"
WAYS = ("bf16", "fp8", "forward", "gradient", "full")
RECIPE = "--profile smollm2 --model.quantization nf4 --run.device auto --engine.kind fused --track.wandb off"
RECIPE += " --validate.general_text off --validate.num_questions 0 --checkpoint.every 1000000"
Row = dict[str, Any]


def main() -> None:
    """Runs every way with every seed, or joins files; writes the JSON and prints the table."""
    if sys.argv[1:2] == ["--worker"]:
        return worker(sys.argv[2], sys.argv[3:])
    options = parsed()
    try:
        if options.join:
            found = joined([*([options.out] if options.out.exists() else []), *options.join])
            written(options.out, found)
        else:
            found = joined([options.out], about(options)) if options.out.exists() else {**about(options), "rows": []}
            for row in rows_of(options, found["rows"]):
                added(found["rows"], row)
                written(options.out, found)
    except ExitWith as end:
        say_end(end)
        sys.exit(end.code)
    report(found["rows"])


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["bf16", "fp8"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--base", default=name_or_path())
    parser.add_argument("--data", nargs="+", default=CERTIFICATION, help="JSONL to train on")
    parser.add_argument("--held-out", default=HELD_OUT["smollm2"], help="JSONL to measure on")
    parser.add_argument("--at-once", type=int, default=1, metavar="N", help="runs on the GPU at the same time")
    parser.add_argument("--again", action="store_true", help="also runs that the JSON has")
    parser.add_argument("--join", nargs="+", type=Path, metavar="FILE", help="add these files' runs to --out instead")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("words", nargs="*", help="behind --: further options of train/main.py")
    return parser.parse_args()


def about(options: argparse.Namespace) -> dict[str, Any]:
    """What all runs of a file have alike, wherever the base and the data lie."""
    words = [*RECIPE.split(), "--train.epochs", str(options.epochs), *options.words]
    data = [[Path(each).name, digest(Path(each))] for each in (*options.data, options.held_out)]
    return {"base": Path(options.base).name, "words": words, "data_sha256": data}


def joined(files: Sequence[Path], wanted: dict[str, Any] | None = None) -> dict[str, Any]:
    """The runs of all files, a later one's in the place of an earlier one's.

    Raises ExitWith where a file has runs of something else than `wanted`, or than the first file.
    """
    found: dict[str, Any] = {**wanted, "rows": []} if wanted else {}
    for file in files:
        known = json.loads(file.read_text(encoding="utf-8"))
        if "rows" not in known:
            raise ExitWith(ExitCode.BAD_INPUT, f"{file} is no file of this benchmark's runs; take another --out")
        found = found or {**known, "rows": []}
        if other := [name for name in found if name != "rows" and found[name] != known.get(name)]:
            told = "; ".join(f"{name}: {known.get(name)}, not {found[name]}" for name in other)
            raise ExitWith(ExitCode.BAD_INPUT, f"{file} has runs of another job ({told}); take another --out for these")
        for row in known["rows"]:
            added(found["rows"], row)
    return found


def added(rows: list[Row], row: Row) -> None:
    """Puts a run among the others, in the place of the same one."""
    rows[:] = [each for each in rows if key_of(each) != key_of(row)] + [row]
    rows.sort(key=key_of)


def key_of(row: Row) -> tuple[int, int]:
    """What tells a file's runs apart, and their order."""
    return WAYS.index(row["way"]), row["seed"]


def written(out: Path, found: dict[str, Any]) -> None:
    """Whole or not at all: a run may be minutes."""
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, json.dumps(found, indent=1) + "\n")


def rows_of(options: argparse.Namespace, known: Sequence[Row]) -> Iterator[Row]:
    """Each run that is asked for and not known, as it ends; ends this process behind them where some failed."""
    words = [*RECIPE.split(), "--train.epochs", str(options.epochs), "--model.name_or_path", options.base]
    words += ["--data.path", *options.data, "--data.validation_path", options.held_out, *options.words]
    device = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    told = {"commit": commit(), "device": device, "at_once": options.at_once, "versions": versions()}
    asked: list[Row] = [{"way": way, "seed": seed, **told} for seed in options.seeds for way in options.ways]
    missing = {key_of(row): row for row in asked if options.again or key_of(row) not in map(key_of, known)}
    failed = []
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(options.at_once) as pool:
        runs = {pool.submit(measured, row["way"], row["seed"], words, Path(scratch)): row for row in missing.values()}
        try:
            for future in as_completed(runs):
                row = runs[future]
                if isinstance(error := future.exception(), RuntimeError):
                    failed.append(f"seed {row['seed']}, {error}")
                    continue
                row |= future.result()
                print(f"{row['way']} seed {row['seed']}: {line(row)}", flush=True)
                yield row
        finally:
            pool.shutdown(cancel_futures=True)
    if failed:
        raise SystemExit("\n".join(failed))


def worker(way: str, words: list[str]) -> None:
    """The job itself."""
    if way == "forward":
        fp8.FORMS.update({Pass.BACKWARD: (None, Form.WIDE), Pass.RECOMPUTED: (Form.ROWS, Form.WIDE)})
    if way == "gradient":
        fp8.FORMS.update({Pass.FORWARD: (Form.WIDE, None), Pass.RECOMPUTED: (Form.WIDE, Form.COLUMNS)})
    if way == "full":
        fp8_operations.FAST_ACCUMULATION = False
    run(parse([*words, "--engine.products", "bf16" if way == "bf16" else "fp8"]))


def measured(way: str, seed: int, words: list[str], scratch: Path) -> Row:
    """One run's figures; raises RuntimeError where it fails."""
    place = scratch / f"{way}-{seed}"
    words = [*words, "--train.seed", str(seed), "--run.dir", str(place)]
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
        "losses": [loss if loss is None else round(loss, 5) for loss in losses],
        "last_loss": statistics.fmean(known[-max(1, len(known) // 10) :]),
        "held_out_losses": list(of_run.held_out.values),
        "held_out_loss_in_16_bits": next(iter(read_run(afterwards).values("eval/loss")), None),
        "exact": {kind: [sum(row["exact"] for row in rows), len(rows)] for kind, rows in asked.items()},
        "tokens_per_second": summary_of(of_run).tokens_per_second,
    }


def worked(way: str, words: list[str]) -> None:
    """Runs the job in a process of its own; raises RuntimeError where it fails."""
    command = [sys.executable, "-m", "benchmarks.fp8_quality", "--worker", way, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{way} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")


def without(words: Sequence[str], *options: str) -> list[str]:
    """A command line less these options and the values of each, `--option value` or `--option=value`."""
    kept: list[str] = []
    is_left_out = False
    for word in words:
        if word.startswith("--"):
            is_left_out = word.partition("=")[0] in options
        if not is_left_out:
            kept.append(word)
    return kept


def line(figures: Row) -> str:
    """A run in a line."""
    exact = ", ".join(f"{kind} {count} of {total}" for kind, (count, total) in figures["exact"].items())
    held_out = figures["held_out_losses"]
    afterwards = figures["held_out_loss_in_16_bits"] or math.nan
    return (
        f"{len(figures['losses'])} steps, last tenth's loss {figures['last_loss']:.4f}, held-out "
        f"{held_out[-1] if held_out else math.nan:.4f}, in 16 bits {afterwards:.4f}; exact: {exact}; "
        f"{figures['tokens_per_second']} tokens/s"
    )


def report(rows: Sequence[Row]) -> None:
    """Means over seeds with their spread, and how far each run is from the same seed's in 16 bits where that is known:
    its last held-out losses, and each step's loss."""
    in_16_bits = {row["seed"]: row for row in rows if row["way"] == "bf16"}
    for way in dict.fromkeys(row["way"] for row in rows):
        runs = [row for row in rows if row["way"] == way]
        held_out = [each["held_out_losses"][-1] for each in runs if each["held_out_losses"]]
        afterwards = [each["held_out_loss_in_16_bits"] for each in runs if each["held_out_losses"]]
        told = f"{way:9s} seeds {' '.join(str(each['seed']) for each in runs)}: loss "
        told += f"{_spread([each['last_loss'] for each in runs])}, held-out {_spread(held_out)}, in 16 bits "
        print(told + _spread(afterwards))
        for each in runs if way != "bf16" else ():
            if exact := in_16_bits.get(each["seed"]):
                print(f"  beside bf16, seed {each['seed']}: {beside(each, exact)}")


def beside(one: Row, other: Row) -> str:
    """How far a run is from another one of the same steps."""
    pairs = zip(one["losses"], other["losses"], strict=True)
    apart = [mine / theirs - 1 for mine, theirs in pairs if None not in (mine, theirs)]
    told = f"{statistics.fmean(apart):+.3%} +- {statistics.pstdev(apart):.3%} a step"
    if one["held_out_losses"] and other["held_out_losses"]:
        told += f", held-out {one['held_out_losses'][-1] - other['held_out_losses'][-1]:+.4f}"
        told += f", in 16 bits {one['held_out_loss_in_16_bits'] - other['held_out_loss_in_16_bits']:+.4f}"
    if one["device"] != other["device"]:
        told += f"; on {one['device']} and {other['device']}"
    return told


def _spread(values: list[float]) -> str:
    return f"{statistics.fmean(values):.4f} +- {statistics.pstdev(values):.4f}" if values else "-"


if __name__ == "__main__":
    main()

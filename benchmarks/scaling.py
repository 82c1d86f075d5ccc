"""Tokens a second on 1, 2 and 4 GPUs, the same samples in the same steps.

    python -m benchmarks.scaling [--data gsm8k.jsonl] [--shape FOLDER] [--out benchmarks/results/scaling.json]

Workloads: `short` has 32 samples a step as they are, `packed` 16 rows of 2,048 tokens. Without --data there are rows of
random words as long as GSM8K's in Llama 3's tokens: 167 +- 57. Weights are random, of the shape of Llama-3.1-8B with
the bundled tokenizer, or of FOLDER's config.json and tokenizer. Each run is the real job, started here (by torchrun
where it has several processes), with its metrics, checkpoint and result. A step counts from one row of metrics.jsonl to
the next by the first process's clock, so whatever lies between steps is in it. Imbalance is the most that a process is
dealt beside the mean: of tokens, and of what they cost with attention.
"""

import argparse
import json
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import fields
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from benchmarks.interrupted_run import commit
from benchmarks.speed_workloads import BIG, FIELDS
from train.cli import parse
from train.data import TrainingData, read_data
from train.dealing import cost
from train.engine.plan import Plan
from train.layout import BatchLayout, arranged
from train.main import run
from train.models.tokenizer import load_tokenizer
from train.run.devices import device_name
from train.run.folder import RunFolder, read_object
from train.run.versions import versions
from train.track.metrics_file import read_metrics

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "scaling.json"
TOKENIZER = ROOT / "demo" / "base"
MEAN, DEVIATION, SHORTEST, LONGEST, NUM_ROWS = 167, 57, 71, 451, 2000  # of GSM8K's rows, in tokens; the last synthetic
SAMPLES_OF_A_ROW = 13  # of 2,048 tokens; 12.3 on average
WORKLOADS = {
    "short": "--batch.samples 32 --batch.per_device 2",
    "packed": "--batch.samples 16 --batch.per_device 4 --data.packing true --data.max_length 2048",
}
TIMES = "times.json"


def main() -> None:
    """Runs every workload on every number of processes, prints the table and adds the rows to the JSON."""
    if sys.argv[1:2] == ["--worker"]:
        return worker(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=[*WORKLOADS])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--data", type=Path, help="JSONL with question and answer")
    parser.add_argument("--shape", type=Path, help="folder with config.json and a tokenizer")
    parser.add_argument("--warmup", type=int, default=20, help="steps that are not counted")
    parser.add_argument("--steps", type=int, default=100, help="steps that are")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("words", nargs="*", help="behind --: further options of train/main.py")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch:
        folder = Path(scratch)
        shape = options.shape or default_shape(folder / "shape")
        data = options.data or synthetic(shape, folder / "rows.jsonl")
        for workload in options.workloads:
            rows: list[dict[str, Any]] = []
            for count in options.processes:
                words = words_of(workload, shape, data, options)
                rows.append(measured(count, words, options.warmup, folder / f"{workload}-{count}"))
                rows[-1] |= imbalance(words, folder / f"{workload}-{count}", count, options)
                rows[-1]["speedup"] = round(rows[-1]["tokens_per_second"] / rows[0]["tokens_per_second"], 3)
                print(line(workload, rows[-1]), flush=True)
                record(options.out, workload, rows)


def words_of(workload: str, shape: Path, data: Path, options: argparse.Namespace) -> list[str]:
    """The run's command line; the data is repeated until an epoch has all steps, as its last one is smaller."""
    num_steps = options.warmup + options.steps
    size = int(WORKLOADS[workload].split()[1]) * (SAMPLES_OF_A_ROW if workload == "packed" else 1)
    repeats = math.ceil((num_steps + 1) * size / sum(1 for _ in data.open(encoding="utf-8")))
    words = [*BIG, *FIELDS, *WORKLOADS[workload].split(), "--model.random_init", "true"]
    words += [
        "--model.name_or_path",
        str(shape),
        "--data.path",
        str(data),
        "--data.weights",
        str(repeats),
        "--train.max_steps",
        str(num_steps),
    ]
    words += ["--lora.target_modules", "all-linear", "--checkpoint.every", "1000000"]
    return words + options.words


class RunEnded(Exception):
    """A run ended before its last step; `code` is that of exit.json."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


def measured(count: int, words: list[str], warmup: int, place: Path) -> dict[str, Any]:
    """One run's figures, from the step behind `warmup` on; raises RunEnded."""
    words = [*words, "--run.dir", str(place)]
    command = [sys.executable, "-m", "benchmarks.scaling", "--worker", *words]
    if count > 1:
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(count), "--no-python"]
        command = [sys.executable, *launch, *command]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}".strip(":")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said, folder = done.stdout[-2000:] + done.stderr[-2000:], RunFolder(place)
        # a launcher flattens codes
        code = read_object(folder.exit)["code"] if folder.exit.exists() else done.returncode
        raise RunEnded(code, f"{' '.join(command)} ended with {code}:\n{said}")
    rows, arrivals = read_metrics(RunFolder(place).metrics), json.loads((place / TIMES).read_text())
    seconds = [after - before for before, after in pairwise(arrivals)]
    counted = [(row["data/tokens"], each) for row, each in zip(rows[1:], seconds, strict=True) if row["step"] > warmup]
    num_tokens, total = (sum(column) for column in zip(*counted, strict=True))
    captures = [row.get("perf/capture_seconds", 0.0) for row in rows]
    plan = read_object(RunFolder(place).plan)
    return {
        "processes": count,
        "tokens_per_second": round(num_tokens / total, 1),
        "tokens_per_second_a_gpu": round(num_tokens / total / count, 1),
        "median_tokens_per_second_a_gpu": round(statistics.median(n / s for n, s in counted) / count, 1),
        "step_seconds": round(total / len(counted), 4),
        "longest_step_seconds": round(max(each for _, each in counted), 4),
        "measured_steps": len(counted),
        "capture_seconds_before_counting": round(sum(captures[:warmup]), 2),
        "capture_seconds_while_counting": round(sum(captures[warmup:]), 2),
        "steps_with_captures": [row["step"] for row in rows if row.get("perf/capture_seconds")],
        "peak_gib": max(row.get("memory/peak_reserved_gib", 0.0) for row in rows),
        "final_loss": rows[-1]["train/loss"],
        "uses_graphs": plan["uses_graphs"],
        "plan": plan["summary"],
    }


def imbalance(words: list[str], place: Path, count: int, options: argparse.Namespace) -> dict[str, Any]:
    """How evenly the steps' samples are dealt: the largest share over the mean, and numbers of micro-batches."""
    config, plan = parse([*words, "--run.dir", str(place)]), read_object(RunFolder(place).plan)
    own = {field.name: plan[field.name] for field in fields(Plan)} | {"streamed": (), "parts": ()}
    batch = arranged(config.batch, count)
    tokenizer = load_tokenizer(config).backend
    samples = read_data(config, tokenizer, date.today()).training.samples
    layout = BatchLayout(batch.per_device, batch.accumulation, count, 0, batch.samples)
    data = TrainingData(samples, config, layout, tokenizer.pad_token_id)
    tokens, costs, numbers = [], [], set[int]()
    for step in range(options.warmup, options.warmup + options.steps):
        shares = data.divided(step, Plan(**own))
        numbers |= {len(share) for share in shares}
        lengths = [[data.num_tokens[i] for members in share for i in members] for share in shares]
        tokens.append(max(map(sum, lengths)) / statistics.fmean(map(sum, lengths)))
        spent = [cost(each, plan["pair_cost"]) for each in lengths]
        costs.append(max(spent) / statistics.fmean(spent))
    return {
        "imbalance_of_tokens": round(statistics.fmean(tokens), 4),
        "imbalance_of_cost": round(statistics.fmean(costs), 4),
        "largest_imbalance_of_cost": round(max(costs), 4),
        "micro_batches": sorted(numbers),
    }


def worker(words: list[str]) -> None:
    """The job itself, in each process; the first one notes when each row of metrics.jsonl comes."""
    config, arrivals = parse(words), []

    def watch(row: Mapping[str, Any]) -> None:
        arrivals.append(time.perf_counter())

    run(config, watch)
    if arrivals:
        (Path(config.run.dir) / TIMES).write_text(json.dumps(arrivals))


def default_shape(folder: Path) -> Path:
    """Llama-3.1-8B's config.json with the bundled tokenizer."""
    from benchmarks.families import SHAPES  # which takes the workers' time and prints warnings

    shutil.copytree(TOKENIZER, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    SHAPES["Llama-3.1-8B"].save_pretrained(folder)
    return folder


def synthetic(shape: Path, target: Path) -> Path:
    """Rows of random words, as long as GSM8K's in tokens; the chat template's tokens are counted."""
    tokenizer: Any = AutoTokenizer.from_pretrained(shape, trust_remote_code=False)
    draw = random.Random(0)
    single = [word for word in ("the", "of", "and", "in", "to", "is") if _counts(tokenizer, f" {word}" * 50) == 50]
    turns = [{"role": "user", "content": " the"}, {"role": "assistant", "content": " the"}]
    around = len(tokenizer.apply_chat_template(turns, return_dict=False)) - 2
    spread = math.sqrt(math.log(1 + (DEVIATION / MEAN) ** 2))
    rows = []
    for _ in range(NUM_ROWS):
        length = draw.lognormvariate(math.log(MEAN) - spread**2 / 2, spread)
        num_words = max(4, round(min(LONGEST, max(SHORTEST, length))) - around)
        said = ["".join(f" {draw.choice(single)}" for _ in range(n)) for n in (num_words // 2, -(-num_words // 2))]
        rows.append(json.dumps({"question": said[0], "answer": said[1]}))
    target.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return target


def _counts(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def record(out: Path, workload: str, rows: list[dict[str, Any]]) -> None:
    """Replaces the workload's rows in the file."""
    known = json.loads(out.read_text()) if out.exists() else {}
    device = device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    known[workload] = {"device": device, "commit": commit(), "versions": versions(), "rows": rows}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def line(workload: str, row: dict[str, Any]) -> str:
    """A row of the table."""
    return (
        f"{workload:8} {row['processes']} x {row['tokens_per_second_a_gpu']:>8,.0f} tokens/s (median "
        f"{row['median_tokens_per_second_a_gpu']:,.0f}), {row['speedup']:.2f} times one; {row['step_seconds']:.3f} s a "
        f"step, {row['longest_step_seconds']:.3f} at most; imbalance {row['imbalance_of_cost'] - 1:.1%}; captures "
        f"{row['capture_seconds_before_counting']} s before, {row['capture_seconds_while_counting']} s while counting"
    )


if __name__ == "__main__":
    main()

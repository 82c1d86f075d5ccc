"""Tokens a second on 1, 2 and 4 GPUs, the same samples in the same steps.

    python -m benchmarks.scaling [--data gsm8k.jsonl] [--shape FOLDER] [--out benchmarks/results/scaling.json]

Workloads: `short` has 32 samples a step as they are, `packed` 16 rows of 2,048 tokens. Without --data there are rows of
random words as long as GSM8K's in Llama 3's tokens: 167 +- 57. Weights are random, of the shape of Llama-3.1-8B with
the bundled tokenizer, or of FOLDER's config.json and tokenizer. Each run is the real job, started here (by torchrun
where it has several processes), with its metrics, checkpoint and result. Imbalance is the most that a process is
dealt beside the mean: of tokens, and of what they cost with attention. In the JSON a workload with further options has
rows of its own: `packed, sharded` with `-- --memory.shard true`, `packed, OPTIONS` with others.
"""

import argparse
import json
import math
import random
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import fields
from datetime import date
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.real_job import ROOT, measured, record, shape_folder, single_words
from benchmarks.speed_workloads import BIG, FIELDS
from train.cli import parse
from train.config import Config
from train.data import TrainingData, read_data
from train.dealing import cost
from train.engine.plan import Plan
from train.layout import BatchLayout, arranged
from train.models.tokenizer import load_tokenizer
from train.run.folder import RunFolder, read_object

RESULTS = ROOT / "benchmarks" / "results" / "scaling.json"
MEAN, DEVIATION, SHORTEST, LONGEST, NUM_ROWS = 167, 57, 71, 451, 2000  # of GSM8K's rows, in tokens; the last synthetic
SAMPLES_OF_A_ROW = 13  # of 2,048 tokens; 12.3 on average
WORKLOADS = {
    "short": "--batch.samples 32 --batch.per_device 2",
    "packed": "--batch.samples 16 --batch.per_device 4 --data.packing true --data.max_length 2048",
}
SHARD = ["--memory.shard", "true"]


def main() -> None:
    """Runs every workload on every number of processes, prints the table and adds the rows to the JSON."""
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
                place = folder / f"{workload}-{count}"
                rows.append(measured(count, words, place, options.warmup))
                plan, last = read_object(RunFolder(place).plan), options.warmup + options.steps
                rows[-1] |= imbalance(parse(words), plan, count, options.warmup, last)
                rows[-1]["speedup"] = round(rows[-1]["tokens_per_second"] / rows[0]["tokens_per_second"], 3)
                print(line(workload, rows[-1]), flush=True)
                record(options.out, key_of(workload, options.words), rows, {})


def key_of(workload: str, words: Sequence[str]) -> str:
    """The name of a workload's rows in the JSON; `words` are the further options of their runs."""
    further = "sharded" if list(words) == SHARD else " ".join(words)
    return f"{workload}, {further}" if further else workload


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


def imbalance(config: Config, plan: dict[str, Any], count: int, first: int, last: int) -> dict[str, Any]:
    """How evenly the steps' samples are dealt: the largest share over the mean, and numbers of micro-batches."""
    own = {field.name: plan[field.name] for field in fields(Plan)} | {"streamed": (), "parts": ()}
    batch = arranged(config.batch, count)
    tokenizer = load_tokenizer(config).backend
    samples = read_data(config, tokenizer, date.today()).training.samples
    layout = BatchLayout(batch.per_device, batch.accumulation, count, 0, batch.samples)
    data = TrainingData(samples, config, layout, tokenizer.pad_token_id)
    tokens, costs, numbers = [], [], set[int]()
    for step in range(first, last):
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


def default_shape(folder: Path) -> Path:
    """Llama-3.1-8B's config.json with the bundled tokenizer."""
    from benchmarks.families import SHAPES  # which prints warnings

    return shape_folder(SHAPES["Llama-3.1-8B"], folder)


def synthetic(shape: Path, target: Path) -> Path:
    """Rows of random words, as long as GSM8K's in tokens; the chat template's tokens are counted."""
    tokenizer: Any = AutoTokenizer.from_pretrained(shape, trust_remote_code=False)
    draw, single = random.Random(0), single_words(shape)
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

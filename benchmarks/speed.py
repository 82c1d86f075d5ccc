"""Tokens a second of this program and of its peers, on the same rows, in one run on one GPU.

    python -m benchmarks.speed short --shape SHAPE_FOLDER --data gsm8k.jsonl --out benchmarks/results/speed.json

Workloads: `short` and `small` train question/answer rows (small in a 4 GiB cap, one row at a time), `packed` the same
text in rows of 2,048 tokens, `lines` the lines of text files by the wildfire notebook's recipe. SHAPE_FOLDER holds
config.json and a tokenizer; the weights are random, made here. Peers that are not installed are named and left out.
Ours is the real command, with its checkpoints and metrics; a peer's step is its trainer's. All take the same rows in
the same order; ours is measured at later steps than the peers, when its graphs are captured. Peers get padded batches.
"""

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.interrupted_run import commit
from benchmarks.speed_limits import against_limits, matmul_rate
from benchmarks.speed_workloads import WORKLOADS, Run, Workload
from train.cli import parse
from train.data import TrainingData, read_data
from train.layout import BatchLayout
from train.models.tokenizer import load_tokenizer
from train.run.folder import RunFolder, read_object
from train.run.versions import versions
from train.track.metrics_file import read_metrics

ROOT = Path(__file__).resolve().parent.parent
# Peers may want other versions of packages that we use too: a folder with theirs, first on their path and last on ours
PEERS_PATH = os.environ.get("HANDLOOP_PEERS_PATH", "")
sys.path += [PEERS_PATH] if PEERS_PATH else []


def main() -> None:
    """Runs every system, prints the table and adds its rows to the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--shape", type=Path, required=True, help="folder with config.json and a tokenizer")
    parser.add_argument("--base", type=Path, help="where the random weights are kept for the next workload")
    parser.add_argument("--data", type=Path, required=True, help="JSONL with question and answer, or a folder of text")
    parser.add_argument("--systems", nargs="*", default=[], help="only these, such as handloop unsloth")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "speed.json")
    options = parser.parse_args()
    work = WORKLOADS[options.workload]
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch:
        folder = Path(scratch)
        base = options.base or folder / "base"
        if not (base / "config.json").exists():
            random_base(options.shape, base)
        words = [*work.words, "--model.name-or-path", str(base)]
        words += ["--data.path", str(as_data(options.workload, options.data, folder))]
        shape, rate = AutoConfig.from_pretrained(options.shape, trust_remote_code=False), matmul_rate()
        rows = []
        for row in measure(work, options.systems, words, folder):
            rows.append({"workload": options.workload, **row, **against_limits(row, shape, rate)})
            record(options.out, options.workload, rows, rate)
    table(rows, rate)


def measure(work: Workload, systems: list[str], words: list[str], folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each system that is installed; raises ValueError where losses of one step differ by more than 2 %."""
    reference: list[float] = []
    for number, run in enumerate(work.runs):
        if systems and run.system not in systems:
            continue
        missing = [name for name in needs(run.system) if importlib.util.find_spec(name) is None]
        if missing:
            print(f"{run.system}: not installed ({', '.join(missing)}), left out", flush=True)
            continue
        place = folder / str(number)
        if run.system == "handloop":
            result, warmup = ours(work, run, words, place), work.our_warmup
        else:
            result, warmup = peer(work, run, words, place), work.warmup
        if result is None:
            continue
        reference = reference or result["losses"]
        last = min(len(reference), len(result["losses"]), work.peer_steps) - 1
        one, other = reference[last], result["losses"][last]
        if not abs(one - other) <= 0.02 * one:  # also NaN
            raise ValueError(f"step {last + 1}: the loss of {run.system} is {other:.4f}, ours {one:.4f}")
        pairs = list(zip(result["tokens"], result["seconds"], strict=True))[warmup:]
        yield {
            "system": run.system,
            "settings": f"{run.per_device} x {run.accumulation}" + (f"; {run.note}" if run.note else ""),
            "checkpointing": result["recomputed_share"] > 0,
            "recomputed_share": round(result["recomputed_share"], 4),
            "tokens_per_second": round(statistics.median(count / seconds for count, seconds in pairs)),
            "step_seconds": round(statistics.median(seconds for _, seconds in pairs), 4),
            "measured_steps": len(pairs),
            "peak_gib": round(result["peak_gib"], 2),
            "final_loss": round(other, 4),
            "final_step": last + 1,
            "mean_length": result["mean_length"] if "mean_length" in result else mean_length(words, run),
            "seconds_to_first_step": result.get("seconds_to_first_step"),
        }
        print(f"{run.system} {run.note}: {statistics.median(c / s for c, s in pairs):,.0f} tokens/s", flush=True)


def needs(system: str) -> list[str]:
    """Packages that a system is."""
    return {"handloop": [], "seed": [], "unsloth": ["unsloth"], "trl": ["trl"], "trl+liger": ["trl", "liger_kernel"]}[
        system
    ]


def ours(work: Workload, run: Run, words: list[str], place: Path) -> dict[str, Any] | None:
    """The real command, a process of its own."""
    command = [sys.executable, str(ROOT / "train" / "main.py"), *words, *run.words, "--run.dir", str(place)]
    command += ["--train.max-steps", str(work.our_steps), "--batch.per-device", str(run.per_device)]
    command += ["--batch.accumulation", str(run.accumulation), "--checkpoint.every", "1000000"]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    assert process.stdout is not None
    lines, loading, first_step = [], 0.0, 0.0
    for line in process.stdout:
        lines.append(line)
        if line.startswith("loading"):
            loading = time.perf_counter()
        if line.startswith("step ") and not first_step:
            first_step = time.perf_counter()
    if process.wait() != 0:
        print("".join(lines[-15:]), flush=True)
        return None
    folder = RunFolder(place)
    rows, plan = read_metrics(folder.metrics), read_object(folder.plan)
    print(plan["summary"], flush=True)
    return {
        "seconds": [row["perf/step_seconds"] for row in rows],
        "tokens": [row["data/tokens"] for row in rows],
        "losses": [row["train/loss"] for row in rows],
        # what the allocator holds, more than a peer's peak counts: what graphs use is not allocated any more
        "peak_gib": max(row["memory/peak_reserved_gib"] for row in rows),
        "mean_length": sum(r["data/tokens"] for r in rows) / sum(len(r["data/sample_ids"]) for r in rows),
        "recomputed_share": (plan["num_blocks"] - plan["num_kept"]) / plan["num_blocks"],
        "seconds_to_first_step": round(first_step - loading, 1),
    }


def peer(work: Workload, run: Run, words: list[str], place: Path) -> dict[str, Any] | None:
    """benchmarks.peers in a process of its own, on the rows of our first steps."""
    config, data, pad_token_id = data_of(words, run)
    rows = []
    for step in range(work.peer_steps):
        for i in data.sample_ids(step):
            sample = data.samples[i]
            labels = [t if on else -100 for t, on in zip(sample["input_ids"], sample["trained"], strict=True)]
            rows.append({"input_ids": sample["input_ids"], "labels": labels})
    place.mkdir()
    job = {
        "system": run.system,
        "model": config.model.name_or_path,
        "rows": rows,
        "pad_token_id": pad_token_id,
        "per_device": run.per_device,
        "accumulation": run.accumulation,
        "checkpointing": run.checkpointing,
        "steps": work.peer_steps,
        "lr": config.optim.lr,
        "r": config.lora.r,
        "alpha": config.lora.alpha,
        "dropout": config.lora.dropout,
        "modules": "all-linear" if "all-linear" in config.lora.target_modules else list(config.lora.target_modules),
        "quantization": config.model.quantization,
        "arguments": {"optim": "paged_adamw_8bit"},
        "cap_gib": work.cap_gib,
        "scratch": str(place / "scratch"),
        "out": str(place / "result.json"),
    }
    (place / "job.json").write_text(json.dumps(job))
    command = [sys.executable, "-m", "benchmarks.peers", str(place / "job.json")]
    environment = {**os.environ, "PYTHONPATH": f"{PEERS_PATH}:{os.environ.get('PYTHONPATH', '')}".strip(":")}
    environment.pop("PYTORCH_ALLOC_CONF", None)  # train sets it; PYTORCH_CUDA_ALLOC_CONF would reach both
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        print(f"{run.system} ({run.note}) failed:\n" + (done.stdout + done.stderr)[-1500:], flush=True)
        return None
    return {**json.loads((place / "result.json").read_text()), "recomputed_share": float(run.checkpointing)}


def data_of(words: list[str], run: Run) -> tuple[Any, TrainingData, int]:
    """Our configuration, rows and their order."""
    cut = ["--batch.per-device", str(run.per_device), "--batch.accumulation", str(run.accumulation)]
    config = parse([*words, *cut])
    tokenizer = load_tokenizer(config).backend
    samples = read_data(config, tokenizer, date.today()).training.samples
    layout = BatchLayout(run.per_device, run.accumulation, 1, 0)
    return config, TrainingData(samples, config, layout, tokenizer.pad_token_id), tokenizer.pad_token_id


def mean_length(words: list[str], run: Run) -> float:
    """Tokens of a sample."""
    data = data_of(words, run)[1]
    return sum(data.num_tokens) / len(data.num_tokens)


def as_data(workload: str, source: Path, folder: Path) -> Path:
    """The file that the workload trains on, made of `source`."""
    if workload == "packed":
        rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
        target = folder / "text.txt"
        target.write_text(" ".join(f"{row['question']} {row['answer']}" for row in rows), encoding="utf-8")
        return target
    if workload == "lines":
        target = folder / "lines.jsonl"
        lines = [line for path in sorted(source.glob("*.txt")) for line in path.read_text("utf-8").splitlines()]
        target.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines if line.strip()), "utf-8")
        return target
    return source


def random_base(shape: Path, target: Path) -> None:
    """A checkpoint of the shape with random weights and the shape's tokenizer."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(shape, trust_remote_code=False)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(target, max_shard_size="4GB")
    for file in shape.iterdir():
        if file.name != "config.json" and file.is_file():
            shutil.copy(file, target / file.name)
    del model
    torch.cuda.empty_cache()


def record(out: Path, workload: str, rows: list[dict[str, Any]], rate: float) -> None:
    """Replaces the workload's rows in the file, which holds one entry for each run of this script."""
    known = json.loads(out.read_text()) if out.exists() else {"rows": [], "runs": {}}
    known["rows"] = [row for row in known["rows"] if row["workload"] != workload] + rows
    known["runs"][workload] = {
        "device": torch.cuda.get_device_name(),
        "matmul_tflops": round(rate / 1e12),
        "commit": commit(),
        "versions": versions() | {name: installed(name) for name in ("trl", "unsloth", "liger_kernel")},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")


def installed(name: str) -> str | None:
    """Version of a peer."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name.replace("_", "-"))
    except PackageNotFoundError:
        return None


def table(rows: list[dict[str, Any]], rate: float) -> None:
    """Prints the rows for people."""
    print(f"\nproducts reach {rate / 1e12:.0f} TFLOP/s here; the limit is that rate with nothing else to do")
    for row in rows:
        print(
            f"{row['system']:10} {row['settings']:60.60} recompute={row['checkpointing']!s:5} "
            f"{row['tokens_per_second']:>7,} tokens/s of {row['limit']:,}  {row['step_seconds']:.3f} s/step  "
            f"{row['peak_gib']:.1f} GiB  loss {row['final_loss']} at step {row['final_step']}  "
            f"first step after {row['seconds_to_first_step']} s",
            flush=True,
        )


if __name__ == "__main__":
    main()

"""Published training shapes with the real job on 1, 2, 4 or 8 GPUs, beside the published figures.

    python -m benchmarks.public [WORKLOAD ...] [--processes 1 2] [--warmup 1] [--steps 3] [--limit 500]

Weights are random, of the published shape, and rows are random words, each a whole row of one text: speed and memory
only. The plan's step and peak stand beside what was measured. Sharded workloads have no row for one process. A job that
is not done after --limit seconds is ended, and its steps so far count. Everything behind `--` goes to train/main.py,
and such rows stand apart in the file.
"""

import argparse
import json
import math
import random
import re
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from benchmarks.interrupted_run import commit
from benchmarks.real_job import ROOT, measured, record, shape_folder, single_words, split_words
from benchmarks.speed_workloads import COMMON
from train.run.folder import RunFolder, read_object

RESULTS = ROOT / "benchmarks" / "results" / "public.json"
NOTE = "random weights and random words: speed and memory only, nothing is learned"
MLPERF_ROWS = 384  # between two evaluations of llama2_70b_lora, by MLPerf's rules
DOCUMENT_ROWS = 32  # rows in one text of the data


@dataclass(frozen=True)
class Published:
    """What others have published; the last is where, so that anybody can look it up."""

    what: str
    tokens_per_second_a_gpu: float
    source: str
    minutes: float = 0.0  # of a whole MLPerf run


@dataclass(frozen=True)
class Workload:
    """A published shape and recipe; `rows` are those of a step, over all processes."""

    shape: str
    tokens: int  # of a row
    rows: int
    words: str
    published: tuple[Published, ...]
    note: str = ""
    is_sharded: bool = False


AUTOMODEL = "docs.nvidia.com/nemo/automodel, performance summary"
MLPERF = "mlcommons.org, Training {}, llama2_70b_lora, closed; tokens computed from the samples in the result files"
ANSWER = "github.com/AnswerDotAI/fsdp_qlora, benchmarks_03_2024.md; tokens computed: 1,024 rows of 2,048"
BRIDGE = "github.com/NVIDIA-NeMo/Megatron-Bridge, docs/performance-summary-archive.md, 26.06"
OF_70B = (
    Published("NeMo AutoModel, Llama-3-70B bf16, 8 x H100, TP2 FSDP4", 1092, AUTOMODEL),
    Published("Megatron-Bridge, Llama-3-70B fp8, 8 x H100, TP2 PP4", 2643, BRIDGE),
    Published("fsdp_qlora, Llama-2-70B, rows of 2,048, 4 x H100, 667 s", 786, ANSWER),
)
OF_24GB = (
    Published("fsdp_qlora, Llama-2-70B, 2 x RTX 4090, 14.92 GiB, 4,399 s", 238, ANSWER),
    Published("fsdp_qlora, Llama-2-70B, 2 x RTX 3090, 14.92 GiB, 11,795 s", 89, ANSWER),
    Published("fsdp_qlora, Llama-2-70B, 2 x A5000, 9,688 s", 108, ANSWER),
)
OF_MLPERF = (
    Published("8 x H100, NeMo, fp8 (Supermicro)", 2223, MLPERF.format("v4.1"), 27.03),
    Published("4 x H100, NeMo, fp8 (Dell)", 2088, MLPERF.format("v4.1"), 55.63),
    Published("8 x H100, Hugging Face Trainer and PEFT (Juniper)", 560, MLPERF.format("v4.0"), 116.1),
)
R16 = "--lora.r 16 --lora.alpha 32 --lora.target_modules"
NF4 = "NF4 in place of bf16"
# fsdp_qlora's defaults: its train.py
ON_24GB = "--lora.r 64 --lora.alpha 16 --lora.target_modules q_proj k_proj v_proj gate_proj up_proj down_proj"
ON_24GB += " --lora.dropout 0.1 --batch.per_device 2 --memory.budget 23GiB"
SMALLER = "a budget of 23 GiB on larger and faster cards than the published ones; their rows and adapters"
WORKLOADS = {
    "automodel-8b": Workload(
        "Llama-3.1-8B", 4096, 32,
        f"--model.quantization none {R16} all-linear --lora.dropout 0.1 --batch.per_device 2",
        (Published("NeMo AutoModel, Llama-3-8B bf16, 1 x H100, nothing recomputed", 12473, AUTOMODEL),),
    ),
    "mlperf-70b": Workload(
        "Llama-2-70B", 8192, 8,
        f"{R16} q_proj k_proj v_proj o_proj --lora.dropout 0.1 --batch.per_device 1 --model.max_positions 8192",
        OF_MLPERF, NF4,
    ),
    "llama-70b": Workload(
        "Llama-3.1-70B", 4096, 32, f"{R16} all-linear --lora.dropout 0.1 --batch.per_device 1", OF_70B, NF4
    ),
    "llama-70b-sharded": Workload(
        "Llama-3.1-70B", 4096, 32,
        f"{R16} all-linear --lora.dropout 0.1 --batch.per_device 1 --memory.shard true", OF_70B, NF4, is_sharded=True,
    ),
    "cards-24gb": Workload("Llama-3.1-70B", 2048, 16, ON_24GB, OF_24GB, SMALLER),
    "cards-24gb-sharded": Workload(
        "Llama-3.1-70B", 2048, 16, f"{ON_24GB} --memory.shard true", OF_24GB, SMALLER, is_sharded=True
    ),
}  # fmt: skip


def main() -> None:
    """Runs each workload on each number of processes; each row is in the JSON as soon as it is measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=f"of {', '.join(WORKLOADS)}; all by default")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2, 4], help="GPUs, one process on each")
    parser.add_argument("--warmup", type=int, default=2, help="steps that are not counted; the first never is")
    parser.add_argument("--steps", type=int, default=4, help="steps that are")
    parser.add_argument("--rows", type=int, help="rows of a step, instead of the workload's number")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds after which a job is ended")
    parser.add_argument("--shape", type=Path, help="config.json of another shape, with the bundled tokenizer")
    parser.add_argument("--out", type=Path, default=RESULTS)
    before, words = split_words()
    options = parser.parse_args(before)
    if unknown := [name for name in options.workloads if name not in WORKLOADS]:
        parser.error(f"no workload {', '.join(unknown)}; there are {', '.join(WORKLOADS)}")
    if twice := sorted({name for name in options.workloads if options.workloads.count(name) > 1}):
        parser.error(f"{', '.join(twice)}: named twice; each is measured once for each number of --processes")
    print(NOTE)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch:
        for name in options.workloads or WORKLOADS:
            run_workload(name, options, words, Path(scratch) / name)


def run_workload(name: str, options: argparse.Namespace, words: list[str], folder: Path) -> None:
    """Measures one workload; what failed on a number of processes is a row with the reason."""
    workload, key = WORKLOADS[name], key_of(name, words)
    rows = known_rows(options.out, key)
    shape = shape_folder(shape_of(workload.shape, options.shape), folder / "shape")
    size = options.rows or workload.rows
    data = texts(shape, workload.tokens, size * (options.warmup + options.steps), folder / "texts.jsonl")
    for count in options.processes:
        if workload.is_sharded and count == 1:
            continue
        place = folder / f"{count}"
        command = [*words_of(workload, shape, data, size), "--train.max_steps", str(options.warmup + options.steps)]
        try:
            row = measured(count, [*command, *words], place, options.warmup, options.limit)
            row |= beside(workload, row, read_object(RunFolder(place).plan)) | {"rows_a_step": size}
        except RuntimeError as error:
            row = {"processes": count, "failed": reason_of(str(error)), "said": str(error)[-4000:]}
        row |= {"words": words, "commit": commit()}
        rows = [*(known for known in rows if known["processes"] != count), row]
        record(options.out, key, sorted(rows, key=lambda row: row["processes"]), facts(workload, options.shape))
        print(line(name, row), flush=True)


def key_of(workload: str, words: list[str]) -> str:
    """The name of a workload's rows in the JSON; those with further options stand apart."""
    return ", ".join(filter(None, [workload, " ".join(words)]))


def shape_of(name: str, other: Path | None) -> PreTrainedConfig:
    """The published shape, or the one of a config.json that is named in its place."""
    import transformers as T

    from benchmarks.families import SHAPES, sizes  # which prints warnings

    if other is not None:
        return T.AutoConfig.from_pretrained(other, trust_remote_code=False)
    large = {
        "Llama-2-70B": T.LlamaConfig(**sizes(8192, 28672, 80, 64, 8, 32000, max_position_embeddings=4096)),
        "Llama-3.1-70B": T.LlamaConfig(**sizes(8192, 28672, 80, 64, 8, 128256)),
    }
    return (SHAPES | large)[name]


def words_of(workload: Workload, shape: Path, data: Path, size: int) -> list[str]:
    """The run's command line."""
    words = ["--profile", "a100", *COMMON, "--model.random_init", "true", "--model.name_or_path", str(shape)]
    words += ["--data.path", str(data), "--data.format", "text", "--data.text_overlap", "0", "--data.packing", "true"]
    words += ["--data.max_length", str(workload.tokens), "--batch.samples", str(size), "--batch.accumulation", "0"]
    return [*words, "--checkpoint.every", "1000000", "--train.epochs", "1", *workload.words.split()]


def texts(shape: Path, tokens: int, num_rows: int, target: Path) -> Path:
    """Texts of random words that are cut into at least `num_rows` rows, all of them full: each begins with a token of
    its own, and the last one of a text ends with another."""
    draw, single, lines = random.Random(0), single_words(shape), []
    for _ in range(-(-num_rows // DOCUMENT_ROWS) + 1):
        words = (draw.choice(single) for _ in range((tokens - 1) * DOCUMENT_ROWS - 1))
        lines.append(json.dumps({"text": "".join(f" {word}" for word in words)}))
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target


def beside(workload: Workload, row: dict[str, Any], plan: dict[str, Any]) -> dict[str, Any]:
    """What the plan said, and what of the published figures this is."""
    predicted = sum(plan["parts"].values())
    found: dict[str, Any] = {
        "predicted_step_seconds": round(plan["seconds"], 4),
        "predicted_peak_gib": round(predicted / 2**30, 3),
        "streamed_blocks": len(plan["streamed"]),
        "kept_blocks": plan["num_kept"],
        "times_published": {
            each.what: round(row["tokens_per_second_a_gpu"] / each.tokens_per_second_a_gpu, 3)
            for each in workload.published
        },
    }
    if workload.published is OF_MLPERF:
        found["seconds_for_384_sequences"] = round(MLPERF_ROWS * workload.tokens / row["tokens_per_second"], 1)
    return found


def facts(workload: Workload, other: Path | None) -> dict[str, Any]:
    """What stands in the file beside the rows."""
    told = {"note": f"{NOTE}; {workload.note}".rstrip("; "), "tokens_a_row": workload.tokens}
    told |= {"shape": f"{other}, not {workload.shape}" if other else workload.shape}
    return told | {"words_of_workload": workload.words, "published": [asdict(each) for each in workload.published]}


def known_rows(out: Path, key: str) -> list[dict[str, Any]]:
    """The workload's rows of earlier calls, which other numbers of processes are added to."""
    return json.loads(out.read_text()).get(key, {}).get("rows", []) if out.exists() else []


def reason_of(said: str) -> str:
    """The line of a failed job's output that tells most: the first error that is not torchrun's own."""
    lines = [each.strip() for each in said.strip().splitlines()]
    pattern = r"(\[rank\d+\]: ?)?([\w.]+Error|handloop): "
    place = next((number for number, each in enumerate(lines) if re.match(pattern, each)), len(lines) - 1)
    return " ".join(lines[place : place + 2]) if lines[place].endswith(":") else lines[place]


def line(name: str, row: dict[str, Any]) -> str:
    """A row of the table, with a line for each published figure."""
    if "failed" in row:
        return f"{name:18} {row['processes']} x failed: {row['failed']}"
    workload = WORKLOADS[name]
    told = (
        f"{name:18} {row['processes']} x {row['tokens_per_second_a_gpu']:>8,.0f} tokens/s; {row['step_seconds']:.2f} s "
        f"a step of {row['rows_a_step']} rows, {row['predicted_step_seconds']:.2f} predicted; {row['peak_gib']:.2f} "
        f"GiB, {row['predicted_peak_gib']:.2f} predicted; {row['measured_steps']} steps"
    )
    if sequences := row.get("seconds_for_384_sequences"):
        told += f"; {sequences:,.1f} s for 384 sequences"
    told += f"; {workload.note}" if workload.note else ""
    for each in workload.published:
        told += f"\n  {row['times_published'][each.what]:6.2f} x {each.tokens_per_second_a_gpu:,.0f}: {each.what}"
        told += f", {each.minutes} min to the target" if each.minutes else ""
    return told


if __name__ == "__main__":
    main()

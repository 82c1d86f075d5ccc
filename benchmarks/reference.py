"""The reference engine beside TRL, with and without Liger, in families that the fused engine does not run.

    python -m benchmarks.reference [NAME ...] --data gsm8k.jsonl [--out benchmarks/results/reference.json]

Shapes are published ones, weights random, rows are questions and answers in the bundled tokenizer's tokens, 8 a step.
All take the same rows in the same order. Ours is the real command: with its defaults, without Liger, and as it was
before micro-batches were merged (padded as configured, everything recomputed). TRL gets padded batches, as configured
and as one batch of 8. What is not installed is named and left out.
"""

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

import transformers as T

from benchmarks.families import every, sizes
from benchmarks.speed import ROOT, measure, random_base, record
from benchmarks.speed_limits import matmul_rate
from benchmarks.speed_workloads import BIG, FIELDS, NO_MERGE, Run, Workload

TOKENIZER = ROOT / "demo" / "base"
SPARSE: dict[str, Any] = {"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 512, "head_dim": 64}
NEOX = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
SHAPES: dict[str, T.PreTrainedConfig] = {
    "Gemma-2-2B": T.Gemma2Config(
        **sizes(2304, 9216, 26, 8, 4, 256000), head_dim=256, sliding_window=4096, layer_types=every(2, 26)
    ),
    "Qwen3-MoE-1B": T.Qwen3MoeConfig(**sizes(1024, 3072, 16, 16, 4, 151936, **SPARSE)),
    "StableLM-2-1.6B": T.StableLmConfig(**sizes(2048, 5632, 24, 32, 32, 100352, partial_rotary_factor=0.25)),
    "Pythia-1.4B": T.GPTNeoXConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=16,
        vocab_size=50304,
        pad_token_id=0,
        **NEOX,
    ),
}
ALL_LINEAR = ("--lora.target-modules", "all-linear", "--engine.kind", "reference")
AS_BEFORE = (*NO_MERGE, "--memory.checkpointing", "full", "--engine.liger", "off")
RUNS = (
    Run("handloop", 2, 4, False, note="defaults"),
    Run("handloop", 2, 4, False, ("--engine.liger", "off"), note="without Liger"),
    Run("handloop", 2, 4, True, AS_BEFORE, note="padded as configured, all recomputed"),
    Run("trl", 2, 4, False, note="as configured, nothing recomputed"),
    Run("trl", 8, 1, False, note="one padded batch, nothing recomputed"),
    Run("trl+liger", 2, 4, False, note="as configured, nothing recomputed"),
    Run("trl+liger", 8, 1, False, note="one padded batch, nothing recomputed"),
)


def main() -> None:
    """Runs every system on each named shape, prints the tables and adds the rows to the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="shapes; all by default")
    parser.add_argument("--data", type=Path, required=True, help="JSONL with question and answer")
    parser.add_argument("--systems", nargs="*", default=[], help="only these, such as handloop trl")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "reference.json")
    options = parser.parse_args()
    rate = matmul_rate()
    for name in options.names or SHAPES:
        with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch:
            for row in measured(name, options, Path(scratch), rate):
                print(line(row), flush=True)


def measured(name: str, options: argparse.Namespace, folder: Path, rate: float) -> list[dict[str, Any]]:
    """A row for each system on one shape, recorded as each is there."""
    shape, base = folder / "shape", folder / "base"
    shutil.copytree(TOKENIZER, shape, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    SHAPES[name].save_pretrained(shape)
    random_base(shape, base)
    # bitsandbytes does not quantise experts
    quantization = "none" if isinstance(SHAPES[name], T.Qwen3MoeConfig) else "nf4"
    words = [*BIG, *FIELDS, *ALL_LINEAR, "--model.quantization", quantization, "--model.name-or-path", str(base)]
    words += ["--data.path", str(options.data)]
    work = Workload((), RUNS, peer_steps=12, our_steps=20, warmup=4, our_warmup=4)
    rows: list[dict[str, Any]] = []
    for row in measure(work, options.systems, words, folder):
        rows.append({"workload": name, **row})
        record(options.out, name, rows, rate)
    return rows


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    return (
        f"{row['workload']:16} {row['system']:10} {row['settings']:50.50} {row['tokens_per_second']:>7,} tokens/s  "
        f"{row['step_seconds']:.3f} s/step  {row['peak_gib']:.1f} GiB  loss {row['final_loss']}"
    )


if __name__ == "__main__":
    main()

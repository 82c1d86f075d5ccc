"""The reference engine beside TRL with Liger, on families that the fused engine does not run and on some that it does.

    python -m benchmarks.reference [NAME ...] --data gsm8k.jsonl [--out benchmarks/results/reference.json]

Shapes are published ones, weights random, rows are questions and answers in the bundled tokenizer's tokens, 8 a step.
All take the same rows in the same order. Ours is the real command, with its defaults and without Liger; a family that
Liger does not know is left out of the second, and TRL then runs without it as well. TRL gets padded batches, as
configured and as one batch of 8. What is not installed is named and left out. With several GPUs start it once for each,
CUDA_VISIBLE_DEVICES, names and --out apart.
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
from benchmarks.speed_workloads import BIG, FIELDS, Run, Workload


def unpadded_sizes(*numbers: int, **others: Any) -> dict[str, Any]:
    """As families.sizes, without a padding token: token 0 begins each row, and transformers gives padding's a row of
    zeros, which every layer without biases leaves at 0, and whose gradient its norm multiplies by 1 / sqrt(eps)."""
    return sizes(*numbers, **others) | {"pad_token_id": None}


TOKENIZER = ROOT / "demo" / "base"
SPARSE: dict[str, Any] = {"num_experts": 32, "num_experts_per_tok": 4, "moe_intermediate_size": 512, "head_dim": 64}
NEOX = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
SHAPES: dict[str, T.PreTrainedConfig] = {
    "Gemma-2-2B": T.Gemma2Config(
        **unpadded_sizes(2304, 9216, 26, 8, 4, 256000), head_dim=256, sliding_window=4096, layer_types=every(2, 26)
    ),
    "Qwen3-MoE-1B": T.Qwen3MoeConfig(**unpadded_sizes(1024, 3072, 16, 16, 4, 151936, **SPARSE)),
    "StableLM-2-1.6B": T.StableLmConfig(**unpadded_sizes(2048, 5632, 24, 32, 32, 100352, partial_rotary_factor=0.25)),
    "Phi-2": T.PhiConfig(**unpadded_sizes(2560, 10240, 32, 32, 32, 51200, partial_rotary_factor=0.4)),
    "Gemma-3-1B": T.Gemma3TextConfig(
        **unpadded_sizes(1152, 6912, 26, 4, 1, 262144), head_dim=256, sliding_window=512, layer_types=every(6, 26)
    ),
    "Phi-4-mini": T.Phi3Config(
        **unpadded_sizes(3072, 8192, 32, 24, 8, 200064, tie_word_embeddings=True),
        sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75},
    ),
    "SmolLM2-135M": T.LlamaConfig(**unpadded_sizes(576, 1536, 30, 9, 3, 49152), tie_word_embeddings=True),
    "Pythia-1.4B": T.GPTNeoXConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=24,
        num_attention_heads=16,
        vocab_size=50304,
        pad_token_id=None,
        **NEOX,
    ),
}
ALL_LINEAR = ("--lora.target-modules", "all-linear", "--engine.kind", "reference")
RUNS = (
    Run("handloop", 2, 4, False, note="defaults"),
    Run("handloop", 2, 4, False, ("--engine.liger", "off"), note="without Liger"),
    Run("trl+liger", 2, 4, False, note="as configured, nothing recomputed"),
    Run("trl+liger", 8, 1, False, note="one padded batch, nothing recomputed"),
)
WITHOUT_LIGER = ("StableLM-2-1.6B", "Phi-2", "Pythia-1.4B")  # 0.8.5 has no kernels for their families


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
    # as TRL has it: there experts stay in 16 bits
    quantization = "none" if isinstance(SHAPES[name], T.Qwen3MoeConfig) else "nf4"
    words = [*BIG, *FIELDS, *ALL_LINEAR, "--model.quantization", quantization, "--model.name-or-path", str(base)]
    words += ["--data.path", str(options.data)]
    runs = tuple(run for run in RUNS if not (name in WITHOUT_LIGER and "--engine.liger" in run.words))
    work = Workload((), runs, peer_steps=8, our_steps=30, warmup=3, our_warmup=14)
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

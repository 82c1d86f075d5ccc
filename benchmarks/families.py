"""Every family of the fused engine at the size of a published model: speed and memory, predicted and measured.

    python -m benchmarks.families [NAME ...] [--reference] [--out benchmarks/results/families.json]

Weights are random, in NF4, of the shape that the model's config.json has. Each is a `handloop plan --probe` in a
process of its own: rows of 2,048 tokens, packed, 16 a step, adapters of rank 16 on all linear layers, those of
experts among them. --reference runs the reference engine instead. With several GPUs start it once for each,
CUDA_VISIBLE_DEVICES and names apart.

Predictions are of a card that multiplies as fast as the plan's table says of its name. Cards differ by a tenth and
more, so the rate of this one is measured first, and the prediction at that rate stands beside each.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers as T

from benchmarks.real_job import ROOT, handloop_plan
from train.cli import parse
from train.commands.forecast import assumed_lengths, forecast
from train.memory.cluster import Cluster
from train.memory.gpus import known_gpu

RESULTS = Path(__file__).parent / "results" / "families.json"
FULL, SLIDING = "full_attention", "sliding_attention"
OPTIONS = "--data.packing true --data.max_length 2048 --batch.per_device 4 --lora.r 16"
OPTIONS += " --lora.alpha 32 --lora.dropout 0 --optim.name paged_adamw_8bit"


def every(number: int, num_layers: int) -> list[str]:
    """Kinds of layers of which each `number`th sees everything."""
    return [FULL if (layer + 1) % number == 0 else SLIDING for layer in range(num_layers)]


def sizes(*numbers: int, **others: Any) -> dict[str, Any]:
    """Hidden, intermediate, layers, query heads, key and value heads, vocabulary."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "vocab_size")
    return dict(zip(names, numbers, strict=True)) | {"max_position_embeddings": 8192, "pad_token_id": 0} | others


NO_DROPOUT = {"attention_dropout": 0.0, "residual_dropout": 0.0}
EXPERTS: dict[str, Any] = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "head_dim": 128}
GEMMA4: dict[str, Any] = {"head_dim": 256, "global_head_dim": 512, "final_logit_softcapping": 30.0}
SHAPES: dict[str, T.PreTrainedConfig] = {
    "Llama-3.1-8B": T.LlamaConfig(**sizes(4096, 14336, 32, 32, 8, 128256)),
    "Mistral-7B": T.MistralConfig(**sizes(4096, 14336, 32, 32, 8, 32768), sliding_window=None),
    "Qwen2.5-0.5B": T.Qwen2Config(**sizes(896, 4864, 24, 14, 2, 151936), tie_word_embeddings=True),
    "Qwen3-1.7B": T.Qwen3Config(**sizes(2048, 6144, 28, 16, 8, 151936), head_dim=128, tie_word_embeddings=True),
    "Qwen3-4B": T.Qwen3Config(**sizes(2560, 9728, 36, 32, 8, 151936), head_dim=128, tie_word_embeddings=True),
    "SmolLM3-3B": T.SmolLM3Config(**sizes(2048, 11008, 36, 16, 4, 128256), tie_word_embeddings=True),
    "Ministral-3-8B": T.Ministral3Config(**sizes(4096, 14336, 34, 32, 8, 131072), head_dim=128, sliding_window=None),
    "Phi-4": T.Phi3Config(**sizes(5120, 17920, 40, 40, 10, 100352), sliding_window=None),
    "Gemma-7B": T.GemmaConfig(**sizes(3072, 24576, 28, 16, 16, 256000), head_dim=256),
    "Gemma-3-4B": T.Gemma3TextConfig(
        **sizes(2560, 10240, 34, 8, 4, 262208), head_dim=256, sliding_window=1024, layer_types=every(6, 34)
    ),
    "Gemma-3-12B": T.Gemma3TextConfig(
        **sizes(3840, 15360, 48, 16, 8, 262208), head_dim=256, sliding_window=1024, layer_types=every(6, 48)
    ),
    "Gemma-4-31B": T.Gemma4TextConfig(
        **sizes(5376, 21504, 60, 32, 16, 262144, **GEMMA4, num_global_key_value_heads=4),
        hidden_size_per_layer_input=0,
        sliding_window=1024,
        layer_types=every(6, 60),
        attention_k_eq_v=True,
    ),
    "Gemma-4-E4B": T.Gemma4TextConfig(
        **sizes(2560, 10240, 42, 8, 2, 262144, **GEMMA4),
        hidden_size_per_layer_input=256,
        sliding_window=512,
        layer_types=every(6, 42),
        num_kv_shared_layers=18,
    ),
    "OLMo-2-7B": T.Olmo2Config(**sizes(4096, 11008, 32, 32, 32, 100352)),
    "OLMo-3-7B": T.Olmo3Config(**sizes(4096, 11008, 32, 32, 32, 100278), sliding_window=4096, layer_types=every(4, 32)),
    "Granite-3.3-8B": T.GraniteConfig(
        **sizes(4096, 12800, 40, 32, 8, 49159),
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        attention_multiplier=0.0078125,
        logits_scaling=16.0,
        tie_word_embeddings=True,
    ),
    "GLM-4-9B": T.Glm4Config(**sizes(4096, 13696, 40, 32, 2, 151552), head_dim=128, attention_bias=True),
    "Command-R7B": T.Cohere2Config(
        **sizes(4096, 14336, 32, 32, 8, 256000), sliding_window=4096, layer_types=every(4, 32), logit_scale=0.25
    ),
    "Seed-OSS-36B": T.SeedOssConfig(**sizes(5120, 27648, 64, 80, 8, 155136), head_dim=128, **NO_DROPOUT),
    "EXAONE-4.0-1.2B": T.Exaone4Config(
        **sizes(2048, 4096, 30, 32, 8, 102400),
        sliding_window=None,
        layer_types=[FULL] * 30,
        tie_word_embeddings=True,
    ),
    "Qwen3.5-9B": T.Qwen3_5TextConfig(**sizes(4096, 12288, 32, 16, 4, 248320), head_dim=256),
    "StarCoder2-7B": T.Starcoder2Config(
        **sizes(4608, 18432, 32, 36, 4, 49152), sliding_window=4096, use_bias=True, embedding_dropout=0.0, **NO_DROPOUT
    ),
    "Qwen3-30B-A3B": T.Qwen3MoeConfig(**sizes(2048, 6144, 48, 32, 4, 151936, **EXPERTS), norm_topk_prob=True),
    "gpt-oss-20b": T.GptOssConfig(num_hidden_layers=24, num_local_experts=32),
    "Mixtral-8x7B": T.MixtralConfig(**sizes(4096, 14336, 32, 32, 8, 32000), num_local_experts=8, num_experts_per_tok=2),
}


def main() -> None:
    """Probes each shape that is named, all without names, and adds the figures to the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of the shapes; all by default")
    parser.add_argument("--reference", action="store_true")
    parser.add_argument("--accumulation", type=int, default=4, help="4 rows each; 4 by default")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    engine = "reference" if options.reference else "fused"
    key = engine if options.accumulation == 4 else f"{engine}, {options.accumulation * 4} rows a step"
    rate = 0.0 if options.reference else rate_here()
    for name in options.names or SHAPES:
        found = probed(SHAPES[name], engine, options.accumulation, rate)
        known = json.loads(options.out.read_text()) if options.out.exists() else {}
        known.setdefault(name, {})[key] = found
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(known, indent=1) + "\n")
        print(line(name, key, found), flush=True)


def probed(shape: T.PreTrainedConfig, engine: str, accumulation: int, rate: float) -> dict[str, Any]:
    """What a probe measures, or why there is none; with what is predicted at `rate` FLOP/s, where that is not 0."""
    with tempfile.TemporaryDirectory() as folder:
        shape.save_pretrained(folder)
        words = f"--profile a100 --model.name_or_path {folder} --engine.kind {engine} {OPTIONS}".split()
        words += ["--batch.accumulation", str(accumulation)]
        done = handloop_plan(["--probe", "--json", *words])
        if done.returncode:
            reason = done.stderr.strip().splitlines()[-1][:300] if done.stderr else ""
            return {"code": done.returncode, "reason": reason}
        measured = json.loads(done.stdout)
        if rate:
            longer = longer_at(words, measured["gpu"], rate)
            measured |= {"matmul_tflops": round(rate / 1e12)}
            measured |= {"predicted_seconds_at_rate": round(measured["predicted_seconds"] * longer, 4)}
    return {key: value for key, value in measured.items() if key not in ("losses", "grad_norms")}


def rate_here() -> float:
    """FLOP/s of speed_limits.matmul_rate, by a process that takes no memory from probes; 0 without a GPU."""
    code = "import torch; from benchmarks.speed_limits import matmul_rate"
    code += "; print(matmul_rate() if torch.cuda.is_available() else 0.0)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def longer_at(words: Sequence[str], name: str, rate: float) -> float:
    """How many times as long the plan's step is on a GPU of this name that multiplies at `rate` FLOP/s."""
    gpu, config = known_gpu(name), parse(words)
    if gpu is None:  # its rate was measured before the plan was made
        return 1.0
    rows, alone = assumed_lengths(config, config.data.max_length), Cluster(1, 1, 25.0)
    at_table, at_rate = (
        forecast(config, each, rows, None, alone).plan.seconds for each in (gpu, replace(gpu, flops=rate))
    )
    return at_rate / at_table


def line(name: str, engine: str, found: dict[str, Any]) -> str:
    """A row of the table."""
    if "reason" in found:
        return f"{name:16} {engine:9} {found['code']}: {found['reason']}"
    speed, peak, seconds = (found[key] for key in ("tokens_per_second", "peak_gib", "seconds"))
    predicted = (
        f"{found['predicted_peak_gib'] / peak - 1:+.1%} memory, {found['predicted_seconds'] / seconds - 1:+.1%} time"
    )
    if "matmul_tflops" in found:
        predicted += (
            f", {found['predicted_seconds_at_rate'] / seconds - 1:+.1%} at its {found['matmul_tflops']} TFLOP/s"
        )
    return f"{name:16} {engine:9} {speed:9,.0f} tokens/s {peak:6.2f} GiB; predicted {predicted}; {found['plan']}"


if __name__ == "__main__":
    main()

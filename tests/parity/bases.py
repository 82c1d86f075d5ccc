"""Checkpoints of tiny models as people write them, and the first loss of a run on each path."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, Qwen3Config

from tests.conftest import BUNDLED_BASE, splits_of, training_of
from train.collate import collate
from train.config import Config, EngineConfig, MemoryConfig, ModelConfig
from train.models.language_model import keep_one_cpu_kernel

SIZES: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2
)
VOCABULARY = json.loads((BUNDLED_BASE / "config.json").read_text())["vocab_size"]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Shape:
    """How a checkpoint is written."""

    is_tied: bool = False
    is_sharded: bool = False
    dtype: torch.dtype = torch.float32
    family: type = LlamaConfig
    quantized: str = ""  # as it is stored: nf4, fp4, plain (nf4 without double quantisation), partly, int8
    names: str = "model."  # what the decoder's names begin with
    rubbish: bool = False


def write(folder: Path, shape: Shape) -> Path:
    """A checkpoint of random weights with the bundled tokenizer."""
    shutil.copytree(BUNDLED_BASE, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    torch.manual_seed(0)
    sizes: dict[str, Any] = SIZES | ({"head_dim": 16} if shape.family is Qwen3Config else {})
    settings = shape.family(
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        tie_word_embeddings=shape.is_tied,
        initializer_range=0.15,
        **sizes,
    )
    model: Any = AutoModelForCausalLM.from_config(settings, dtype=shape.dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    options = {"max_shard_size": "150KB"} if shape.is_sharded else {}
    model.save_pretrained(folder, **options)
    if shape.quantized:
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=QUANTIZED[shape.quantized], dtype=shape.dtype, device_map={"": "cpu"}
        )
        for old in folder.glob("model*"):
            old.unlink()
        model.save_pretrained(folder, **options)
    if shape.names != "model.":
        rewrite(folder, lambda tensors: {n.replace("model.", shape.names, 1): t for n, t in tensors.items()})
    if shape.rubbish:
        save_file({"model.layers.0.self_attn.q_proj.weight": torch.zeros(3)}, folder / "old.safetensors")
        (folder / "._model.safetensors").write_bytes(b"junk")
        add = {"vision_tower.patch.weight": torch.zeros(4, 4), "mtp.head.weight": torch.zeros(2)}
        rewrite(
            folder,
            lambda tensors: tensors | (add if any("layers.2.self_attn.q_proj" in name for name in tensors) else {}),
        )
    return folder


QUANTIZED = {
    "nf4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "plain": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "fp4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=torch.float16),
    "partly": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["lm_head", "o_proj"]
    ),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
    "stored as fp16": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_quant_storage=torch.float16
    ),
    "with its head": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", llm_int8_skip_modules=["none"]),
}


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    """Changes the tensors of every weight file, and the index after them."""
    index = folder / "model.safetensors.index.json"
    places = {}
    files = (
        sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.exists() else ["model.safetensors"]
    )
    for file in files:
        tensors = {name: tensor.contiguous() for name, tensor in change(load_file(folder / file)).items()}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
    if index.exists():
        index.write_text(json.dumps(json.loads(index.read_text()) | {"weight_map": places}))


def first_loss(config: Config) -> float:
    """Of the first micro-batch of a run, with what is in it."""
    training = training_of(config, Accelerator(cpu=True))
    training.model.eval()
    batch = training.data.batch(0, training.plan).micro_batches[0]
    with torch.no_grad():
        return float(training.model(batch)) / len(batch.targets)


def ways(config: Config) -> dict[str, Config]:
    """The configuration on each path."""
    fused = replace(config, engine=EngineConfig(kind="fused"))
    return {
        "reference": replace(config, engine=EngineConfig(kind="reference")),
        "resident": fused,
        "streamed": replace(fused, memory=MemoryConfig(offload="stream")),
    }


def on(config: Config, folder: Path, quantization: Any) -> Config:
    model = ModelConfig(name_or_path=str(folder), quantization=quantization)
    return replace(config, model=model, batch=replace(config.batch, merge="off"))


def by_transformers(config: Config) -> float:
    """The loss of the same samples in plain transformers, without adapters, a row at a time."""
    training = training_of(ways(config)["reference"], Accelerator(cpu=True))
    samples = splits_of(config).training.samples
    ids = training.data.sample_ids(0)[: config.batch.per_device]
    options: Any = {}
    kinds = {"nf4": QUANTIZED["nf4"], "int8": QUANTIZED["int8"]}
    stored = json.loads((Path(config.model.name_or_path) / "config.json").read_text()).get("quantization_config")
    if config.model.quantization != "none" and not stored:
        options = {"quantization_config": kinds[config.model.quantization], "device_map": {"": "cpu"}}
    plain: Any = AutoModelForCausalLM.from_pretrained(config.model.name_or_path, dtype=torch.float32, **options).eval()
    keep_one_cpu_kernel(plain)
    total, count = 0.0, 0
    for i in ids:
        batch = collate([samples[i]], 0)
        with torch.no_grad():
            logits = plain(input_ids=batch.input_ids).logits[0].float()
        total += float(torch.nn.functional.cross_entropy(logits[batch.target_rows], batch.targets, reduction="sum"))
        count += len(batch.targets)
    return total / count

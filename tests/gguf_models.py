"""Tiny models of the families that GGUF is written for, as folders with the bundled tokenizer."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from data_tools.chat_template import ChatTemplate
from tests.conftest import tokenizer_at
from train.deliver.gguf_shape import GgufShape, gguf_shape
from train.deliver.gguf_tokenizer import Vocabulary, vocabulary

needs_llama_cpp: Any = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None,
    reason="needs llama.cpp: .venv/bin/pip install -c constraints.txt -e '.[gguf]'",
)
NUM_ROWS = 2050  # two more than the bundled tokenizer has tokens
SIZES: dict[str, Any] = {
    "vocab_size": NUM_ROWS,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
SHAPES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "llama, tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "llama, wide heads and biases": LlamaConfig(**SIZES, head_dim=32, attention_bias=True, mlp_bias=True),
    "llama, llama3 scaling": LlamaConfig(**SIZES, rope_parameters=LLAMA3),
    "llama, linear scaling": LlamaConfig(**SIZES, rope_parameters=LINEAR),
    "llama, yarn with its own factor": LlamaConfig(
        **SIZES, rope_parameters={**YARN, "attention_factor": 1.3, "beta_fast": 16.0}
    ),
    "mistral": MistralConfig(**SIZES, sliding_window=None),
    "qwen2": Qwen2Config(**SIZES),
    "qwen2, yarn": Qwen2Config(**SIZES, rope_parameters=YARN),
    "qwen3": Qwen3Config(**SIZES, head_dim=32),
    "qwen3, another theta": Qwen3Config(
        **SIZES, head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 1e6}
    ),
}


def model_folder(folder: Path, shape: PretrainedConfig, shard_size: str = "50GB") -> Any:
    """Saves a random model whose norms and biases matter, with the bundled tokenizer; returns it."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data.normal_(float("norm" in name), 0.2)
    model.save_pretrained(folder, max_shard_size=shard_size)
    tokenizer_at().save_pretrained(folder)
    return model.eval()


def written(folder: Path, tokenizer: Any = None) -> tuple[GgufShape, Vocabulary]:
    """What a GGUF file says of the model in a folder."""
    asked = tokenizer or tokenizer_at(folder)
    shape = gguf_shape(folder)
    return shape, vocabulary(asked, [asked.eos_token_id], shape.config.vocab_size, ChatTemplate(asked), "tiny")


@torch.no_grad()
def logits_of(model: Any, ids: list[int]) -> torch.Tensor:
    """Ids [T] -> logits [T, V] by transformers."""
    return model(input_ids=torch.tensor([ids])).logits[0].float()

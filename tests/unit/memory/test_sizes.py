"""Sizes that are computed from config.json are those of the loaded model."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from tests.conftest import training_of
from train.config import Config, EngineConfig, ModelConfig, OptimConfig
from train.engine.families import decoder_layers
from train.engine.packed_weights import PackedLayout, packed_bytes
from train.memory.sizes import model_sizes
from train.models.language_model import sketch


@pytest.mark.parametrize("quantization", ["nf4", "none", "int8"])
def test_sizes_are_those_of_the_loaded_model(quantization: Any, config: Config) -> None:
    """What is computed from config.json is what the loaded model has: packed blocks, adapters, norms."""
    model = ModelConfig(config.model.name_or_path, quantization=quantization, random_init=True)
    config = replace(config, model=model, optim=OptimConfig(name="adamw"), engine=EngineConfig(kind="auto"))
    sizes = model_sizes(sketch(config, torch.float32).get_base_model(), config, on_gpu=False)
    training = training_of(config, Accelerator(cpu=True))
    causal_lm: Any = training.model.adapted.get_base_model()
    layers = decoder_layers(causal_lm)[0].linears
    if quantization != "int8":
        assert sizes.packed_bytes == PackedLayout(layers).num_bytes
    assert sizes.packed_bytes == sum(map(packed_bytes, layers))
    assert sizes.head_bytes == causal_lm.lm_head.weight.nbytes
    assert sizes.embedding_bytes == causal_lm.get_input_embeddings().weight.nbytes
    trained = sum(p.numel() for p in training.parameters.values())
    assert 16 * trained <= sizes.adapter_bytes <= 16 * trained + 4 * len(training.parameters)
    norms = [p for name, p in causal_lm.named_parameters() if "norm" in name]
    assert sizes.norm_bytes == sum(p.nbytes for p in norms)

"""Rotary tables whose frequencies depend on a text's length, of several samples in one call."""

from copy import deepcopy
from typing import Any

import pytest
import torch
import transformers as T

from tests.parity.models import DELTA, LINEAR, SIZES
from train.models.rotary import SampleRotary, isolate_rotary

LENGTHS = (20, 5, 12)  # of which 8 are within the original length
FACTORS = {"short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "original_max_position_embeddings": 8}
KINDS = {"dynamic": {"factor": 4.0}, "longrope": {"factor": 4.0, **FACTORS}}
SHAPES = {
    "llama": lambda rope: T.LlamaConfig(**SIZES, head_dim=8, max_position_embeddings=8, rope_parameters=rope),
    "three coordinates": lambda rope: T.Qwen3_5TextConfig(
        **SIZES, **DELTA, layer_types=LINEAR, max_position_embeddings=8, rope_parameters=rope
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SHAPES)
def test_each_sample_has_the_tables_of_itself_alone(name: str, kind: str) -> None:
    """In padded rows and in a packed one, also where a place has three coordinates; whatever came before."""
    rope = {"rope_type": kind, "rope_theta": 100.0, "partial_rotary_factor": 0.5 if name != "llama" else 1.0}
    base: Any = T.AutoModelForCausalLM.from_config(SHAPES[name](rope | KINDS[kind]))
    plain, like = base.base_model.rotary_emb, torch.zeros(1)
    alone = [deepcopy(plain)(like, torch.arange(length)[None]) for length in LENGTHS]
    assert (alone[0][0][:, 1:5] - alone[1][0][:, 1:5]).norm() > 0.1, "the length changes what the first tokens have"
    isolate_rotary(base)
    rotary = base.base_model.rotary_emb
    assert isinstance(rotary, SampleRotary)
    rotary.lengths = LENGTHS
    padded = torch.arange(max(LENGTHS)).repeat(3, 1)
    packed = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    if name != "llama":
        padded, packed = padded.expand(3, -1, -1), packed.expand(3, -1, -1)
    of_rows, of_packed = rotary(like, padded), rotary(like, packed)
    for number in range(2):  # cos and sin
        tables = [each[number][0] for each in alone]
        for row, table in enumerate(tables):
            torch.testing.assert_close(of_rows[number][row, : len(table)], table)
        torch.testing.assert_close(of_packed[number][0], torch.cat(tables))

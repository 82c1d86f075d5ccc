"""Answers between steps of the fused engine: the steps go on as if nobody had asked, in the memory that they had."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from tests.conftest import TODAY, splits_of, training_of
from train.config import Config, EngineConfig, MemoryConfig, RunConfig, ValidateConfig
from train.early_stop import ValidationRecord
from train.models.tokenizer import load_tokenizer
from train.run.processes import Watch
from train.step import Training, optimizer_step
from train.validation.material import material_of
from train.validation.validator import Validator

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; the CPU suite covers the same code"),
]


def losses(config: Config, asks: bool) -> tuple[Training, list[float], list[int]]:
    """The losses of six steps, with a validation and answers after each or without, and the memory held after each."""
    training = training_of(config, Accelerator())
    material = material_of(config, load_tokenizer(config).backend, splits_of(config), TODAY)
    validator = Validator.of(training, material, ValidationRecord(), Watch())
    found, held = [], []
    for step in range(6):
        found.append(optimizer_step(training, step).loss)
        if asks:
            assert validator.measure(step + 1)["eval/general_loss"] > 0
            assert len(validator.ask(step + 1)) == 4
        held.append(torch.cuda.memory_allocated())
    return training, found, held


@pytest.mark.parametrize("offload", ["none", "stream"])
def test_answers_between_steps(offload: Any, config: Config, pairs: Path) -> None:
    """With CUDA graphs, resident and streamed: the same losses, and what answers took is given back."""
    config = replace(
        config,
        data=replace(config.data, validation_path=(str(pairs),), gate="warn"),
        run=RunConfig(dir=config.run.dir, device="cuda"),
        engine=EngineConfig(kind="fused"),
        memory=MemoryConfig(offload=offload),
        validate=ValidateConfig(max_new_tokens=8),
    )
    asked, plain = losses(config, True), losses(config, False)
    assert asked[0].model.engine_name == "fused"
    assert asked[1] == pytest.approx(plain[1], rel=2e-3)
    assert max(asked[2][2:]) <= max(plain[2]) + (8 << 20)

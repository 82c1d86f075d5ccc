"""A checkpoint of another run is refused with what differs, and with the profile that has its recipe now."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from train.checkpoints.resume import check_same_run
from train.config import Config, ModelConfig
from train.profiles import PROFILES
from train.run.exits import ExitCode, ExitWith


def identity_of(config: Config) -> dict[str, Any]:
    """What a refusal looks at, of a run with this configuration."""
    base = config.model.name_or_path
    unchanged = dict.fromkeys(("tokenizer", "chat template", "preparation"), "")
    return {
        "model.base": base,
        "data": "the same",
        "lora.init_from": "",
        "total optimizer steps": 1,
        "lora.r": config.lora.r,
        "lora.alpha": config.lora.alpha,
        "details": {"model.name_or_path": base, "model.random_init": False, **unchanged, "content": []},
    }


def refusal(before: Config, now: Config) -> str:
    """What is said where a checkpoint of one configuration is resumed with another."""
    checkpoint = SimpleNamespace(path=Path("runs/4gb/checkpoints/step-1"), state=SimpleNamespace())
    checkpoint.state.identity = identity_of(before)
    with pytest.raises(ExitWith) as caught:
        check_same_run(cast(Any, checkpoint), identity_of(now), now, cast(Any, None))
    assert caught.value.code == ExitCode.FINGERPRINT_MISMATCH
    return caught.value.reason


def test_a_run_of_the_earlier_4gb_is_told_its_profile() -> None:
    """By its base, or its rank where another base was named; other runs are not sent there."""
    new, old = PROFILES["4gb"](), PROFILES["4gb_tinyllama"]()
    way = "--profile 4gb_tinyllama now: with it, --run.dir runs/4gb "
    said = refusal(old, new)
    assert "model.name_or_path TinyLlama/TinyLlama-1.1B-Chat-v1.0 -> Qwen/Qwen3-1.7B" in said
    assert "lora.r 8 -> 16" in said
    assert way in said
    mine = ModelConfig(name_or_path="mine")
    assert way in refusal(replace(old, model=mine), replace(new, model=mine))
    assert way in refusal(replace(old, lora=new.lora), new)
    assert "now: with it" not in refusal(PROFILES["qwen3_4b_4gb"](), new)
    assert "now: with it" not in refusal(old, PROFILES["qwen3_4b_4gb"]())

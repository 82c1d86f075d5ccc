"""What we compute ourselves is compared with transformers before the first step; a small difference ends the run."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from accelerate import Accelerator

from tests.conftest import BUNDLED_BASE, training_of
from tests.parity.bases import VOCABULARY, on
from train.collate import collate, collate_packed
from train.config import Config, DataConfig, EngineConfig
from train.models.isolation import check_packing
from train.models.language_model import LanguageModel

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.15,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
SPARSE = {name: value for name, value in SIZES.items() if name != "num_key_value_heads"}
# each of the two architectures reads one of them
CAPPED: dict[str, Any] = SIZES | {"final_logit_softcapping": 5.0}
SCALED: dict[str, Any] = SIZES | {"logit_scale": 0.0625}
HEADS: dict[str, Callable[[], Any]] = {
    "bias": lambda: T.PhiConfig(**SPARSE),
    "scale": lambda: T.CohereConfig(**SCALED),
    "divisor": lambda: T.GraniteConfig(**SIZES, logits_scaling=8.0, embedding_multiplier=12.0),
    "cap": lambda: T.Gemma2Config(**CAPPED, head_dim=16),
    "cap, and a scale that is not read": lambda: T.Gemma2Config(**CAPPED | SCALED, head_dim=16),
    "scale, and a cap that is not read": lambda: T.CohereConfig(**CAPPED | SCALED),
}


def write(folder: Path, shape: Any, kind: Any = None) -> Path:
    """A base of this shape with random weights, biases among them, and the bundled tokenizer."""
    shutil.copytree(BUNDLED_BASE, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    torch.manual_seed(0)
    model = kind(shape) if kind else T.AutoModelForCausalLM.from_config(shape)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and ("norm" in name or name.endswith("bias")):
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return folder


def for_all_linear(config: Config, folder: Path) -> Config:
    config = on(config, folder, "none")
    return replace(config, lora=replace(config.lora, target_modules=("all-linear",)))


@pytest.mark.parametrize("name", HEADS)
def test_heads_that_do_more_are_computed(name: str, config: Config, tmp_path: Path) -> None:
    """Heads with a bias, a scale, a divisor or a soft cap: the loss is the one of transformers' logits."""
    training = training_of(for_all_linear(config, write(tmp_path / "base", HEADS[name]())), Accelerator(cpu=True))
    head, batch = training.model.head, training.data.batch(0, training.plan).micro_batches[0]
    assert (head.bias is not None, head.scale != 1, head.cap != 0) != (False, False, False)
    plain: Any = T.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    training.model.eval()
    with torch.no_grad():
        logits = plain(input_ids=batch.input_ids, position_ids=batch.position_ids).logits.flatten(0, 1)
        ours = training.model(batch)
    theirs = torch.nn.functional.cross_entropy(logits[batch.target_rows], batch.targets, reduction="sum")
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=0)


def test_the_comparison_leaves_the_model_as_it_was(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters start at the same values with the comparison and without it."""
    found = []
    for is_compared in (True, False):
        if not is_compared:
            monkeypatch.setattr("train.assemble.check_agreement", lambda *_: None)
        training = training_of(replace(config, engine=EngineConfig(kind="fused")), Accelerator(cpu=True))
        assert training.model.training
        found.append(training.parameters)
    assert all(torch.equal(a, b) for a, b in zip(found[0].values(), found[1].values(), strict=True))
    assert all(not p.any() for name, p in found[0].items() if "lora_B" in name)


def packed(config: Config) -> Config:
    return replace(config, data=DataConfig(path=config.data.path, max_length=128, packing=True))


def test_attention_alone_is_packed(config: Config) -> None:
    """The probe lets a Llama pass on the reference engine, with windows of attention too."""
    training = training_of(packed(config), Accelerator(cpu=True))
    check_packing(training.model, "it", list(range(3, 90)))


LONG: dict[str, Any] = {"rope_theta": 10000.0, "rope_type": "longrope", "original_max_position_embeddings": 16}
LONG |= {"short_factor": [1.0] * 8, "long_factor": [4.0 + i for i in range(8)], "factor": 32.0}


def sample_losses(model: LanguageModel, samples: list[list[int]], is_packed: bool) -> float:
    rows = [{"input_ids": ids, "trained": [True] * len(ids)} for ids in samples]
    with torch.no_grad():
        return float(model(collate_packed(rows) if is_packed else collate(rows, 0)))


@pytest.mark.parametrize("kind", ["reference", "fused"])
def test_rotary_scaling_is_by_the_length_of_each_sample(kind: Any, config: Config, tmp_path: Path) -> None:
    """longrope: a short sample beside a long one, padded or packed, has the loss that it has alone."""
    shape = T.LlamaConfig(**SIZES, rope_parameters=LONG)
    config = replace(on(config, write(tmp_path / "base", shape), "none"), engine=EngineConfig(kind=kind))
    model = training_of(config, Accelerator(cpu=True)).model.eval()
    assert len(model.reference.rotaries) == 1
    short, long = list(range(10, 22)), list(range(30, 75))
    alone = [sample_losses(model, [ids], is_packed=kind == "fused") for ids in (short, long)]
    plain: Any = T.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    for ids, found in zip((short, long), alone, strict=True):
        tensor = torch.tensor([ids])
        with torch.no_grad():
            logits = plain(input_ids=tensor).logits[0, :-1]
        expected = torch.nn.functional.cross_entropy(logits, tensor[0, 1:], reduction="sum")
        assert found == pytest.approx(float(expected), rel=2e-5)
    for order in ([short, long], [long, short]):
        for is_packed in {True, kind == "fused"}:
            assert sample_losses(model, order, is_packed) == pytest.approx(sum(alone), rel=2e-5)

"""Adapters on a mixture's experts are merged into each expert's tensor, as files have them."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.conftest import BUNDLED_BASE
from tests.finished_runs import finish
from tests.parity.bases import VOCABULARY, on
from tests.parity.models import FAMILIES
from tests.parity.test_merge import IDS, adapted_logits, merged_logits, written
from train.config import Config, LoraConfig
from train.deliver.finished import finished_run, load_tuned
from train.run.exits import ExitWith


@pytest.fixture(params=["mixtral", "qwen3-moe"])
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint of random weights of the family, a tensor for each expert, with the bundled tokenizer."""
    shape = FAMILIES[request.param][0]
    settings = shape.to_dict() | {"vocab_size": VOCABULARY, "max_position_embeddings": 512, "initializer_range": 0.1}
    folder = tmp_path / "base"
    shutil.copytree(BUNDLED_BASE, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(type(shape)(**settings)).save_pretrained(folder)
    return folder


def test_onto_the_base_s_own_weights(base: Path, config: Config, tmp_path: Path) -> None:
    """What PEFT computes with the adapters apart; gate and up share a rank twice as high, and its scale."""
    config = on(config, base, "none")
    run = finish(config, tmp_path / "run")
    wanted = adapted_logits(base, run / "final")
    found = merged_logits(written(run, "original", tmp_path / "merged"))
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4)
    assert (merged_logits(base) - found).abs().max() > 0.1, "the adapters change something"


def test_an_adapter_that_fits_no_parameter_is_refused(base: Path, config: Config, tmp_path: Path) -> None:
    """It would be left out in silence; nothing is written."""
    run = finish(on(config, base, "none"), tmp_path / "run")
    adapter = run / "final" / "adapter_model.safetensors"
    name = "base_model.model.model.layers.0.mlp.experts.lora_A.weight"
    tensors = load_file(adapter)
    save_file(tensors | {name: tensors[name][:, :-1].contiguous()}, adapter)
    with pytest.raises(ExitWith, match=r"layers\.0\.mlp\.experts: an adapter fits none"):
        written(run, "original", tmp_path / "merged")
    assert not list((tmp_path / "merged").iterdir())


def test_onto_the_experts_as_they_were_trained_with(base: Path, config: Config, tmp_path: Path) -> None:
    """Experts are rounded to NF4 as training rounded them, each layer's as a whole; in the original they are not."""
    run = finish(on(config, base, "nf4"), tmp_path / "run")
    tuned = load_tuned(finished_run(run)).model
    with torch.no_grad(), tuned.generating():
        wanted = tuned.adapted(input_ids=IDS).logits
    found = merged_logits(written(run, "dequantized", tmp_path / "merged"))
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4)
    assert (merged_logits(written(run, "original", tmp_path / "other")) - wanted).abs().max() > 0.1


def test_transposed_experts_are_merged_as_they_were_trained_with(config: Config, tmp_path: Path) -> None:
    """Of gpt-oss in 16 bits, whose parameters the files hold as a whole: rounded to NF4 in the order of training."""
    folder = tmp_path / "base"
    shutil.copytree(BUNDLED_BASE, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    shape = FAMILIES["gpt-oss"][0]
    settings = shape.to_dict() | {"vocab_size": VOCABULARY, "max_position_embeddings": 512}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(type(shape)(**settings)).save_pretrained(folder)
    lora = LoraConfig(target_modules=("q_proj", "k_proj", "v_proj", "o_proj"), dropout=0.0)
    run = finish(replace(on(config, folder, "nf4"), lora=lora), tmp_path / "run")
    tuned = load_tuned(finished_run(run)).model
    with torch.no_grad(), tuned.generating():
        wanted = tuned.adapted(input_ids=IDS).logits
    found = merged_logits(written(run, "dequantized", tmp_path / "merged"))
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4)
    original = merged_logits(written(run, "original", tmp_path / "other"))
    torch.testing.assert_close(original, adapted_logits(folder, run / "final"), rtol=0, atol=2e-4)
    assert (original - found).abs().max() > 0.01

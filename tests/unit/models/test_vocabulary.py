"""Which rows of the vocabulary and which layers are trained, where they start, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import PhiConfig

from data_tools.encode import Encoder
from tests.conftest import BUNDLED_BASE, tokenizer_at, training_of
from tests.parity.bases import VOCABULARY, Shape, on, rewrite
from tests.parity.bases import write as write_llama
from tests.unit.models.test_agreement import SPARSE, write
from train.config import Config
from train.engine.layers import Vocabulary
from train.memory.outlook import sketched_sizes
from train.models.tokenizer import load_tokenizer, trained_tokens
from train.run.exits import ExitWith

EXISTING = tokenizer_at(BUNDLED_BASE).eos_token


def with_lora(config: Config, folder: Path, **lora: Any) -> Config:
    config = on(config, folder, "none")
    return replace(config, lora=replace(config.lora, **lora))


@pytest.mark.parametrize("spare", [0, 7], ids=["exact", "with spare rows"])
def test_where_rows_start(spare: int, config: Config, tmp_path: Path) -> None:
    """New tokens start as the mean of the tokens' rows, known ones as they are; spare rows of the base are used."""
    folder = write_llama(tmp_path / "base", Shape())
    if spare:
        shape = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(shape | {"vocab_size": VOCABULARY + spare}))
        names = ("model.embed_tokens.weight", "lm_head.weight")
        rewrite(folder, lambda tensors: tensors | {name: widened(tensors[name], spare) for name in names})
    config = with_lora(config, folder, trainable_tokens=("<|so|>", EXISTING))
    tokens = trained_tokens(config)
    assert [token in tokens.new for token in tokens.ids] == [True, False]
    model = training_of(config, Accelerator(cpu=True)).model
    causal_lm: Any = model.causal_lm
    for module in (causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()):
        vocabulary = Vocabulary.of(module)
        weight, rows = vocabulary.layer.weight, vocabulary.rows
        assert rows is not None
        assert weight.shape[0] == VOCABULARY + (spare or 1)
        torch.testing.assert_close(rows.values[0], weight[: tokens.known].mean(0))
        assert torch.equal(rows.values[1], weight[tokens.ids[1]])
    assert causal_lm.config.vocab_size == model.head.weight.shape[0]


def widened(weight: torch.Tensor, spare: int) -> torch.Tensor:
    return torch.cat([weight, 9 * torch.ones(spare, weight.shape[1])])


def test_control_tokens_are_special_and_words_are_not(config: Config) -> None:
    """A new word is one token wherever the data spells it; a new control token only where a template writes it."""
    config = replace(config, lora=replace(config.lora, trainable_tokens=("<|so|>", "bolt")))
    tokenizer: Any = load_tokenizer(config).backend
    control, word = trained_tokens(config).ids
    assert control in tokenizer.all_special_ids or control in Encoder(tokenizer).special
    assert word not in Encoder(tokenizer).special
    assert word in tokenizer("two bolts").input_ids
    assert load_tokenizer(config).notes[0] == "2 tokens are new: <|so|> bolt"


def test_layers_that_cannot_be_trained_whole(config: Config, tmp_path: Path) -> None:
    """Norms, linear layers, one matrix that is head and embedding, and a head with a bias are refused by name."""
    llama, tied = (write_llama(tmp_path / name, Shape(is_tied=name == "tied")) for name in ("llama", "tied"))
    phi = write(tmp_path / "phi", PhiConfig(**SPARSE))
    cases = [
        (llama, "norm", "only lm_head and embed_tokens can be trained whole"),
        (llama, "q_proj", "linear layers get adapters"),
        (tied, "embed_tokens", "are one matrix"),
        (phi, "lm_head", "has a bias"),
    ]
    for folder, word, reason in cases:
        wanted = with_lora(config, folder, modules_to_save=(word,), target_modules=("all-linear",))
        with pytest.raises(ExitWith, match=rf"--lora\.modules_to_save {word}: .*{reason}"):
            training_of(wanted, Accelerator(cpu=True))


def test_what_is_trained_is_planned(llama31_8b: Path, config: Config) -> None:
    """A trained embedding stays on the GPU; whole layers count weight, gradient and state, and what they compute."""

    def sizes(**lora: Any) -> Any:
        shape = with_lora(config, llama31_8b, **lora)
        shape = replace(shape, engine=replace(shape.engine, kind="fused"))
        return sketched_sizes(shape, torch.device("cuda"), torch.bfloat16).sizes

    plain, head, both = sizes(), sizes(modules_to_save=("lm_head",)), sizes(modules_to_save=("lm_head", "embed_tokens"))
    matrix = 128256 * 4096
    assert (plain.embedding_on_host, head.embedding_on_host, both.embedding_on_host) == (True, True, False)
    assert head.adapter_bytes - plain.adapter_bytes == 8 * matrix
    assert both.adapter_bytes - plain.adapter_bytes == 16 * matrix
    assert (plain.whole_bytes, head.whole_bytes, both.whole_bytes) == (0, 8 * matrix, 12 * matrix)
    assert head.head_bytes == plain.head_bytes == 2 * matrix


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("lora", [{"trainable_tokens": ("bolt",)}, {"modules_to_save": ("lm_head", "embed_tokens")}])
def test_half_precision_keeps_what_is_trained_in_fp32(
    lora: dict[str, Any], dtype: Any, config: Config, tmp_path: Path
) -> None:
    """On NF4 in 16 bits both engines give one loss and one gradient, up to rounding, for fp32 rows and layers."""
    config = with_lora(config, write_llama(tmp_path / "base", Shape()), **lora)
    config = replace(config, model=replace(config.model, dtype=dtype, quantization="nf4"))
    losses, gradients = [], []
    for kind in ("reference", "fused"):
        training = training_of(replace(config, engine=replace(config.engine, kind=kind)), Accelerator(cpu=True))  # type: ignore[arg-type]
        assert {parameter.dtype for parameter in training.parameters.values()} == {torch.float32}
        losses.append(0.0)
        for micro_batch in training.data.batch(0, training.plan).micro_batches:
            loss = training.model(micro_batch)
            loss.backward()
            losses[-1] += loss.item()
        gradients.append({name: parameter.grad for name, parameter in training.parameters.items()})
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)
    vocabulary = [name for name in gradients[0] if "lora_" not in name]
    assert len(vocabulary) == 2
    for name in vocabulary:
        one, other = gradients[0][name], gradients[1][name]
        assert one is not None
        assert other is not None
        assert one.norm() > 0
        assert (one - other).norm() <= 0.05 * one.norm(), name

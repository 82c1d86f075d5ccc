"""Steps, bases and answers of a model that is streamed are those of one that is not."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from tests.conftest import asked_in, training_of
from tests.parity.models import SIZES
from train.config import Config, EngineConfig, LoraConfig, MemoryConfig, ModelConfig
from train.deliver.compare import compare
from train.deliver.generation import Generator
from train.engine.families import decoder_layers
from train.models.tokenizer import load_tokenizer
from train.step import optimizer_step


def streamed(config: Config) -> Config:
    return replace(config, engine=EngineConfig(kind="fused"), memory=MemoryConfig(offload="stream"))


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_steps_streamed_and_not(quantization: Any, config: Config) -> None:
    """Losses and adapters of ten steps are equal to the bit, and every block's weights were in host memory."""
    config = replace(config, model=replace(config.model, quantization=quantization), lora=LoraConfig(r=4, dropout=0.1))
    fused = replace(config, engine=EngineConfig(kind="fused"))
    runs = [training_of(each, Accelerator(cpu=True)) for each in (fused, streamed(config))]
    assert [run.plan.streamed for run in runs] == [(), (0, 1)]
    curves = [[optimizer_step(run, step).loss for step in range(10)] for run in runs]
    assert curves[0] == curves[1]
    assert all(torch.equal(a, b) for a, b in zip(runs[0].parameters.values(), runs[1].parameters.values(), strict=True))


@pytest.mark.parametrize("names", ["model.layers", "layers"])
def test_a_base_is_read_block_by_block(names: str, config: Config, tmp_path: Any) -> None:
    """Weights from files, quantised one block after another, are those that transformers loads, to the bit."""
    shape = LlamaConfig(**SIZES | {"vocab_size": 2048, "hidden_size": 128, "tie_word_embeddings": False})
    AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).save_pretrained(tmp_path, max_shard_size="200KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    GenerationConfig(repetition_penalty=1.5).save_pretrained(tmp_path)
    for file in Path(config.model.name_or_path).glob("*token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if names == "layers":  # as a decoder that was saved without its head names them, but for the head
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        for file in set(index["weight_map"].values()):
            tensors = {name.removeprefix("model."): t for name, t in load_file(tmp_path / file).items()}
            save_file(tensors, tmp_path / file)
        index["weight_map"] = {name.removeprefix("model."): f for name, f in index["weight_map"].items()}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    config = replace(config, model=ModelConfig(name_or_path=str(tmp_path)))
    both = (replace(config, engine=EngineConfig(kind="fused")), streamed(config))
    found: list[Any] = [training_of(each, Accelerator(cpu=True)).model.adapted.get_base_model() for each in both]
    whole, parts = found
    for one, other in zip(decoder_layers(whole), decoder_layers(parts), strict=True):
        for a, b in zip(one.linears, other.linears, strict=True):
            first, second = cast(Any, a.weight), cast(Any, b.weight)
            assert torch.equal(first.data, second.data)
            assert torch.equal(first.quant_state.absmax, second.quant_state.absmax)
            assert torch.equal(first.quant_state.offset, second.quant_state.offset)
    assert torch.equal(whole.lm_head.weight, parts.lm_head.weight)
    assert parts.generation_config.repetition_penalty == whole.generation_config.repetition_penalty == 1.5
    # where a single file lies beside the index, it is the one that is read
    AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "model.safetensors")
    again: list[Any] = [training_of(each, Accelerator(cpu=True)).model.adapted.get_base_model() for each in both]
    whole, parts = again
    assert torch.equal(whole.lm_head.weight, parts.lm_head.weight)


def test_a_model_that_is_streamed_answers(config: Config) -> None:
    """Generation by transformers gets each layer's weights in turn: the resident model's answers, twice."""
    tokenizer = load_tokenizer(config).backend
    asked = asked_in(config, 3)
    answers = []
    for each in (replace(config, engine=EngineConfig(kind="fused")), streamed(config)):
        training = training_of(each, Accelerator(cpu=True))
        for step in range(3):
            optimizer_step(training, step)
        answers.append([compare(Generator(training.model, tokenizer, [0], 12), asked, lambda: False) for _ in range(2)])
        assert optimizer_step(training, 3).loss > 0  # the engine takes its memory again
    assert answers[0] == answers[1]
    assert answers[0][0][0].after.text


def test_questions_are_asked_again_where_memory_ends_within_a_pass(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer that runs out of memory once: fewer questions at a time, the same answers, weights back on the host."""
    tokenizer = load_tokenizer(config).backend
    asked = asked_in(config, 4)
    training = training_of(streamed(config), Accelerator(cpu=True))
    wanted = compare(Generator(training.model, tokenizer, [0], 6), asked, lambda: False)
    causal_lm: Any = training.model.adapted.get_base_model()
    mlp, failures = causal_lm.base_model.layers[1].mlp, iter([False, True])
    real = mlp.forward

    def failing(x: torch.Tensor) -> torch.Tensor:
        if next(failures, False):
            raise torch.OutOfMemoryError("no more")
        return real(x)

    monkeypatch.setattr(mlp, "forward", failing)
    assert compare(Generator(training.model, tokenizer, [0], 6), asked, lambda: False) == wanted
    for number, layer in enumerate(decoder_layers(causal_lm)):
        for linear, weight in zip(layer.linears, training.model.away.host.weights[number], strict=True):
            assert linear.weight is weight


def test_an_answer_that_fails_leaves_the_host_its_weights(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory in the last layer, when a layer's weights are lent: they and the hooks are as they were before."""
    training = training_of(streamed(config), Accelerator(cpu=True))
    causal_lm: Any = training.model.adapted.get_base_model()
    layers = decoder_layers(causal_lm)

    def failing(x: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(causal_lm.base_model.layers[-1].mlp, "forward", failing)
    ids = torch.arange(6)[None]
    with pytest.raises(torch.OutOfMemoryError), training.model.generating():
        causal_lm(input_ids=ids)
    for number, layer in enumerate(layers):
        assert not layer.module._forward_pre_hooks
        assert not layer.module._forward_hooks
        for linear, weight in zip(layer.linears, training.model.away.host.weights[number], strict=True):
            assert linear.weight is weight

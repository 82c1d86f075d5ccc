"""Every base that is accepted gives one first loss: resident, streamed, by the reference engine, by transformers."""

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config

from tests.conftest import thorough, training_of
from tests.parity.bases import Shape, by_transformers, first_loss, on, rewrite, ways, write
from train.config import Config
from train.run.exits import ExitWith


def drawn(number: int) -> Shape:
    """A random combination."""
    draw = random.Random(number)
    quantized = draw.choice(["", "", "", "nf4", "plain", "fp4", "partly"])
    is_tied = draw.random() < 0.4
    return Shape(
        is_tied=is_tied,
        is_sharded=draw.random() < 0.5,
        dtype=draw.choice([torch.float32, torch.float16, torch.bfloat16]),
        family=draw.choice([LlamaConfig, LlamaConfig, Qwen3Config]),
        quantized=quantized,
        names="" if draw.random() < 0.25 and not quantized else "model.",
        rubbish=draw.random() < 0.4,
    )


@pytest.mark.parametrize("number", [*range(8), *(pytest.param(n, marks=thorough) for n in range(8, 14))])
def test_one_loss_on_every_path(number: int, config: Config, tmp_path: Path) -> None:
    """Random checkpoints: sharded, tied, renamed, in three types, quantised already, with rubbish beside."""
    shape = drawn(number)
    folder = write(tmp_path / "base", shape)
    quantization = "nf4" if shape.quantized or number % 3 == 0 else "none"
    config = on(config, folder, quantization)
    found = {name: first_loss(way) for name, way in ways(config).items()}
    assert found["streamed"] == found["resident"], shape
    assert found["reference"] == pytest.approx(found["resident"], rel=2e-5), shape
    # transformers computes in the type of the files where they are quantised already
    tolerance = 5e-3 if shape.quantized else 2e-5
    assert found["reference"] == pytest.approx(by_transformers(config), rel=tolerance), shape


def test_a_base_stored_in_8_bits(config: Config, tmp_path: Path) -> None:
    """It trains on the reference engine with transformers' loss; asked for as anything else it is refused."""
    folder = write(tmp_path / "base", Shape(quantized="int8"))
    own = on(config, folder, "int8")
    assert first_loss(ways(own)["reference"]) == pytest.approx(by_transformers(own), rel=2e-3)
    for name in ("resident", "streamed"):
        with pytest.raises(ExitWith, match="int8 layers round their inputs"):
            first_loss(ways(own)[name])
    for other in ("nf4", "none"):
        for way in ways(on(config, folder, other)).values():
            with pytest.raises(
                ExitWith, match=r"is stored in 8 bits by bitsandbytes; write --model\.quantization int8"
            ):
                first_loss(way)


def test_a_base_stored_in_4_bits_is_not_taken_for_another(config: Config, tmp_path: Path) -> None:
    """Asked for as int8 or not quantised, it is refused."""
    folder = write(tmp_path / "base", Shape(quantized="nf4"))
    for other in ("int8", "none"):
        with pytest.raises(ExitWith, match=r"stored in 4 bits by bitsandbytes; write --model\.quantization nf4"):
            first_loss(on(config, folder, other))


def test_the_head_may_be_stored_for_the_embedding(config: Config, tmp_path: Path) -> None:
    """A tied pair under the head's name alone, and twice with equal values: the same loss as under the embedding's."""
    folder = write(tmp_path / "base", Shape(is_tied=True))
    config = on(config, folder, "none")
    wanted = first_loss(ways(config)["resident"])
    embedding = "model.embed_tokens.weight"
    rewrite(folder, lambda tensors: tensors | {"lm_head.weight": tensors[embedding].clone()})
    assert [first_loss(way) for way in ways(config).values()] == [pytest.approx(wanted, rel=1e-6)] * 3
    rewrite(folder, lambda tensors: {n: t for n, t in tensors.items() if n != embedding})
    assert [first_loss(way) for way in ways(config).values()] == [pytest.approx(wanted, rel=1e-6)] * 3


def test_what_a_model_returns_is_not_asked_of_its_files(config: Config, tmp_path: Path) -> None:
    """return_dict false in config.json changes no loss."""
    folder = write(tmp_path / "base", Shape())
    config = on(config, folder, "none")
    wanted = first_loss(ways(config)["resident"])
    settings = folder / "config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"return_dict": False}))
    assert [first_loss(way) for way in ways(config).values()] == [pytest.approx(wanted, rel=1e-6)] * 3


def test_codes_may_be_stored_as_any_type(config: Config, tmp_path: Path) -> None:
    """Packed weights that lie in fp16 are not converted with it: the loss of bytes; the engine does not read them."""
    bytes_, halves = (write(tmp_path / name, Shape(quantized=name)) for name in ("plain", "stored as fp16"))
    for dtype in ("fp32", "bf16"):
        losses = []
        for folder in (bytes_, halves):
            own = ways(on(config, folder, "nf4"))["reference"]
            losses.append(first_loss(replace(own, model=replace(own.model, dtype=dtype))))
        assert losses[0] == losses[1], dtype
    with pytest.raises(ExitWith, match=r"packed weights are stored as torch\.float16"):
        first_loss(ways(on(config, halves, "nf4"))["resident"])


def test_a_quantised_head_is_refused(config: Config, tmp_path: Path) -> None:
    """On every path."""
    folder = write(tmp_path / "base", Shape(quantized="with its head"))
    for way in ways(on(config, folder, "nf4")).values():
        with pytest.raises(ExitWith, match="lm_head: the head is quantised"):
            first_loss(way)


def test_leftovers_are_said(config: Config, tmp_path: Path) -> None:
    """Tensors that are no part of the model are counted in the notes of the base, by both loaders."""
    folder = write(tmp_path / "base", Shape(rubbish=True))
    for way in ways(on(config, folder, "nf4")).values():
        about = training_of(way, Accelerator(cpu=True)).model.about
        assert about.notes == [
            "2 tensors of the files are no part of the model and are not read: mtp.head (1), vision_tower.patch (1)"
        ]
        assert about.held.quantized == {"NF4": 3 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96)}
        assert set(about.held.others) == {"embedding", "head", "norms and biases"}
        model = LlamaForCausalLM(LlamaConfig.from_pretrained(folder))
        assert about.held.total == sum(parameter.numel() for parameter in model.parameters())

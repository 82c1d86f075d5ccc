"""A base whose files are not those of its config.json is refused by both loaders, with what is wrong."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file

from tests.conftest import training_of
from tests.parity.bases import VOCABULARY, Shape, Tensors, first_loss, on, rewrite, ways, write
from train.config import Config
from train.run.exits import ExitCode, ExitWith


def without(*parts: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: t for n, t in tensors.items() if not any(part in n for part in parts)}


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n.replace(old, new): t for n, t in tensors.items()}


def plus(name: str, *size: int, dtype: torch.dtype = torch.float32) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: torch.ones(size, dtype=dtype)}


def nan_in(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: torch.full_like(tensors[name], float("nan"))}


def nan_in_row(name: str, row: int) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        values = tensors[name].clone()
        values[row] = float("nan")
        return tensors | {name: values}

    return change


WRONG: dict[str, tuple[Shape, Callable[[Tensors], Tensors], str]] = {
    "a lost block": (Shape(), without("layers.2."), r"lack model\.layers\.2\..* and 5 more"),
    "one lost norm": (Shape(), without("layers.1.input_layernorm"), r"lack model\.layers\.1\.input_layernorm\.weight"),
    "no head": (Shape(), without("lm_head"), r"lack lm_head\.weight"),
    "no embedding": (Shape(), without("embed_tokens"), r"lack model\.embed_tokens\.weight"),
    "neither of a tied pair": (Shape(is_tied=True), without("embed_tokens"), r"lack .*weight"),
    "compiled": (Shape(), lambda tensors: {f"_orig_mod.{n}": t for n, t in tensors.items()}, "lack"),
    "peft's names": (Shape(), renamed("_proj.weight", "_proj.base_layer.weight"), "lack"),
    "a further block": (
        Shape(),
        lambda tensors: (
            tensors | {n.replace("layers.2", "layers.3"): t.clone() for n, t in tensors.items() if "layers.2" in n}
        ),
        r"hold model\.layers\.3\..* which the model of config\.json does not have",
    ),
    "a bias that the model has not": (
        Shape(),
        plus("model.layers.0.self_attn.q_proj.bias", 64),
        r"hold .*q_proj\.bias",
    ),
    "a head's bias": (Shape(), plus("lm_head.bias", VOCABULARY), r"hold lm_head\.bias"),
    "another shape": (
        Shape(),
        lambda tensors: tensors | {"model.norm.weight": torch.ones(60)},
        r"model\.norm\.weight is \[60\] in the files, \[64\] by config\.json",
    ),
    "a norm that the model has not": (Shape(), plus("model.layers.0.self_attn.q_norm.weight", 16), r"hold .*q_norm"),
    "an adapter that was not merged": (
        Shape(),
        plus("model.layers.1.mlp.up_proj.lora_A.weight", 4, 64),
        r"hold .*lora_A",
    ),
    "one tensor under two names": (
        Shape(),
        lambda tensors: tensors | {"layers.1.mlp.up_proj.weight": tensors["model.layers.1.mlp.up_proj.weight"] * 2},
        r"model\.layers\.1\.mlp\.up_proj\.weight is there twice, also as layers\.1",
    ),
    "codes in a bias": (Shape(), plus("model.layers.0.mlp.up_proj.bias", 96, dtype=torch.int8), "stored as I8"),
    "weights that are no numbers": (
        Shape(),
        nan_in("model.layers.1.mlp.up_proj.weight"),
        r"1 of its weights hold NaN .*up_proj",
    ),
    "a row that no sample has": (Shape(), nan_in_row("model.embed_tokens.weight", 1999), "hold NaN .*embed_tokens"),
    "counts in a weight": (Shape(), plus("model.layers.0.mlp.up_proj.weight", 96, 64, dtype=torch.int32), "as I32"),
    "scales of codes": (Shape(), plus("model.layers.0.mlp.up_proj.SCB", 96), r"SCB is of 8-bit codes.*stored as F32"),
    "codes without their scales": (
        Shape(),
        lambda tensors: tensors | {"model.layers.0.mlp.up_proj.weight": torch.ones(96, 64, dtype=torch.int8)},
        "stored as I8",
    ),
    "two heads for one": (
        Shape(is_tied=True),
        lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"] * 1.5},
        r"ties the head to the embedding, and the files hold two",
    ),
}


@pytest.mark.fault("T29")
@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("way", ["reference", "resident", "streamed"])
def test_files_of_another_model_are_refused(way: str, name: str, config: Config, tmp_path: Path) -> None:
    """Whatever would be drawn at random, or left out, is named, by both loaders."""
    shape, change, message = WRONG[name]
    folder = write(tmp_path / "base", shape)
    rewrite(folder, change)
    with pytest.raises(ExitWith, match=message) as caught:
        first_loss(ways(on(config, folder, "none"))[way])
    assert caught.value.code == ExitCode.BAD_INPUT


@pytest.mark.fault("T29")
@pytest.mark.parametrize("way", ["reference", "streamed"])
def test_folders_that_do_not_hold_one_base_are_refused(way: str, config: Config, tmp_path: Path) -> None:
    """An adapter beside the base, a lost shard, a tensor in two shards, weights of a foreign quantisation."""
    folder = write(tmp_path / "base", Shape(is_sharded=True))
    config = ways(on(config, folder, "none"))[way]
    first_loss(config)
    shards = sorted(folder.glob("model-*.safetensors"))

    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(ExitWith, match="an adapter lies beside the base"):
        first_loss(config)
    (folder / "adapter_config.json").unlink()

    content = shards[0].read_bytes()
    save_file(load_file(shards[0]) | {"model.norm.weight": torch.ones(64)}, shards[0])
    with pytest.raises(ExitWith, match=r"model\.norm\.weight is both in .* and in"):
        first_loss(config)
    shards[0].unlink()
    with pytest.raises(
        ExitWith, match=rf"{shards[0].name}: model.safetensors.index.json names it, and it is not there"
    ):
        first_loss(config)
    shards[0].write_bytes(content[:-100])
    with pytest.raises(ExitWith, match="cannot read safetensors weights"):
        first_loss(config)
    shards[0].write_bytes(content)

    settings = json.loads((folder / "config.json").read_text())
    for method in ("gptq", "awq", "fp8", "mxfp4", "compressed-tensors"):
        (folder / "config.json").write_text(json.dumps(settings | {"quantization_config": {"quant_method": method}}))
        with pytest.raises(ExitWith, match=f"quantised by {method}, which is not trained here"):
            first_loss(config)


@pytest.mark.fault("T29")
def test_settings_of_answers_that_cannot_be_read_are_named(config: Config, tmp_path: Path) -> None:
    """transformers reads them with the weights, which are not what is wrong."""
    folder = write(tmp_path / "base", Shape())
    (folder / "generation_config.json").write_text('{"num_return_sequences": 3}')
    with pytest.raises(ExitWith, match=r"cannot read generation_config\.json: .*num_return_sequences"):
        first_loss(ways(on(config, folder, "none"))["reference"])


def quant_state(tensors: Tensors, name: str, **changes: object) -> torch.Tensor:
    """The state of a packed weight with other entries."""
    state = json.loads(bytes(tensors[f"{name}.quant_state.bitsandbytes__nf4"].tolist()))
    return torch.tensor(list(json.dumps(state | changes).encode()), dtype=torch.uint8)


UP = "model.layers.1.mlp.up_proj.weight"
WRONG_BITS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "weights that are not packed": (
        lambda tensors: {n: t for n, t in tensors.items() if not n.startswith(UP)} | {UP: torch.ones(96, 64)},
        r"(should be packed in 4 bits|quant_state|cannot read)",
    ),
    "another shape": (
        lambda t: t | {f"{UP}.quant_state.bitsandbytes__nf4": quant_state(t, UP, shape=[64, 96])},
        r"is \[64, 96\] by its scales, \[96, 64\] by config\.json",
    ),
    "too few codes": (lambda tensors: tensors | {UP: tensors[UP][:-64]}, r"(not of its size|cannot read)"),
    "no scales": (without(f"{UP}.absmax"), r"(should be packed|cannot read|is \[3072, 1\] in the files)"),
}


@pytest.mark.fault("T29")
@pytest.mark.parametrize("name", WRONG_BITS)
@pytest.mark.parametrize("way", ["reference", "resident", "streamed"])
def test_packed_weights_that_are_none_are_refused(way: str, name: str, config: Config, tmp_path: Path) -> None:
    """A base that is stored in 4 bits, with a layer that is not, or not of its size: 78 from both loaders."""
    change, message = WRONG_BITS[name]
    folder = write(tmp_path / "base", Shape(quantized="nf4"))
    rewrite(folder, change)
    with pytest.raises(ExitWith, match=message) as caught:
        first_loss(ways(on(config, folder, "nf4"))[way])
    assert caught.value.code == ExitCode.BAD_INPUT


@pytest.mark.fault("T29")
def test_blocks_that_are_stored_in_different_ways_are_not_streamed(config: Config, tmp_path: Path) -> None:
    """One block in FP4 among others in NF4: streaming is refused, the rest trains and is told in shares."""
    folder, other = write(tmp_path / "nf4", Shape(quantized="nf4")), write(tmp_path / "fp4", Shape(quantized="fp4"))
    foreign = load_file(other / "model.safetensors")
    mixed = {name: tensor for name, tensor in foreign.items() if "layers.1." in name}
    rewrite(folder, lambda tensors: {n: t for n, t in tensors.items() if "layers.1." not in n} | mixed)
    every = ways(on(config, folder, "nf4"))
    assert first_loss(every["resident"]) == pytest.approx(first_loss(every["reference"]), rel=2e-5)
    with pytest.raises(ExitWith, match="its blocks are not all stored in the same way"):
        first_loss(every["streamed"])
    about = training_of(every["reference"], Accelerator(cpu=True)).model.about
    assert set(about.held.quantized) == {"NF4", "FP4"}

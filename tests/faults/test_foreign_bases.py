"""A base whose files are not those of its config.json is refused by both loaders, with what is wrong."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parity.bases import VOCABULARY, Shape, Tensors, first_loss, on, rewrite, ways, write
from train.config import Config
from train.run.exits import ExitCode, ExitWith


def without(*parts: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n: t for n, t in tensors.items() if not any(part in n for part in parts)}


def renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {n.replace(old, new): t for n, t in tensors.items()}


def plus(name: str, *size: int, dtype: torch.dtype = torch.float32) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: torch.ones(size, dtype=dtype)}


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
    with pytest.raises(ExitWith, match=rf"names {shards[0].name}, which is not there"):
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

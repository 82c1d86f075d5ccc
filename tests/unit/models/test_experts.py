"""A mixture's experts in NF4: read from files as they are shipped, packed, trained, and given to transformers."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
import transformers as T
from safetensors.torch import load_file, save_file
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

from tests.parity.models import EXPERTS, SIZES
from train.config import ModelConfig
from train.engine.host_stream import HostBlocks
from train.engine.machine_memory import OwnMemory
from train.models.base import load_base, skeleton
from train.models.experts import StoredExperts, _mapping, expert_parts, packed_experts, with_block_names
from train.models.held_weights import held_weights
from train.models.stored import StoredWeights, name_as_read
from train.run.exits import ExitWith

CPU = torch.device("cpu")
SHAPES: dict[str, Any] = {
    "qwen3_moe": T.Qwen3MoeConfig(**SIZES, **EXPERTS),
    "mixtral": T.MixtralConfig(**SIZES, num_local_experts=4),
}


@pytest.fixture(params=SHAPES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tiny mixture as transformers saves it: a tensor for each expert."""
    torch.manual_seed(1)
    T.AutoModelForCausalLM.from_config(SHAPES[request.param]).save_pretrained(tmp_path)
    names = stored(tmp_path)
    assert not any(tensor.dim() == 3 for tensor in names.values())
    assert any("block_sparse_moe" in name for name in names) == (request.param == "mixtral")
    return tmp_path


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def loaded(folder: Path, streamed: tuple[int, ...] = ()) -> Any:
    config = ModelConfig(str(folder), quantization="nf4")
    return load_base(config, torch.float32, CPU, HostBlocks(streamed, OwnMemory(pin=False)), 0, False)[0]


def rounded(parameter: torch.Tensor) -> torch.Tensor:
    """What NF4 with double quantisation makes of a weight, by bitsandbytes alone."""
    packed, state = bnb.functional.quantize_4bit(parameter.contiguous(), quant_type="nf4", compress_statistics=True)
    return bnb.functional.dequantize_4bit(packed, state)


def in_nf4(folder: Path) -> Any:
    """The model by transformers in fp32, with the rounded values in the place of its linear layers' and experts'."""
    model: Any = T.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 3 or "_proj" in name:
            parameter.data = rounded(parameter.data)
    return model


@pytest.mark.parametrize("streamed", [(), (0, 2)])
def test_experts_are_packed_and_compute_what_nf4_is(folder: Path, streamed: tuple[int, ...]) -> None:
    """Logits are those of rounded weights; between two passes nothing is in 16 bits, also where blocks are streamed."""
    base, ids = loaded(folder, streamed), torch.randint(100, (1, 9))
    held = held_weights(base)
    assert "experts" not in held.others
    assert held.quantized["NF4"] > 0.8 * held.total
    with torch.no_grad():
        wanted, found = in_nf4(folder)(ids).logits, base(ids).logits
    assert torch.equal(found, wanted) or (found - wanted).norm() < 1e-6 * wanted.norm()
    assert len(packed_experts(base)) == 6
    assert all(isinstance(linear.weight, bnb.nn.Params4bit) for linear in packed_experts(base))


def test_whole_experts_are_read_by_the_names_in_the_files(tmp_path: Path) -> None:
    """Aria's experts lie there as fc1 and fc2, transposed: packed, they compute what rounded weights do."""
    torch.manual_seed(1)
    shape: Any = T.AriaTextConfig(**SIZES, moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1)
    model: Any = T.AutoModelForCausalLM.from_config(shape)
    model.save_pretrained(tmp_path)
    assert "model.layers.0.mlp.experts.fc1.weight" in stored(tmp_path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 3:
                parameter.copy_(rounded(parameter.transpose(1, 2)).transpose(1, 2))
            elif "_proj" in name:
                parameter.copy_(rounded(parameter))
        ids = torch.randint(100, (1, 9))
        base = loaded(tmp_path)
        assert len(packed_experts(base)) == 2 * SIZES["num_hidden_layers"]
        wanted, found = model(ids).logits, base(ids).logits
    assert (found - wanted).norm() < 1e-6 * wanted.norm()


def test_names_of_experts_may_be_expressions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    r"""DeepSeek-V4's and Kimi Linear's are written \.experts.*.w1.weight: the same names in the files without it."""
    T.AutoModelForCausalLM.from_config(SHAPES["mixtral"]).save_pretrained(tmp_path)
    base = skeleton(ModelConfig(str(tmp_path), quantization="nf4"), torch.float32)
    ways = {
        "gate_up_proj": (["w1", "w3"], [MergeModulelist(0), Concatenate(1)]),
        "down_proj": (["w2"], [MergeModulelist(0)]),
    }
    plain, marked = (
        [
            WeightConverter(
                [f"{dot}experts.*.{each}.weight" for each in parts], f"{dot}experts.{name}", list[Any](operations)
            )
            for name, (parts, operations) in ways.items()
        ]
        for dot in (".", r"\.")
    )
    found = []
    for mapping in (plain, marked):
        monkeypatch.setattr("train.models.experts._mapping", lambda _, mapping=mapping: mapping)
        found.append(expert_parts(base))
    assert found[0] == found[1]
    assert found[0]["model.layers.0.mlp.experts.down_proj"][0][3] == "model.layers.0.mlp.experts.3.w2.weight"


def test_names_that_the_model_has_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistral Large 4's expressions match what they make: files that have the new names are read as they are."""
    T.AutoModelForCausalLM.from_config(SHAPES["qwen3_moe"]).save_pretrained(tmp_path)
    base = skeleton(ModelConfig(str(tmp_path), quantization="nf4"), torch.float32)
    mapping = [*_mapping(base), WeightRenaming(r"\.gate\.", r"\.mlp.gate\.")]
    monkeypatch.setattr("train.models.experts._mapping", lambda _: mapping)
    with ExitStack() as files:
        found = with_block_names(StoredWeights([tmp_path / "model.safetensors"], files), base)
    assert "model.layers.0.mlp.gate.weight" in found.tensors
    assert name_as_read("layers.0.gate.weight", mapping, found.tensors) == "layers.0.mlp.gate.weight"


def test_a_merge_takes_what_was_trained_with(folder: Path) -> None:
    """Each expert's tensor, by its name in the files, is its part of the parameter that was rounded as a whole."""
    config = ModelConfig(str(folder), quantization="nf4")
    base = skeleton(config, torch.float32)
    with ExitStack() as files:
        experts = StoredExperts(base, StoredWeights([folder / "model.safetensors"], files), torch.float32, CPU)
        names = [name for name in stored(folder) if ".experts." in name]
        assert sorted(names) == sorted(experts.places)
        found = {name: experts.trained_with(name) for name in names}
    model = in_nf4(folder)
    model.save_pretrained(folder)
    assert all(torch.equal(values, stored(folder)[name]) for name, values in found.items())


def changed(folder: Path, change: Mapping[str, torch.Tensor | None]) -> None:
    tensors = {**stored(folder), **change}
    save_file({name: each for name, each in tensors.items() if each is not None}, folder / "model.safetensors")


def test_a_missing_or_other_expert_is_named(folder: Path) -> None:
    """An expert's tensor that is not there, or has another shape, or is one too many, ends the run with its name."""
    names = sorted(name for name in stored(folder) if ".experts.1." in name and "layers.1" in name)
    assert len(names) == 3
    whole = stored(folder)
    as_shown = names[0].replace("block_sparse_moe", "mlp")
    changed(folder, {names[0]: None})
    with pytest.raises(ExitWith, match=f"(?s)lack {as_shown}"):
        loaded(folder)
    changed(folder, {names[0]: whole[names[0]][:-1]})
    with pytest.raises(ExitWith, match=f"(?s){as_shown} is "):
        loaded(folder)
    changed(folder, {names[0]: whole[names[0]], names[0].replace("experts.1", "experts.17"): whole[names[0]].clone()})
    with pytest.raises(ExitWith, match=r"(?s)experts\.17.*does not have"):
        loaded(folder)

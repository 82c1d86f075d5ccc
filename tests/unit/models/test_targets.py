"""Every word of lora.target_modules stands for layers that are adapted, or is refused with what exists."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from accelerate import Accelerator

from tests.conftest import training_of
from tests.multimodal import FAMILIES, write_multimodal
from tests.parity.bases import on
from tests.parity.models import DELTA, LINEAR
from tests.unit.models.test_agreement import SIZES
from train.config import LLAMA_LINEAR_LAYERS, Config, ModelConfig
from train.memory.outlook import sketched_sizes
from train.models.adapters import with_adapters
from train.models.base import skeleton
from train.models.language_model import sketch
from train.models.targets import resolve_targets
from train.run.exits import ExitCode, ExitWith
from train.step import optimizer_step

QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")


def adapted(config: Config, folder: Path, *words: str, quantization: Any = "none", dropout: float = 0.0) -> set[str]:
    """The modules that got an adapter, by name."""
    lora = replace(config.lora, target_modules=words, dropout=dropout)
    model = ModelConfig(name_or_path=str(folder), quantization=quantization)
    sketched: Any = sketch(replace(config, model=model, lora=lora), torch.float32).get_base_model()
    return {name for name, module in sketched.named_modules() if hasattr(module, "lora_A")}


def shape_only(folder: Path, shape: Any) -> Path:
    shape.save_pretrained(folder)
    return folder


def test_names_expressions_and_all(config: Config, tmp_path: Path) -> None:
    """Ends of names, a regular expression over whole names, and all-linear adapt what they say."""
    folder = shape_only(tmp_path, T.LlamaConfig(**SIZES))
    every = adapted(config, folder, "all-linear")
    assert every == adapted(config, folder, *QKVO, "gate_proj", "up_proj", "down_proj")
    assert len(every) == 14
    assert adapted(config, folder, "self_attn.q_proj") == {f"model.layers.{i}.self_attn.q_proj" for i in (0, 1)}
    first = adapted(config, folder, r".*\.layers\.0\..*(gate|up)_proj", "v_proj")
    assert first == {
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.up_proj",
        "model.layers.0.self_attn.v_proj",
        "model.layers.1.self_attn.v_proj",
    }


@pytest.mark.parametrize("words", [("all-linear",), LLAMA_LINEAR_LAYERS])
def test_what_peft_refuses_is_left_out_of_all(words: tuple[str, ...], config: Config, tmp_path: Path) -> None:
    """All of Mamba but out_proj, on which PEFT puts no adapter, is trained, and said; asked for by name, it is told."""
    sizes = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    folder = shape_only(tmp_path, T.MambaConfig(**sizes, state_size=8))
    names = adapted(config, folder, *words)
    assert names == {f"backbone.layers.{i}.mixer.{part}" for i in (0, 1) for part in ("in_proj", "x_proj", "dt_proj")}
    resolved = resolve_targets(skeleton(ModelConfig(str(folder), quantization="none"), torch.float32), words)
    assert resolved.note == "2 linear layers have no adapter: PEFT refuses out_proj here"
    with pytest.raises(ExitWith, match="'out_proj' is incompatible with Mamba-based models"):
        adapted(config, folder, "out_proj")


def test_linear_layers_of_an_architecture_s_own(config: Config, tmp_path: Path) -> None:
    """Falcon's compute a product, and are adapted; Llama 4's routers return more, and are not."""
    sizes = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")}
    names = adapted(config, shape_only(tmp_path / "falcon", T.FalconConfig(**sizes)), *LLAMA_LINEAR_LAYERS)
    ends = ("self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h")
    assert names == {f"transformer.h.{i}.{end}" for i in (0, 1) for end in ends}
    sparse = T.Llama4TextConfig(**SIZES, head_dim=16, num_local_experts=2, moe_layers=[0, 1])
    names = adapted(config, shape_only(tmp_path / "llama4", sparse), "all-linear")
    assert names
    assert not any("router" in name for name in names)


def test_an_image_encoder_within_the_decoder_has_no_adapters(config: Config, tmp_path: Path) -> None:
    """GIT's lies there: all of its text layers and the projection of images are adapted, and none of the encoder."""
    sizes = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    folder = shape_only(tmp_path, T.GitConfig(vision_config=vision | {"image_size": 32, "patch_size": 16}, **sizes))
    names = adapted(config, folder, "all-linear")
    assert {name.split(".")[1] for name in names} == {"encoder", "visual_projection"}
    assert len(names) == 2 * 6 + 1


WRONG: dict[tuple[str, ...], str] = {
    ("q_proj", "v_porj"): "v_porj matches no layer",
    ("q_proj", "embed_tokens"): "embed_tokens is an embedding, which stays frozen",
    ("q_proj", "norm"): "norm matches model.norm, a LlamaRMSNorm, which is no linear layer",
    ("q_proj", r".*lm_head"): r".*lm_head is the output head, which stays frozen",
    ("q_proj", r"layers\.7\..*"): r"layers\.7\..* matches no layer",
}


@pytest.mark.parametrize("words", WRONG)
def test_words_that_match_nothing_are_refused(words: tuple[str, ...], config: Config, tmp_path: Path) -> None:
    """The reason, and the linear layers that exist with their counts."""
    with pytest.raises(ExitWith) as caught:
        adapted(config, shape_only(tmp_path, T.LlamaConfig(**SIZES)), *words)
    assert caught.value.code == ExitCode.BAD_INPUT
    assert f"--lora.target_modules:\n  {WRONG[words]}" in caught.value.reason
    assert "k_proj (2)" in caught.value.reason
    assert caught.value.reason.endswith("all of them: --lora.target_modules all-linear")


def test_fused_projections_are_named(config: Config, tmp_path: Path) -> None:
    """Some of Llama's names on Phi-3 match nothing, and the fused ones are told; all seven, the default, mean all."""
    shape = T.Phi3Config(**SIZES)
    with pytest.raises(ExitWith) as caught:
        adapted(config, shape_only(tmp_path, shape), *QKVO, "gate_proj", "up_proj")
    lines = caught.value.reason.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == ["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"]
    assert "down_proj (2), gate_up_proj (2), o_proj (2), qkv_proj (2)" in lines[-1]
    assert len(adapted(config, tmp_path, "all-linear")) == 8
    assert len(adapted(config, tmp_path, *QKVO, "gate_proj", "up_proj", "down_proj")) == 8


def test_hybrids(config: Config, tmp_path: Path) -> None:
    """Llama's seven names, the default, are in every fourth layer of Qwen3.5; they mean the linear attention too."""
    folder = shape_only(tmp_path, T.Qwen3_5TextConfig(**SIZES, **DELTA, layer_types=LINEAR[:2]))
    found = adapted(config, folder, *QKVO, "gate_proj", "up_proj", "down_proj")
    assert found == adapted(config, folder, "all-linear")
    assert len(found) == 15
    names = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")
    assert {f"model.layers.0.linear_attn.{name}" for name in names} <= found
    assert len(adapted(config, folder, *QKVO)) == 4


def test_the_vision_tower_gets_no_adapters(config: Config, tmp_path: Path) -> None:
    """Of a multimodal base the text part alone is there to be adapted; a name of the tower's alone is refused."""
    folder = shape_only(tmp_path, FAMILIES["gemma3"][0]())
    for words in (QKVO, ("all-linear",), (".*_proj",)):
        found = adapted(config, folder, *words)
        assert found
        assert all(name.startswith("model.layers.") for name in found)
    with pytest.raises(ExitWith, match=r"fc1 matches no layer"):
        adapted(config, folder, "q_proj", "fc1")


def test_experts(config: Config, tmp_path: Path) -> None:
    """Adapters on experts by Llama's names; quantised as NF4, or refused, never left in 16 bits; dropout is named."""
    qwen = T.Qwen3MoeConfig(**SIZES | {"head_dim": 16}, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2)
    mixtral = T.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    transposed = T.GptOssConfig(**SIZES | {"head_dim": 16}, num_local_experts=4, num_experts_per_tok=2)
    folders = [shape_only(tmp_path / str(i), shape) for i, shape in enumerate((qwen, mixtral, transposed))]
    names = (*QKVO, "gate_proj", "up_proj", "down_proj")
    for folder in folders:
        assert any(name.endswith("experts") for name in adapted(config, folder, *names))
        assert any(name.endswith("experts") for name in adapted(config, folder, *names, quantization="nf4"))
        others = " ".join(QKVO)
        with pytest.raises(ExitWith, match=rf"--lora\.dropout 0\.1: .*--lora.dropout 0, or .*target_modules {others}$"):
            adapted(config, folder, *names, dropout=0.1)
        adapted(config, folder, *QKVO)
        with pytest.raises(ExitWith, match=r"of .* are experts in three-dimensional parameters.*GiB, not .*none"):
            adapted(config, folder, *QKVO, quantization="int8")
    moe = replace(config, model=ModelConfig(name_or_path=str(folders[0]), quantization="int8"))
    with pytest.raises(ExitWith, match=r"--model\.quantization none"):
        sketched_sizes(moe, torch.device("cpu"), torch.float32)


def test_what_gets_no_adapter_is_said(config: Config, tmp_path: Path) -> None:
    """Counts are of what is adapted, where dense layers or a shared expert have the names of experts' layers."""
    experts: Any = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    names = (*QKVO, "gate_proj", "up_proj", "down_proj")
    found = {}
    for name, shape in (
        ("mixed", T.Qwen3MoeConfig(**SIZES | {"head_dim": 16}, **experts, mlp_only_layers=[1])),
        ("shared", T.Qwen2MoeConfig(**SIZES, **experts, shared_expert_intermediate_size=32)),
    ):
        model = ModelConfig(name_or_path=str(shape_only(tmp_path / name, shape)), quantization="none")
        lora = replace(config.lora, target_modules=names, dropout=0.0)
        base = skeleton(model, torch.float32)
        found[name] = with_adapters(base, replace(config, model=model, lora=lora), is_sketch=True)[1]
    num_layers = SIZES["num_hidden_layers"]
    assert found["mixed"].counts["gate_proj"] == num_layers - 1
    assert found["mixed"].note.startswith("3 linear layers have no adapter")
    assert found["shared"].counts["gate_proj"] == num_layers
    assert found["shared"].note.startswith("the experts have no adapters")


def test_bases_that_nest_their_language_model_train(config: Config, tmp_path: Path) -> None:
    """The text part of a multimodal base of transformers learns, and nothing of the base is beside its decoder."""
    folder = write_multimodal(tmp_path / "base", "mistral3")
    training = training_of(on(config, folder, "nf4"), Accelerator(cpu=True))
    losses = [optimizer_step(training, step).loss for step in range(3)]
    assert losses[-1] < losses[0]
    assert "outside the decoder" not in training.model.about.held.others

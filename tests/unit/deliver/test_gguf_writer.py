"""GGUF files, read back by the `gguf` package: every tensor and key, and what is not written."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GemmaConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

from tests.gguf_models import LLAMA3, NUM_ROWS, SHAPES, SIZES, YARN, model_folder, written
from train.deliver.gguf_shape import gguf_shape
from train.deliver.gguf_writer import write_gguf
from train.deliver.optional import package
from train.run.exits import ExitCode, ExitWith

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def name_of(place: str) -> str:
    """A tensor's name in GGUF, spelled out by hand."""
    module, _, kind = place.rpartition(".")
    if not module.startswith("model.layers."):
        return f"{NAMES[module]}.{kind}"
    _, _, number, inner = module.split(".", 3)
    return f"blk.{number}.{NAMES[inner]}.{kind}"


def unpermuted(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Rows of which neighbours are a pair -> rows of which the first half of a head pairs with the second."""
    heads = rows.reshape(-1, head_dim, *rows.shape[1:])
    return np.concatenate([heads[:, 0::2], heads[:, 1::2]], axis=1).reshape(rows.shape)


def contents(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Tensors and keys of a file."""
    reader = gguf.GGUFReader(path)
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    return tensors, {name: field.contents() for name, field in reader.fields.items()}


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", ["F16", "F32"])
def test_every_tensor_is_written(name: str, kind: Any, tmp_path: Path) -> None:
    """Each family, from shards: all weights to the bit in their type, norms and biases in fp32, and nothing else."""
    model_folder(tmp_path, SHAPES[name], shard_size="300KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    shape, vocabulary = written(tmp_path)
    write_gguf(tmp_path, tmp_path / "tiny.gguf", kind, shape, vocabulary)
    found, _ = contents(tmp_path / "tiny.gguf")
    stored = {k: v for path in tmp_path.glob("*.safetensors") for k, v in load_file(path).items()}
    for place, tensor in stored.items():
        got = found.pop(name_of(place))
        dtype = torch.float16 if kind == "F16" and tensor.dim() > 1 else torch.float32
        if shape.family.architecture == "llama" and ("q_proj" in place or "k_proj" in place):
            got = unpermuted(got, shape.head_dim)
        assert torch.equal(torch.from_numpy(got), tensor.to(dtype)), place
    assert set(found) == ({"rope_freqs.weight"} if name == "llama, llama3 scaling" else set())


def test_keys_say_the_shape(tmp_path: Path) -> None:
    """Sizes, heads, epsilon, rotary embedding, yarn, special tokens; the vocabulary is as long as the embedding."""
    model_folder(tmp_path, Qwen3Config(**SIZES, head_dim=32, rms_norm_eps=1e-5, rope_parameters=YARN))
    write_gguf(tmp_path, tmp_path / "tiny.gguf", "F16", *written(tmp_path))
    _, keys = contents(tmp_path / "tiny.gguf")
    wanted = {
        "general.architecture": "qwen3",
        "general.type": "model",
        "general.file_type": 1,
        "qwen3.block_count": 2,
        "qwen3.embedding_length": 64,
        "qwen3.feed_forward_length": 96,
        "qwen3.attention.head_count": 4,
        "qwen3.attention.head_count_kv": 2,
        "qwen3.attention.key_length": 32,
        "qwen3.context_length": 512,
        "qwen3.rope.freq_base": 10000.0,
        "qwen3.rope.scaling.type": "yarn",
        "qwen3.rope.scaling.factor": 4.0,
        "qwen3.rope.scaling.original_context_length": 128,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": True,
    }
    assert {name: keys[name] for name in wanted} == wanted
    assert keys["qwen3.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert keys["tokenizer.ggml.tokens"][-3:] == [*keys["tokenizer.ggml.tokens"][-3:-2], "[PAD2048]", "[PAD2049]"]
    assert len(keys["tokenizer.ggml.tokens"]) == NUM_ROWS
    assert keys["tokenizer.ggml.token_type"][:4] == [3] * 4  # control
    assert keys["tokenizer.ggml.token_type"][-2:] == [5, 5]  # unused
    assert "message.role" in keys["tokenizer.chat_template"]


def test_a_sliding_window_bounds_the_context(tmp_path: Path) -> None:
    """llama.cpp has no window for Mistral: the file's context ends with it, and that is told."""
    MistralConfig(**SIZES, sliding_window=128, architectures=["MistralForCausalLM"]).save_pretrained(tmp_path)
    shape = gguf_shape(tmp_path)
    assert shape.context_length == 128
    assert "128 tokens, the sliding window" in shape.notes[0]
    MistralConfig(**SIZES, sliding_window=None, architectures=["MistralForCausalLM"]).save_pretrained(tmp_path)
    assert (gguf_shape(tmp_path).context_length, gguf_shape(tmp_path).notes) == (512, ())


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (GemmaConfig(**SIZES, architectures=["GemmaForCausalLM"]), "GemmaForCausalLM is not one of LlamaForCausalLM"),
        (LlamaConfig(**SIZES, hidden_act="gelu", architectures=["LlamaForCausalLM"]), "computes gelu"),
        (
            LlamaConfig(
                **SIZES,
                rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
                architectures=["LlamaForCausalLM"],
            ),
            "rotary scaling 'dynamic'",
        ),
        (Qwen2Config(**SIZES, rope_parameters=LLAMA3, architectures=["Qwen2ForCausalLM"]), "'llama3' is not written"),
        (
            LlamaConfig(**SIZES, rope_parameters={**YARN, "truncate": False}, architectures=["LlamaForCausalLM"]),
            "yarn without truncation",
        ),
    ],
)
def test_what_llama_cpp_computes_otherwise_is_refused(config: Any, reason: str, tmp_path: Path) -> None:
    """Another family, activation or rotary scaling ends with 78 by name."""
    config.save_pretrained(tmp_path)
    with pytest.raises(ExitWith, match=reason) as refusal:
        gguf_shape(tmp_path)
    assert refusal.value.code == ExitCode.BAD_INPUT


def test_tensors_that_do_not_belong_are_refused(tmp_path: Path) -> None:
    """A tensor that is missing, unknown, unread, not finite in fp16, or an embedding of another size: 78 by name."""
    model_folder(tmp_path, SHAPES["qwen2"])
    shape, vocabulary = written(tmp_path)
    whole = load_file(tmp_path / "model.safetensors")
    layer = "model.layers.1.self_attn"
    bad = [
        ({k: v for k, v in whole.items() if k != f"{layer}.k_proj.bias"}, "blk.1.attn_k.bias is missing"),
        ({**whole, f"{layer}.sinks": torch.zeros(4)}, "self_attn.sinks"),
        ({**whole, f"{layer}.o_proj.bias": torch.zeros(64)}, "blk.1.attn_output.bias is not read by llama.cpp"),
        ({**whole, f"{layer}.v_proj.weight": torch.full((32, 64), 1e5)}, "v_proj.weight has values that are no finite"),
        ({**whole, "model.embed_tokens.weight": torch.zeros(99, 64)}, "it embeds 99 tokens"),
    ]
    for tensors, reason in bad:
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(ExitWith, match=reason):
            write_gguf(tmp_path, tmp_path / "tiny.gguf", "F16", shape, vocabulary)
    save_file(whole, tmp_path / "model.safetensors")
    with pytest.raises(ExitWith, match="its vocabulary has 1 tokens"):
        write_gguf(tmp_path, tmp_path / "tiny.gguf", "F16", shape, replace(vocabulary, tokens=["a"]))
    write_gguf(tmp_path, tmp_path / "tiny.gguf", "F16", shape, vocabulary)
    found, _ = contents(tmp_path / "tiny.gguf")
    bare = {name.removeprefix("model."): tensor for name, tensor in whole.items()}
    save_file(bare, tmp_path / "model.safetensors")  # as some checkpoints name them
    write_gguf(tmp_path, tmp_path / "tiny.gguf", "F16", shape, vocabulary)
    again, _ = contents(tmp_path / "tiny.gguf")
    assert found.keys() == again.keys()


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor's values are held while the next is written."""
    import weakref

    import train.deliver.gguf_writer as writer

    model_folder(tmp_path, SHAPES["llama"])
    held: list[weakref.ref[torch.Tensor]] = []
    most, inner = 0, writer._values

    def watched(*arguments: Any) -> torch.Tensor:
        nonlocal most
        values = inner(*arguments)
        held.append(weakref.ref(values))
        most = max(most, sum(each() is not None for each in held))
        return values

    monkeypatch.setattr(writer, "_values", watched)
    write_gguf(tmp_path, tmp_path / "tiny.gguf", "F16", *written(tmp_path))
    assert len(held) == 21
    assert most <= 2  # the one that is being replaced, and the new one


def test_a_tokenizer_of_another_kind_is_refused(tmp_path: Path) -> None:
    """Unknown splitting, unigram, too many tokens for the embedding: 78 by name."""
    model_folder(tmp_path, SHAPES["llama"])
    told = json.loads((tmp_path / "tokenizer.json").read_text())
    others = [
        ({**told, "pre_tokenizer": {"type": "Whitespace"}}, "splits text by .*Whitespace"),
        ({**told, "normalizer": {"type": "Lowercase"}}, "normalises text by Lowercase"),
        ({**told, "model": {**told["model"], "dropout": 0.5}}, "its BPE has dropout 0.5"),
    ]
    for content, reason in others:
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(ExitWith, match=reason):
            written(tmp_path)
    (tmp_path / "tokenizer.json").write_text(json.dumps(told))
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "vocab_size": 2000}))
    with pytest.raises(ExitWith, match="a token 2047, and the model embeds 2000"):
        written(tmp_path)


def test_arguments_of_the_template_are_part_of_it(tmp_path: Path) -> None:
    """What the run gave its chat template stands in the file's, so that prompts are rendered as in training."""
    from data_tools.chat_template import ChatTemplate
    from tests.conftest import tokenizer_at
    from train.deliver.gguf_tokenizer import vocabulary

    tokenizer = tokenizer_at()
    tokenizer.chat_template = "\n{% if think %}yes{% endif %}{{ who }}{{ messages[0].content }}"
    template = ChatTemplate(tokenizer, {"think": True, "who": 'a "b"', "nothing": None})
    written_one = vocabulary(tokenizer, [1], NUM_ROWS, template, "tiny")
    turns = [{"role": "user", "content": "x"}]
    wanted = template.render(turns)
    tokenizer.chat_template = written_one.chat_template
    assert ChatTemplate(tokenizer).render(turns) == wanted == '\nyesa "b"x'


def test_a_package_that_is_not_installed_is_named() -> None:
    """78, the package, and how to install it."""
    with pytest.raises(ExitWith, match=r"(?s)package no_such_package .*/pip install -c constraints.txt -e '.\[gguf\]'"):
        package("no_such_package")

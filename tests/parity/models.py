"""Tiny models of every family with adapters, their micro-batches and their gradients."""

import copy
from typing import Any

import peft
import torch
import transformers as T
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from train.collate import MicroBatch, collate_packed
from train.engine.host_stream import HostBlocks
from train.engine.machine_memory import OwnMemory
from train.engine.plan import Plan

NOTHING = HostBlocks([], OwnMemory(pin=False))
LENGTHS = (5, 1, 9)  # one token alone, odd lengths
SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attn_implementation": "sdpa",
}
LLAMA4 = {
    "rope_type": "default",
    "rope_theta": 10000.0,
    "llama_4_scaling_beta": 0.3,
    "original_max_position_embeddings": 3,
}
HALF: Any = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
EXPERTS: Any = {"head_dim": 16, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FULL = ["full_attention"] * 3
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
LINEAR = ["linear_attention", "full_attention", "linear_attention"]
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ALL_OF_BOTH = [*ALL, "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"]
ALL_AND_PER_LAYER = [*ALL, "per_layer_input_gate", "per_layer_projection"]
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]  # where PEFT wants whole parameters named
GPT_OSS: Any = {
    "head_dim": 16,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "layer_types": MIXED,
    "sliding_window": 4,
    "initializer_range": 0.1,
    "attn_implementation": "eager",
}
# heads and tables of two sizes, one key head in full layers; the last block is always a full one
GEMMA4: Any = {
    "initializer_range": 0.3,
    "head_dim": 16,
    "global_head_dim": 32,
    "num_global_key_value_heads": 1,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "sliding_window": 4,
    "vocab_size_per_layer_input": 2048,  # enough for the bundled tokenizer
}
DELTA: dict[str, Any] = {
    "head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 32,
}
# a norm behind a tiny output amplifies its gradient: these have weights of a size as trained ones have
FAMILIES: dict[str, tuple[PretrainedConfig, list[str]]] = {
    "llama": (LlamaConfig(**SIZES), ALL),
    "llama with biases": (LlamaConfig(**SIZES, initializer_range=0.1, attention_bias=True, mlp_bias=True), ALL),
    "some layers adapted": (LlamaConfig(**SIZES), ["q_proj", "v_proj", "down_proj"]),
    "one layer adapted": (LlamaConfig(**SIZES), ["up_proj"]),
    "mistral with a window": (MistralConfig(**SIZES, sliding_window=4), ALL),
    "qwen2": (Qwen2Config(**SIZES), ALL),
    "qwen3": (Qwen3Config(**SIZES, head_dim=16), ALL),
    "qwen2 with a window": (Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=0), ALL),
    "qwen2 with windows in some layers": (
        Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=1),
        ALL,
    ),
    "ministral 3": (T.Ministral3Config(**SIZES, head_dim=16, sliding_window=6, rope_parameters=LLAMA4), ALL),
    "seed-oss": (T.SeedOssConfig(**SIZES, head_dim=16, residual_dropout=0.0, attention_dropout=0.0), ALL),
    "granite": (
        T.GraniteConfig(
            **SIZES,
            embedding_multiplier=3.0,
            residual_multiplier=0.4,
            attention_multiplier=0.3,
            logits_scaling=2.0,
        ),
        ALL,
    ),
    "smollm3": (
        T.SmolLM3Config(
            **SIZES,
            pad_token_id=0,
            no_rope_layers=[1, 0, 1],
            use_sliding_window=True,
            sliding_window=4,
            layer_types=MIXED,
        ),
        ALL,
    ),
    "phi3": (T.Phi3Config(**SIZES, pad_token_id=0, rope_parameters=HALF, sliding_window=4), FUSED),
    "glm4": (
        T.Glm4Config(**SIZES, head_dim=16, pad_token_id=0, rope_parameters=HALF, attention_bias=True),
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"],
    ),
    "gemma": (T.GemmaConfig(**SIZES, head_dim=16), ALL),
    "gemma3": (
        T.Gemma3TextConfig(
            **SIZES, initializer_range=0.1, head_dim=16, layer_types=MIXED, sliding_window=4, query_pre_attn_scalar=20
        ),
        ALL,
    ),
    "gemma4 with values of keys": (
        T.Gemma4TextConfig(**SIZES, **GEMMA4, hidden_size_per_layer_input=0, attention_k_eq_v=True),
        ALL,
    ),
    "gemma4": (
        T.Gemma4TextConfig(
            **SIZES | {"num_hidden_layers": 6},
            **GEMMA4 | {"layer_types": [*MIXED[:2], *MIXED[:2], *MIXED[:2]]},
            hidden_size_per_layer_input=32,
            num_kv_shared_layers=3,
            use_double_wide_mlp=True,
        ),
        ALL_AND_PER_LAYER,
    ),
    "qwen3-moe": (T.Qwen3MoeConfig(**SIZES, **EXPERTS, norm_topk_prob=True), ALL),
    "mixtral": (T.MixtralConfig(**SIZES, num_local_experts=4, sliding_window=4), [*ALL[:4], "w1", "w2", "w3"]),
    "experts without adapters": (T.Qwen3MoeConfig(**SIZES, **EXPERTS), ALL[:4]),
    "gpt-oss": (T.GptOssConfig(**SIZES | GPT_OSS), [*ALL[:4], *PARAMETERS]),
    "gpt-oss, experts without adapters": (T.GptOssConfig(**SIZES | GPT_OSS), ALL[:4]),
    "olmo2": (T.Olmo2Config(**SIZES, initializer_range=0.1), ALL),
    "olmo3": (T.Olmo3Config(**SIZES, initializer_range=0.1, layer_types=MIXED, sliding_window=4), ALL),
    "exaone4": (
        T.Exaone4Config(**SIZES, initializer_range=0.1, layer_types=MIXED, sliding_window=4, sliding_window_pattern=2),
        ALL,
    ),
    "exaone4 without windows": (
        T.Exaone4Config(**SIZES, initializer_range=0.1, sliding_window=None, layer_types=FULL),
        ALL,
    ),
    "cohere2": (T.Cohere2Config(**SIZES, layer_types=MIXED, sliding_window=4), ALL),
    "starcoder2": (
        T.Starcoder2Config(
            **SIZES,
            initializer_range=0.1,
            sliding_window=4,
            residual_dropout=0.0,
            embedding_dropout=0.0,
            attention_dropout=0.0,
        ),
        ["q_proj", "k_proj", "v_proj", "o_proj", "c_fc", "c_proj"],
    ),
    "qwen3.5 with as many keys as values": (
        T.Qwen3_5TextConfig(
            **SIZES, **DELTA | {"linear_num_key_heads": 4}, attention_bias=True, layer_types=[*LINEAR[1:], LINEAR[1]]
        ),
        ["in_proj_qkv", "in_proj_a", "out_proj", "q_proj", "o_proj", "down_proj"],
    ),
    "qwen3.5": (T.Qwen3_5TextConfig(**SIZES, **DELTA, initializer_range=0.1, layer_types=LINEAR), ALL_OF_BOTH),
}


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal up to the rounding of fp32 sums."""
    assert (found - wanted).norm() <= 2e-5 * wanted.norm()


def packed() -> MicroBatch:
    rows = [{"input_ids": torch.randint(100, (n,)).tolist(), "trained": [True] * n} for n in LENGTHS]
    return collate_packed(rows)


def adapted_model(shape: PretrainedConfig, targets: list[str], dropout: float = 0.0) -> Any:
    """A model of the shape with norms that matter and adapters that do something.

    Gemma 4 does not scale scores: its queries' norm does, without which a softmax of one token has chaotic gradients.
    """
    base = AutoModelForCausalLM.from_config(shape)
    for name, parameter in base.named_parameters():
        if parameter.dim() == 1 or name.endswith("proj_bias"):
            parameter.data.normal_(float("norm" in name), 0.2)
            if shape.model_type == "gemma4_text" and "q_norm" in name:
                parameter.data *= len(parameter) ** -0.5
    for name, buffer in base.named_buffers():
        if "layer_scalar" in name:
            buffer.uniform_(0.5, 1.5)
    lora = peft.LoraConfig(
        r=3,
        lora_alpha=7,
        lora_dropout=dropout,
        target_modules=[name for name in targets if name not in PARAMETERS],
        target_parameters=[name for name in targets if name in PARAMETERS] or None,
    )
    adapted: Any = peft.get_peft_model(base, lora)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    return adapted.train()


def alone(causal_lm: Any, batch: MicroBatch) -> torch.Tensor:
    """Hidden states [T, H] by transformers, which is given one sample at a time and knows of no other."""
    samples = batch.input_ids.split(batch.lengths, 1)
    return torch.cat([causal_lm.base_model(sample, use_cache=False).last_hidden_state[0] for sample in samples])


def gradients_of(adapted: Any) -> dict[str, torch.Tensor]:
    """Of the adapters, by name; they are zeros afterwards."""
    found = {name: p.grad.clone() for name, p in adapted.named_parameters() if p.requires_grad}
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.grad.zero_()
    return found


def plan(num_kept: int, num_cached: int, tile: int = 0) -> Plan:
    return Plan(True, True, 64, num_blocks=3, num_kept=num_kept, num_cached=num_cached, mlp_tile=tile)


def bf16_twin(exact: Any) -> Any:
    """A copy with the base in bf16, whose values the fp32 model is given, too; both have gradients of zero."""
    for parameter in exact.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.bfloat16().float()
    half = copy.deepcopy(exact)
    for one, other in zip(half.parameters(), exact.parameters(), strict=True):
        if one.requires_grad:
            one.grad, other.grad = torch.zeros_like(one), torch.zeros_like(other)
        else:
            one.data = one.data.bfloat16()
    return half

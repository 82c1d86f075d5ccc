"""How the base's weights are held while training: which share is quantised, and what is not."""

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import bitsandbytes as bnb
import torch
from transformers import PreTrainedModel

from train.config import ModelConfig
from train.models.targets import decoder_name
from train.run.exits import ExitCode, ExitWith

MAX_EXPERT_SHARE = 0.05  # of the weights: what may stay unquantised in three-dimensional parameters
BYTES = {"NF4": 0.516, "FP4": 0.516, "MXFP4": 0.531, "LLM.int8": 1.0}  # a weight, with its share of the scales
EXPERTS = "experts"


@dataclass(frozen=True)
class HeldWeights:
    """Numbers of weights by what holds them."""

    quantized: dict[str, int]  # by type, such as NF4
    others: dict[str, int]  # not quantised, by what they are
    type_of_others: str  # bf16
    element_bytes: int  # of one of the others

    @property
    def total(self) -> int:
        """All weights of the base."""
        return sum(self.quantized.values()) + sum(self.others.values())

    @property
    def num_bytes(self) -> float:
        """What they take."""
        packed = sum(BYTES[kind] * count for kind, count in self.quantized.items())
        return packed + self.element_bytes * sum(self.others.values())

    def __str__(self) -> str:
        parts = [f"{count / self.total:.1%} in {kind}" for kind, count in self.quantized.items()]
        others = ", ".join(f"{what} {count / self.total:.1%}" for what, count in self.others.items())
        return f"{self.total:,} weights: {', '.join([*parts, f'not quantised ({self.type_of_others}): {others}'])}"

    def as_json(self) -> dict[str, Any]:
        """For the run's records."""
        return {**asdict(self), "total": self.total}


def held_weights(base: PreTrainedModel) -> HeldWeights:
    """Counts the weights of a base that has no adapters yet; it may be on the meta device."""
    quantized: Counter[str] = Counter()
    others: Counter[str] = Counter()
    start, seen = decoder_name(base), set()
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    table: Any = embedding.weight  # in host memory it is no parameter
    others["embedding"] += table.numel()
    for name, module in base.named_modules():
        for parameter in module.parameters(recurse=False):
            if id(parameter) in seen or module is embedding or parameter is table:
                continue
            seen.add(id(parameter))
            layer: Any = module
            if isinstance(parameter, bnb.nn.Params4bit):
                shape: Any = parameter.shape  # of experts, which need not be packed yet
                if isinstance(module, bnb.nn.Linear4bit):
                    shape = layer.out_features, layer.in_features
                elif parameter.quant_state is not None:
                    shape = parameter.quant_state.shape
                quantized[parameter.quant_type.upper()] += math.prod(shape)
            elif isinstance(parameter, bnb.nn.Int8Params):
                quantized["LLM.int8"] += layer.in_features * layer.out_features
            else:
                inside = not start or name.startswith(start) or module is head
                others[_kind(parameter, layer, head) if inside else "outside the decoder"] += parameter.numel()
    dtype = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}.get(table.dtype, str(table.dtype))
    return HeldWeights(dict(quantized), dict(others.most_common()), dtype, table.element_size())


def check_experts(config: ModelConfig, held: HeldWeights) -> None:
    """Raises ExitWith(BAD_INPUT) where quantisation is asked for and most of the weights would stay as they are."""
    num_experts = held.others.get(EXPERTS, 0)
    if config.quantization == "none" or num_experts <= MAX_EXPERT_SHARE * held.total:
        return
    kind = {"nf4": "NF4", "int8": "LLM.int8"}[config.quantization]
    whole = BYTES[kind] * held.total / 2**30
    packs = "--model.quantization nf4 packs those of Qwen3-MoE, Mixtral and gpt-oss. " if kind == "LLM.int8" else ""
    raise ExitWith(
        ExitCode.BAD_INPUT,
        f"--model.quantization {config.quantization}: {num_experts / held.total:.1%} of {config.name_or_path} are "
        f"experts in three-dimensional parameters, which are not packed in this kind of base: it would take "
        f"{held.num_bytes / 2**30:,.1f} GiB, not {whole:,.1f}. {packs}Where there is so much memory, write "
        "--model.quantization none",
    )


def _kind(parameter: torch.Tensor, module: torch.nn.Module, head: torch.nn.Module | None) -> str:
    if module is head:
        return "head"
    if parameter.dim() >= 3 and not isinstance(module, torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d):
        return EXPERTS
    if parameter.dim() == 1:
        return "norms and biases"
    return "linear layers" if isinstance(module, torch.nn.Linear) else "other layers"

"""The embedding and the head of a base, where they are trained: rows for new tokens, or the whole of them."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from train.config import LoraConfig
from train.models.shape import text_shape
from train.run.exits import ExitCode, ExitWith

OPTION = "--lora.modules_to_save"


def trains_embedding(lora: LoraConfig) -> bool:
    """Whether the embedding, or rows of it, are trained."""
    return bool(lora.trainable_tokens) or any(word != "lm_head" for word in lora.modules_to_save)


def name_of(base: PreTrainedModel, wanted: object) -> str:
    """The module's name in the base."""
    return next(name for name, module in base.named_modules() if module is wanted)


def whole_layers(base: PreTrainedModel, words: Sequence[str]) -> list[str]:
    """The names of the layers that the words of lora.modules_to_save stand for.

    Raises ExitWith(BAD_INPUT) for any but the head and the embedding, and where the two are one matrix: PEFT would
    train a copy for one of them alone, and whoever merges the adapter would lose it.
    """
    embedding: Any = base.get_input_embeddings()
    head: Any = base.get_output_embeddings()
    names = {name.rpartition(".")[2]: name for name in (name_of(base, head), name_of(base, embedding))}
    unknown = [word for word in words if word not in names]
    if unknown:
        others = "linear layers get adapters (--lora.target_modules), norms and biases stay frozen"
        raise _refusal(unknown, f"only {' and '.join(names)} can be trained whole; {others}")
    if words and head.weight is embedding.weight:
        reason = "head and embedding of this base are one matrix, and PEFT would train a copy for one of them"
        raise _refusal(words, f"{reason}; --lora.trainable_tokens trains rows of it for both")
    if any(names[word] == name_of(base, head) for word in words) and getattr(head, "bias", None) is not None:
        raise _refusal(words, "the head of this base has a bias, which would be trained with it and is not")
    return [names[word] for word in dict.fromkeys(words)]


def extend_vocabulary(base: PreTrainedModel, size: int) -> None:
    """Gives embedding and head rows up to `size` where they have fewer, all of them the mean of those that there are.

    What is trained replaces them. Many bases have more rows than tokens, and are left as they are.
    """
    embedding: Any = base.get_input_embeddings()
    old = embedding.weight.shape[0]
    if size <= old:
        return
    base.resize_token_embeddings(size, mean_resizing=False)
    text_shape(base.config).vocab_size = size
    both: Any = (base.get_input_embeddings(), base.get_output_embeddings())
    for layer in both:
        weight = layer.weight
        weight.requires_grad_(False)
        if not weight.is_meta:
            weight[old:] = mean_row(weight, old)


@torch.no_grad()
def mean_row(weight: torch.Tensor, count: int) -> torch.Tensor:
    """The mean of the first `count` rows, [H] in the weight's type; summed in fp32."""
    return (weight[:count].sum(0, dtype=torch.float32) / count).to(weight.dtype)


def _refusal(words: Sequence[str], reason: str) -> ExitWith:
    return ExitWith(ExitCode.BAD_INPUT, f"{OPTION} {' '.join(words)}: {reason}")

"""What `handloop plan` says of a run on the reference engine, whose memory and speed nobody predicts."""

from dataclasses import replace
from typing import Any

import torch

from train.memory.gpus import Gpu
from train.memory.outlook import Outlook
from train.memory.reference import (
    MOST_TOKENS,
    Passes,
    configured_plan,
    engine_lines,
    passes_told,
    rows_told,
    why_padded,
)
from train.models.liger import in_place, not_tried
from train.models.shape import auto_class, plain_attention, text_shape
from train.models.text_part import loaded_shape
from train.run.devices import FLASH, compute_type_at


def not_predicted(outlook: Outlook, gpu: Gpu) -> str:
    """That nothing is predicted, and the banner's lines as far as they are known before the base is tried."""
    lines = engine_lines(outlook.reason, choices_ahead(outlook, gpu))
    return "\n".join(
        [
            "only the fused engine's memory is predicted; --probe measures this run on the GPU that is here",
            *lines,
            "the start of a run tries packed rows and kernels on the base, and takes back what does not agree",
        ]
    )


def choices_ahead(outlook: Outlook, gpu: Gpu) -> list[str]:
    """What a run on this GPU begins with on the reference engine, in the words of its banner."""
    config, shape = outlook.config, loaded_shape(outlook.config.model)
    kind: Any = text_shape(shape).model_type
    own = plain_attention(auto_class(config.model, shape), shape)
    padded = why_padded(config, is_cpu=False, saved=None)
    has_flash = gpu.capability >= FLASH and compute_type_at(config.model.dtype, gpu.capability).dtype != torch.float32
    attention = "varlen" if own == "sdpa" and has_flash and not padded else own
    start = configured_plan(outlook.num_blocks, config.memory)
    start = replace(start, layout="padded" if padded else "unpadded")
    passes = Passes(start, outlook.rows, config.batch, config.memory, saved=None)
    largest = passes.sizes(MOST_TOKENS.get(attention, MOST_TOKENS["sdpa"]))[0]
    activations = [word for word, may in (("kept", passes.may_keep), ("recomputed", passes.may_recompute)) if may]
    return [
        rows_told(padded, attention),
        not_tried(kind, config.engine.liger) or in_place(kind),
        passes_told(" or ".join(activations), largest.micro_batch_tokens),
    ]

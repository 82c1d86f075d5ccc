"""A tiny Qwen3.5, and its passes on the engine and by transformers."""

from dataclasses import replace
from typing import Any

import torch
import transformers as T

from tests.parity.models import ALL_OF_BOTH, DELTA, LINEAR, NOTHING, SIZES, adapted_model, alone, close, gradients_of
from tests.parity.models import plan as plan_of_three
from train.collate import MicroBatch, collate_packed
from train.engine.decoder import FusedDecoder
from train.engine.host_stream import HostBlocks

SHAPE = T.Qwen3_5TextConfig(**SIZES, **DELTA, initializer_range=0.1, layer_types=LINEAR)
# of one chunk, of two, of three; two that have as many chunks and other lengths; one token
LENGTHS = (70, 3, 130, 66, 1, 64, 128)


def packed(lengths: tuple[int, ...] = LENGTHS) -> MicroBatch:
    rows = [{"input_ids": torch.randint(100, (n,)).tolist(), "trained": [True] * n} for n in lengths]
    return collate_packed(rows)


def passed(adapted: Any, batch: MicroBatch, host: HostBlocks = NOTHING, **changes: Any) -> tuple[torch.Tensor, Any]:
    """Hidden states and gradients of a pass on the engine."""
    plan = replace(plan_of_three(1, 0), **changes)
    torch.manual_seed(3)
    hidden = FusedDecoder(adapted.get_base_model(), plan, host)(batch)
    hidden.backward(torch.linspace(-1, 1, hidden.numel()).view(hidden.shape).to(hidden.dtype))
    return hidden.detach(), gradients_of(adapted)


def same(found: tuple[torch.Tensor, Any], wanted: tuple[torch.Tensor, Any]) -> None:
    close(found[0], wanted[0])
    assert found[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        assert gradient.norm() > 0
        close(found[1][name], gradient)


def by_transformers(adapted: Any, batch: MicroBatch) -> tuple[torch.Tensor, Any]:
    hidden = alone(adapted.get_base_model(), batch)
    hidden.backward(torch.linspace(-1, 1, hidden.numel()).view(hidden.shape).to(hidden.dtype))
    return hidden.detach(), gradients_of(adapted)


def small_hybrid() -> Any:
    """A tiny model with adapters on all layers."""
    torch.manual_seed(0)
    model = adapted_model(SHAPE, ALL_OF_BOTH)
    # with the initial gates a state is forgotten within a token or two, and a leak would not be seen
    for layer in model.get_base_model().base_model.layers:
        if hasattr(layer, "linear_attn"):
            layer.linear_attn.A_log.data.fill_(-3.0)
    return model

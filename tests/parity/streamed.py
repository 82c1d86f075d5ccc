"""A model of five blocks, some of them in host memory, and what it computes."""

from dataclasses import replace
from typing import Any

import torch
from transformers import LlamaConfig

from tests.parity.models import ALL, SIZES, adapted_model, gradients_of
from train.collate import MicroBatch
from train.engine.decoder import FusedDecoder
from train.engine.families import decoder_layers
from train.engine.host_stream import HostBlocks
from train.engine.machine_memory import OwnMemory
from train.engine.plan import Plan

NUM_BLOCKS = 5


def streaming(numbers: list[int], **changes: Any) -> tuple[Any, Plan, HostBlocks]:
    """A model of five blocks with these in host memory, its plan, and the host's blocks."""
    adapted = adapted_model(LlamaConfig(**SIZES | {"num_hidden_layers": NUM_BLOCKS}), ALL, dropout=0.2)
    host = HostBlocks(numbers, OwnMemory(pin=False))
    for number in range(NUM_BLOCKS):
        host.offload(number, decoder_layers(adapted.get_base_model()))
    plan = Plan(
        is_fused=True, merges=True, micro_batch_tokens=64, num_blocks=NUM_BLOCKS, num_kept=1, streamed=(*numbers,)
    )
    return adapted, replace(plan, **changes), host


def result(adapted: Any, plan: Plan, host: HostBlocks, batch: MicroBatch, passes: int = 3) -> torch.Tensor:
    """Outputs and gradients of some passes, with a validation in between, in one row."""
    engine = FusedDecoder(adapted.get_base_model(), plan, host)
    found = []
    for number in range(passes):
        torch.manual_seed(number)
        out = engine(batch)
        out.backward(torch.ones_like(out))
        found.append(out.detach().flatten())
        with torch.no_grad():
            found.append(engine(batch).flatten())
    return torch.cat([*found, *(gradient.flatten() for gradient in gradients_of(adapted).values())])

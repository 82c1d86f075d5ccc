"""Passes that are replayed give a trained embedding its gradient; on a CPU a replay runs what would be captured."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from tests.parity.models import ALL, NOTHING, SIZES, close, gradients_of, plan
from train.collate import MicroBatch, collate_packed
from train.engine.attention import PackedAttention
from train.engine.decoder import FusedDecoder
from train.engine.graphs import Graphs

TOKENS = [3, 50, 99]


class Recorded:
    """In the place of torch's CUDAGraph."""

    work: Callable[[], None]

    def replay(self) -> None:
        self.work()


@pytest.fixture(autouse=True)
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def record(self: Graphs, graph: Any, work: Callable[[], None]) -> None:
        def again() -> None:
            self.stack.store.invalidate_adapters()  # a captured pass fills the adapters in each time
            work()

        graph.work = again

    monkeypatch.setattr(Graphs, "_record", record)
    monkeypatch.setattr(Graphs, "_room", lambda self: 2**40)
    for name in ("synchronize", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recorded)
    # a kernel reads the boundaries where they are, so that a replay finds those of its micro-batch
    monkeypatch.setattr(PackedAttention, "_lengths", property(lambda self: self.cu_seqlens.diff().tolist()))


def model_of(**trained: Any) -> Any:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    adapted: Any = peft.get_peft_model(base, peft.LoraConfig(r=3, target_modules=ALL, **trained))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "delta" in name:
            parameter.data.normal_(0, 0.1)
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    return adapted.train()


def packed(*lengths: int) -> MicroBatch:
    ids = [[TOKENS[0], *torch.randint(100, (length - 1,)).tolist()] for length in lengths]
    return collate_packed([{"input_ids": each, "trained": [True] * len(each)} for each in ids])


@pytest.mark.parametrize("num_cached", [0, 2])
@pytest.mark.parametrize(
    "trained",
    [{}, {"trainable_token_indices": TOKENS}, {"modules_to_save": ["embed_tokens"]}],
    ids=["no", "rows", "all"],
)
def test_replays_give_what_eager_passes_give(trained: dict[str, Any], num_cached: int) -> None:
    """Micro-batches of several shapes: hidden states and gradients of adapters and embedding, in each of them."""
    adapted = model_of(**trained)
    causal_lm = adapted.get_base_model()
    eager = FusedDecoder(causal_lm, plan(2, num_cached), NOTHING)
    replayed = FusedDecoder(causal_lm, replace(plan(2, num_cached), micro_batch_tokens=300, uses_graphs=True), NOTHING)
    assert replayed.graphs is not None
    for lengths in ((40, 30), (40, 30), (290,), (5, 1, 9), (200, 50), (61,)):
        batch = packed(*lengths)
        upstream, found = torch.randn(sum(lengths), SIZES["hidden_size"]), []
        for engine in (eager, replayed):
            hidden = engine(batch)[: sum(lengths)]
            hidden.backward(upstream)
            found.append((hidden.detach(), gradients_of(adapted)))
        close(found[1][0], found[0][0])
        for name, gradient in found[0][1].items():
            assert gradient.norm() > 0, name
            close(found[1][1][name], gradient)
    assert sorted(shape[0] for shape in replayed.graphs.graphs) == [128, 256, 384]
    vocabulary = [name for name in found[0][1] if "lora_" not in name]
    assert len(vocabulary) == len(trained)

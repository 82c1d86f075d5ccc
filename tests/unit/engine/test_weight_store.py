"""Where the blocks' dequantised weights lie; what they are is tests/parity's."""

from typing import Any

import torch

from tests.parity.models import FAMILIES, NOTHING, adapted_model, packed, plan
from train.engine.block import Block
from train.engine.decoder import FusedDecoder


def test_cached_blocks_have_their_memory_before_a_pass_takes_any(monkeypatch: Any) -> None:
    """And keep it in the next passes; made again after a release."""
    engine = FusedDecoder(adapted_model(*FAMILIES["llama"]).get_base_model(), plan(3, 2), NOTHING)
    store, forward = engine.stack.store, Block.forward
    seen: list[dict[int, list[int]]] = []

    def watched(self: Block, *arguments: Any) -> Any:
        seen.append({number: [id(matrix) for matrix in made] for number, made in store.places.items()})
        return forward(self, *arguments)

    monkeypatch.setattr(Block, "forward", watched)
    for _ in range(2):
        engine(packed()).sum().backward()
    assert set(seen[0]) == {0, 1}
    assert all(places == seen[0] for places in seen)
    engine.release()
    assert not store.places
    assert torch.isfinite(engine(packed())).all()
    assert set(seen[-1]) == {0, 1}

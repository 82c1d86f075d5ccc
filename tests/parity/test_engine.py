"""The fused engine computes what transformers and PEFT compute: each family of models, kept or recomputed."""

import weakref
from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.parity.models import ALL, FAMILIES, NOTHING, SIZES, adapted_model, alone, close, gradients_of, packed, plan
from train.collate import MicroBatch
from train.engine import families, operations
from train.engine.block import Block
from train.engine.context import ForwardContext
from train.engine.decoder import FusedDecoder
from train.engine.mlp import Mlp
from train.engine.positions import Positions
from train.engine.self_attention import SelfAttention
from train.engine.support import unsupported_reason


def reference(causal_lm: Any, batch: MicroBatch) -> torch.Tensor:
    """Hidden states by transformers, which isolates the samples by a block mask."""
    outputs = causal_lm.base_model(batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    return outputs.last_hidden_state[0]


def test_every_family_has_a_parity_test() -> None:
    """The rows of the engine's table are the architectures compared here."""
    compared = {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[shape.model_type] for shape, _ in FAMILIES.values()}
    assert set(families.FAMILIES) == compared


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("num_kept", "num_cached", "tile"), [(1, 0, 0), (2, 1, 0), (3, 3, 0), (2, 0, 4)])
def test_every_family_of_models(family: str, num_kept: int, num_cached: int, tile: int) -> None:
    """Hidden states and every adapter's gradient are transformers' and PEFT's of samples alone, kept or recomputed,
    cached or not.

    Also where the 15 tokens go through each MLP in four tiles.
    """
    adapted = adapted_model(*FAMILIES[family])
    causal_lm, batch = adapted.get_base_model(), packed()
    assert not unsupported_reason(causal_lm)
    # transformers' own rounding in fp32 is up to 4e-5 of Gemma 3's gradients; its experts have no products in fp64
    exact = deepcopy(adapted) if families.FAMILIES[type(causal_lm).__name__].router else deepcopy(adapted).double()
    wanted = alone(exact.get_base_model(), batch)
    upstream = torch.randn_like(wanted).float()
    wanted.backward(upstream.to(wanted.dtype))
    expected = gradients_of(exact)
    engine = FusedDecoder(causal_lm, plan(num_kept, num_cached, tile), NOTHING)
    for _ in range(2):  # the second pass adds to the first
        found = engine(batch)
        close(found.detach(), wanted.detach())
        found.backward(upstream)
    for name, gradient in gradients_of(adapted).items():
        assert "layers.0" in name or expected[name].norm() > 0
        close(gradient / 2, expected[name])


def test_kept_and_recomputed_blocks_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """All, two and one of three blocks kept, with dropout: equal gradients; another pass's seed gives others.

    Of three blocks none, one and two are computed twice. Tiles of an MLP draw the masks of the whole.
    """
    computed: list[int] = []
    forward = Block.forward

    def counted(self: Block, *arguments: Any) -> Any:
        computed[-1] += 1
        return forward(self, *arguments)

    tiles: set[int] = set()
    gate_up = Mlp._gate_up

    def measured(self: Mlp, *arguments: Any) -> torch.Tensor:
        found = gate_up(self, *arguments)
        tiles.add(len(found))
        return found

    monkeypatch.setattr(Block, "forward", counted)
    monkeypatch.setattr(Mlp, "_gate_up", measured)
    adapted, batch = adapted_model(LlamaConfig(**SIZES), ALL, dropout=0.3), packed()
    upstream = torch.randn(15, 64)
    found = []
    for num_kept, seed in ((3, 5), (2, 5), (1, 5), (1, 6)):
        torch.manual_seed(seed)
        computed.append(0)
        FusedDecoder(adapted.get_base_model(), plan(num_kept, 0), NOTHING)(batch).backward(upstream)
        found.append(torch.cat([gradient.flatten() for gradient in gradients_of(adapted).values()]))
    assert computed == [3, 4, 5, 5]
    assert found[0].norm() > 0
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert (found[0] - found[3]).norm() > 0.1 * found[0].norm()
    assert tiles == {15}
    tiles.clear()
    for num_kept in (3, 1):
        torch.manual_seed(5)
        FusedDecoder(adapted.get_base_model(), plan(num_kept, 0, tile=4), NOTHING)(batch).backward(upstream)
        close(torch.cat([gradient.flatten() for gradient in gradients_of(adapted).values()]), found[0])
    assert tiles == {4, 3}


def test_what_an_mlp_has_kept_is_gone_before_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan counts with that room; and of tiles never two stand at once."""
    block, mlp, softmax, gate_up = Block.backward, Mlp.backward, SelfAttention._backward_softmax, Mlp._gate_up
    kept_by_mlp: list[weakref.ref] = []
    tiles: list[weakref.ref] | None = None
    checked = []

    def backward(self: Block, matrices: Any, kept: Any, *rest: Any) -> Any:
        whole = [] if kept.mlp.gate_up is None else [kept.mlp.gate_up]
        kept_by_mlp.extend(map(weakref.ref, [kept.post_attention, kept.mlp.read, *whole]))
        del whole
        return block(self, matrices, kept, *rest)

    def backward_mlp(self: Mlp, *arguments: Any) -> Any:
        nonlocal tiles
        tiles = []
        found = mlp(self, *arguments)
        checked.append(len(tiles))
        tiles = None
        return found

    def one_tile(self: Mlp, matrices: Any, kept: Any, *rest: Any) -> torch.Tensor:
        if tiles is None or kept.gate_up is not None:
            return gate_up(self, matrices, kept, *rest)
        assert all(each() is None for each in tiles)
        found = gate_up(self, matrices, kept, *rest)
        tiles.append(weakref.ref(found))
        return found

    def backward_softmax(self: SelfAttention, *arguments: Any) -> None:
        assert len(kept_by_mlp) >= 2
        assert all(each() is None for each in kept_by_mlp)
        kept_by_mlp.clear()
        softmax(self, *arguments)

    monkeypatch.setattr(Block, "backward", backward)
    monkeypatch.setattr(Mlp, "backward", backward_mlp)
    monkeypatch.setattr(SelfAttention, "_backward_softmax", backward_softmax)
    monkeypatch.setattr(Mlp, "_gate_up", one_tile)
    adapted, batch, upstream = adapted_model(LlamaConfig(**SIZES), ALL), packed(), torch.randn(15, 64)
    for tile in (0, 4):
        FusedDecoder(adapted.get_base_model(), plan(2, 0, tile), NOTHING)(batch).backward(upstream)
    assert checked == [0, 0, 0, 4, 4, 4]


def test_dropout_differs_by_adapter_and_is_off_in_evaluation() -> None:
    """No two adapters of a model draw the same mask in a pass; a model in evaluation mode draws none."""
    seed = torch.tensor(operations.mixed(3))
    context = ForwardContext(Positions(torch.empty(0), {}, False), {}, 0.5, seed)
    masks = []
    for block in range(3):
        for group in range(6):
            drop = context.drop(block, group)
            assert drop is not None
            for number in range(4):
                mask = torch.empty(8, 8)
                operations.dropout(torch.ones(8, 8), mask, drop, number)
                masks.append(tuple(mask.flatten().tolist()))
    assert len(set(masks)) == 72
    adapted, batch = adapted_model(LlamaConfig(**SIZES), ALL, dropout=0.5), packed()
    engine = FusedDecoder(adapted.get_base_model(), plan(3, 0), NOTHING)
    with torch.no_grad():
        training = engine(batch)
        adapted.eval()
        causal_lm = adapted.get_base_model()
        wanted = reference(causal_lm, batch)
        close(engine(batch), wanted)
        assert (training - wanted).norm() > 0.01 * wanted.norm()


def test_what_a_configuration_only_seems_to_say() -> None:
    """A Llama with sliding_window in its config.json has no window, and with num_kv_shared_layers shares no keys."""
    shape = LlamaConfig(**SIZES | {"sliding_window": 4, "num_kv_shared_layers": 1})
    adapted, batch = adapted_model(shape, ALL), packed()
    causal_lm = adapted.get_base_model()
    close(FusedDecoder(causal_lm, plan(1, 0), NOTHING)(batch).detach(), reference(causal_lm, batch).detach())

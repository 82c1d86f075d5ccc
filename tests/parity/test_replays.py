"""Captured passes find their weights in place, whatever happens between their replays."""

from functools import partial
from typing import Any

import pytest
import torch

from tests.parity.models import packed
from tests.parity.streamed import NUM_BLOCKS, streaming
from train.engine.decoder import FusedDecoder
from train.engine.families import decoder_layers
from train.engine.lora_linear import Pass
from train.engine.packed_source import packed_source
from train.engine.plan import NUM_SLOTS
from train.engine.weight_store import WeightStore


class Tape:
    """Copies that can be captured, as in a CUDA graph: what is captured does not happen until it is replayed."""

    def __init__(self) -> None:
        self.capturing: list[Any] | None = None
        self.num_copies = 0  # asked for, captured or not
        self.pending: dict[int, int] = {}  # target's address -> the copy into it that was not waited for

    def do(self, action: Any) -> None:
        if self.capturing is None:
            action()
        else:
            self.capturing.append(action)

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Any) -> Any:
        self.num_copies += 1
        self.do(lambda: target.copy_(source))
        if self.capturing is None:
            self.pending[target.data_ptr()] = self.num_copies
        return self.num_copies

    def wait(self, event: Any) -> None:
        self.pending = {target: copy for target, copy in self.pending.items() if copy != event}

    def mark(self) -> Any:
        return "now"


class Captured:
    """A store whose passes are captured once, and what else may happen between replays."""

    def __init__(self, numbers: list[int]) -> None:
        self.tape = Tape()
        adapted, plan, self.host = streaming(numbers)
        self.causal_lm: Any = adapted.get_base_model()
        blocks = FusedDecoder(self.causal_lm, plan, self.host).stack.blocks
        layers, like = decoder_layers(self.causal_lm), self.causal_lm.base_model.norm.weight
        self.source = packed_source(layers, [self.host], like.device, lambda: self.tape)
        self.store = WeightStore(blocks, 0, like, self.source)
        self.store._fill_base = self.fill  # type: ignore[method-assign]
        self.layers = layers
        self.made: list[int] = []
        self.tapes: list[list[Any]] = [[], []]
        self.orders = (range(NUM_BLOCKS), range(NUM_BLOCKS - 1, -1, -1))
        self.store.before_replay(self.orders[0])
        for captured, ask in zip(self.tapes, (self.validate, self.back), strict=True):
            self.tape.capturing = captured
            ask()
        self.tape.capturing = None
        self.store.forget_shared()

    def fill(self, block: Any, matrices: Any) -> None:
        """Stands for WeightStore._fill_base: when it happens, the block's weights must be its own."""
        number = block.number
        weights = self.source.take(number)
        wanted = self.host.weights.get(number) or [linear.weight for linear in self.layers[number].linears]

        def check() -> None:
            self.made.append(number)
            for weight, own in zip(weights, wanted, strict=True):
                assert torch.equal(weight, own)

        self.tape.do(check)
        self.source.give(number)

    def ask(self, order: range) -> None:
        self.store.begin(order)
        for number in order:
            self.store.matrices(number, Pass.FORWARD)
            self.tape.do(partial(self.is_in_place, number))

    def is_in_place(self, number: int) -> None:
        assert self.made[-1] == number, "the shared place holds another block"

    def validate(self) -> None:
        self.ask(range(NUM_BLOCKS))

    def back(self) -> None:
        self.ask(range(NUM_BLOCKS - 1, -1, -1))

    def train_eagerly(self) -> None:
        self.validate()
        self.back()

    def replay(self, num_passes: int = 2) -> None:
        for captured, order in list(zip(self.tapes, self.orders, strict=True))[:num_passes]:
            self.store.before_replay(order)
            assert not self.tape.pending, "a graph cannot wait for a copy that began before it"
            for action in captured:
                action()
            self.store.after_replay(order)

    def replay_without_backward(self) -> None:
        """As where the loss runs out of memory."""
        self.replay(1)

    def answer(self) -> None:
        decoder, batch, before = self.causal_lm.base_model, packed(), self.tape.num_copies
        with self.source.lent(), torch.no_grad():
            decoder(batch.input_ids, position_ids=batch.position_ids, use_cache=False)
        # all streamed blocks came, but for those that may have been in the slots already
        assert self.tape.num_copies - before >= len(self.host.numbers) - NUM_SLOTS


@pytest.mark.parametrize("numbers", [[0, 1, 2, 3, 4], [1, 3, 4], [0, 2], [4]])
def test_a_replay_finds_what_its_capture_found(numbers: list[int]) -> None:
    """Replays, validations, eager passes and answers in any order: every block is made of its own weights."""
    run = Captured(numbers)
    deeds = [run.replay, run.replay, run.validate, run.train_eagerly, run.answer, run.store.release]
    deeds.append(run.replay_without_backward)
    random = [deeds[number] for number in torch.randint(len(deeds), (60,)).tolist()]
    for deed in (run.train_eagerly, run.replay_without_backward, run.validate, *random):
        deed()
    assert len(run.made) > 100
    run.replay()
    before = run.tape.num_copies
    run.replay()
    assert run.tape.num_copies == before  # what one replay leaves is what the next one wants

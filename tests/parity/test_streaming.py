"""Blocks that come from host memory give the same bits, also after a failed pass and over a slow bus."""

import time
from itertools import pairwise
from typing import Any

import pytest
import torch

from tests.parity.models import gradients_of, packed
from tests.parity.streamed import result, streaming
from train.engine import decoder
from train.engine.block import Block
from train.engine.copies import ThreadCopies
from train.engine.decoder import FusedDecoder
from train.engine.plan import spread


@pytest.mark.parametrize("num_kept", [1, 3, 5])
@pytest.mark.parametrize("numbers", [[0, 1, 2, 3, 4], [1, 3, 4], [0], [2, 4]])
@pytest.mark.parametrize("offloads_inputs", [False, True])
def test_streamed_blocks_give_the_same_bits(num_kept: int, numbers: list[int], offloads_inputs: bool) -> None:
    """All, some or one block streamed, inputs on the host or not, with dropout: outputs and gradients to the bit."""
    batch = packed()
    torch.manual_seed(0)
    wanted = result(*streaming([], num_kept=num_kept), batch)
    torch.manual_seed(0)
    found = result(*streaming(numbers, num_kept=num_kept, offloads_inputs=offloads_inputs), batch)
    assert wanted.norm() > 0
    assert torch.equal(found, wanted)


class Slow(ThreadCopies):
    """A thread that takes its time."""

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Any) -> Any:
        def late() -> None:
            time.sleep(0.01)
            target.copy_(source)

        return self.thread.submit(late)


@pytest.mark.parametrize("offloads_inputs", [False, True])
@pytest.mark.parametrize("at_call", [1, 2, 4])
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_a_pass_that_raised_is_followed_by_a_right_one(
    name: str, at_call: int, offloads_inputs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies that a failed pass had begun and not waited for are waited for by the next."""
    batch = packed()
    torch.manual_seed(0)
    wanted = result(*streaming([]), batch, passes=1)
    monkeypatch.setattr(decoder, "copies_for", lambda _: Slow())
    torch.manual_seed(0)
    adapted, plan, host = streaming([0, 1, 2, 3, 4], offloads_inputs=offloads_inputs)
    real, failures = getattr(Block, name), iter([False] * (at_call - 1) + [True])

    def failing(*arguments: Any) -> Any:
        if next(failures, False):
            raise torch.OutOfMemoryError("no more")
        return real(*arguments)

    monkeypatch.setattr(Block, name, failing)
    engine = FusedDecoder(adapted.get_base_model(), plan, host)
    with pytest.raises(torch.OutOfMemoryError):
        engine(batch).sum().backward()
    gradients_of(adapted)
    torch.manual_seed(0)  # as `result` has it
    out = engine(batch)
    out.backward(torch.ones_like(out))
    with torch.no_grad():
        found = [out.detach().flatten(), engine(batch).flatten()]
    found += [gradient.flatten() for gradient in gradients_of(adapted).values()]
    assert torch.equal(torch.cat(found), wanted)


def test_a_slow_bus_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies by a thread that takes its time: the same bits."""
    batch = packed()
    torch.manual_seed(0)
    wanted = result(*streaming([]), batch, passes=1)
    monkeypatch.setattr(decoder, "copies_for", lambda _: Slow())
    torch.manual_seed(0)
    assert torch.equal(result(*streaming([0, 1, 2, 3, 4], offloads_inputs=True), batch, passes=1), wanted)


def test_streamed_blocks_are_spread() -> None:
    """As many as asked for, the last one among them, those of fewer among those of more, and about evenly."""
    for total in (1, 5, 22, 32):
        before: set[int] = set()
        for count in range(total + 1):
            numbers = spread(count, total)
            assert len(numbers) == count
            assert not count or numbers[-1] == total - 1
            assert before <= set(numbers)
            before = set(numbers)
            gaps = [b - a for a, b in pairwise([-1, *numbers])]
            assert not gaps or max(gaps) <= 2 * (total + 1) / (count + 0.5) + 1

"""A proof by vector clocks: each copy comes in its turn, and no slot is written while it is read."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from tests.parity.models import packed
from tests.parity.streamed import result, streaming
from train.engine import decoder
from train.engine.block import Block
from train.engine.copies import Copies
from train.engine.decoder import FusedDecoder
from train.engine.host_stream import HostStream

Clock = dict[str, int]  # of each queue, how much of its work is known to be done


@dataclass
class Access:
    """What has been done to a piece of memory, as (queue, number of the deed)."""

    last_write: tuple[str, int] = ("compute", 0)
    reads: list[tuple[str, int]] = field(default_factory=list)


@dataclass
class Queues:
    """The computation and the queues of copies as vector clocks: whatever is not ordered by an event is a race.

    Copies are made at once, which is as good as any order where the events order them, and the check does not depend
    on luck: it compares who knows of whom, not what happened to come first.
    """

    clocks: dict[str, Clock] = field(default_factory=lambda: {"compute": {}})
    touched: dict[int, Access] = field(default_factory=dict)  # by address
    copied: list[tuple[str, int]] = field(default_factory=list)

    def act(self, queue: str, reads: list[torch.Tensor], writes: list[torch.Tensor]) -> None:
        """Something that `queue` does; raises AssertionError where another may still be doing what excludes it."""
        clock = self.clocks.setdefault(queue, {})
        clock[queue] = clock.get(queue, 0) + 1
        now = (queue, clock[queue])
        for tensor in reads:
            access = self.touched.setdefault(tensor.data_ptr(), Access())
            assert self.knows(queue, access.last_write), f"{queue} reads what {access.last_write} may still write"
            access.reads.append(now)
        for tensor in writes:
            access = self.touched.setdefault(tensor.data_ptr(), Access())
            for other in (access.last_write, *access.reads):
                assert self.knows(queue, other), f"{queue} overwrites what {other} may still use"
            self.touched[tensor.data_ptr()] = Access(last_write=now)

    def knows(self, queue: str, deed: tuple[str, int]) -> bool:
        return self.clocks[queue].get(deed[0], 0) >= deed[1]

    def hear(self, queue: str, event: Clock) -> None:
        clock = self.clocks.setdefault(queue, {})
        for other, count in event.items():
            clock[other] = max(clock.get(other, 0), count)


class CheckedCopies:
    """Copies whose order is proved; `forget` names an event that is dropped, to see that it is needed."""

    def __init__(self, queues: Queues, name: str, forget: str = "") -> None:
        self.queues, self.name, self.forget = queues, name, forget

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Any) -> Any:
        if self.forget != "after":
            self.queues.hear(self.name, after)
        self.queues.act(self.name, [source], [target])
        self.queues.copied.append((self.name, source.data_ptr()))
        target.copy_(source)
        return dict(self.queues.clocks[self.name])

    def wait(self, event: Any) -> None:
        if self.forget != "wait":
            self.queues.hear("compute", event)

    def mark(self) -> Any:
        return dict(self.queues.clocks["compute"])


def checked(monkeypatch: pytest.MonkeyPatch, queues: Queues, forget: tuple[str, str] = ("", "")) -> None:
    """Makes engines copy by CheckedCopies, and reports what computation reads and writes."""
    names = iter(["weights", "out", "back"])

    def copies_for(_: torch.device) -> Copies:
        name = next(names)
        return CheckedCopies(queues, name, forget[1] if name == forget[0] else "")

    monkeypatch.setattr(decoder, "copies_for", copies_for)
    give, forward = HostStream.give, Block.forward

    def watched_give(self: HostStream, number: int) -> None:
        queues.act("compute", [self.slot_of[number].buffer], [])  # what was launched since `take` has read it
        give(self, number)

    def watched_forward(self: Any, matrices: Any, x: torch.Tensor, shared: Any) -> Any:
        queues.act("compute", [x], [])
        return forward(self, matrices, x, shared)

    monkeypatch.setattr(HostStream, "give", watched_give)
    monkeypatch.setattr(Block, "forward", watched_forward)


@pytest.mark.parametrize("numbers", [[0, 1, 2, 3, 4], [1, 3, 4], [2]])
def test_no_slot_is_written_while_it_is_read(numbers: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Three micro-batches and validations: a copy comes after its slot's last reader, every reader after its copy."""
    queues = Queues()
    checked(monkeypatch, queues)
    result(*streaming(numbers, offloads_inputs=True), packed())
    assert sum(name == "weights" for name, _ in queues.copied) >= 6 * max(0, len(numbers) - 2)
    assert any(name == "out" for name, _ in queues.copied)
    assert any(name == "back" for name, _ in queues.copied)


EVENTS = [(name, event) for name in ("weights", "out", "back") for event in ("after", "wait")]


@pytest.mark.parametrize("forget", EVENTS)
def test_every_event_is_needed(forget: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any one of the events the check finds a race: it can fail."""
    checked(monkeypatch, Queues(), forget)
    with pytest.raises(AssertionError, match="may still"):
        result(*streaming([0, 1, 2, 3, 4], offloads_inputs=True), packed())


def test_the_order_of_fetches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward 0, 1, ..., backward ..., 1, 0; what is still in a slot, or dequantised, is not fetched again."""
    queues = Queues()
    checked(monkeypatch, queues)
    adapted, plan, host = streaming([0, 1, 2, 3, 4])
    names = {buffer.data_ptr(): number for number, buffer in host.buffers.items()}
    engine = FusedDecoder(adapted.get_base_model(), plan, host)
    order = []
    for _ in range(2):
        queues.copied.clear()
        out = engine(packed())
        forward = len(queues.copied)
        out.backward(torch.ones_like(out))
        fetched = [names[address] for _, address in queues.copied]
        order.append((fetched[:forward], fetched[forward:]))
    assert order == [([0, 1, 2, 3, 4], [2, 1, 0]), ([2, 3, 4], [2, 1, 0])]

"""Context parallelism: the processes of a group together compute what one does, hidden states and every gradient."""

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

import pytest
import torch

from tests.parity.models import FAMILIES, NOTHING, adapted_model, close, gradients_of, packed, plan
from train.collate import Part, part_of
from train.engine.decoder import FusedDecoder

FAMILIES_OF_SOFTMAX = [name for name in FAMILIES if "qwen3.5" not in name]


class Threads:
    """A group whose processes are threads of this one."""

    def __init__(self, count: int) -> None:
        self.count, self.barrier = count, Barrier(count, timeout=60)
        self.sent: list[Any] = [None] * count

    def _told(self, number: int, word: Any) -> list[Any]:
        self.sent[number] = word
        self.barrier.wait()
        words = list(self.sent)
        self.barrier.wait()
        return words

    def part(self, number: int) -> Part:
        def swap(chunks: torch.Tensor) -> torch.Tensor:
            return torch.stack([theirs[number] for theirs in self._told(number, chunks)])

        return Part(number, self.count, swap, lambda flag: any(self._told(number, flag)))

    def run(self, work: Callable[[int], Any]) -> Sequence[Any]:
        """What `work` returns for each process's number."""
        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(work, range(self.count)))


@pytest.mark.parametrize("family", FAMILIES_OF_SOFTMAX)
@pytest.mark.parametrize(("count", "num_kept", "tile"), [(2, 1, 0), (2, 3, 4), (4, 2, 0)])
def test_every_family_of_models(family: str, count: int, num_kept: int, tile: int) -> None:
    """Parts of 15 packed tokens, padded and with samples across them; key and value heads fewer than processes, too."""
    adapted, batch, group = adapted_model(*FAMILIES[family]), packed(), Threads(count)
    upstream = torch.randn(16, 64)
    models = [copy.deepcopy(adapted) for _ in range(count)]
    for each in (parameter for model in models for parameter in model.parameters() if parameter.requires_grad):
        each.grad = torch.zeros_like(each)
    whole = FusedDecoder(adapted.get_base_model(), plan(num_kept, 0, tile), NOTHING)(batch)
    whole.backward(upstream[:15])

    def work(number: int) -> torch.Tensor:
        engine = FusedDecoder(models[number].get_base_model(), plan(num_kept, 0, tile), NOTHING)
        hidden = engine(part_of(batch, group.part(number)))
        gradient = upstream.clone()
        gradient[15:] = 0
        hidden.backward(gradient[group.part(number).rows(16)])
        return hidden.detach()

    close(torch.cat(list(group.run(work)))[:15], whole.detach())
    found = [gradients_of(model) for model in models]
    for name, gradient in gradients_of(adapted).items():
        close(sum(each[name] for each in found), gradient)

"""Where the inputs of blocks that are computed again lie between the forward and the backward pass."""

from collections import deque

import torch

from train.engine.copies import Copies, Event, host_buffers

IN_FLIGHT = 1  # copies to the host that the computation has not waited for: 8 KB a token take less time than a block


class DeviceInputs:
    """On the device: 8 KB a token and block of Llama-3.1-8B."""

    def __init__(self) -> None:
        self.stack: list[torch.Tensor] = []

    def begin(self) -> None:
        """A forward pass begins, and its backward pass comes before the next one."""
        self.stack.clear()

    def keep(self, x: torch.Tensor) -> None:
        """Keeps the next block's input [T, H]."""
        self.stack.append(x)

    def settle(self) -> None:
        """The forward pass has ended."""

    def take(self) -> torch.Tensor:
        """The input that was kept last and not yet taken."""
        return self.stack.pop()


class HostInputs:
    """In page-locked host memory, copied there and back beside the computation, the next one while a block computes."""

    def __init__(self, num_inputs: int, most_tokens: int, like: torch.Tensor, out: Copies, back: Copies) -> None:
        """Room for `num_inputs` inputs of `most_tokens` tokens of width and type of `like` [H]."""
        size = most_tokens * like.numel() * like.element_size()
        self.width = like.numel()
        self.buffers = [b.view(like.dtype) for b in host_buffers([size] * num_inputs, like.is_cuda)]
        self.out, self.back = out, back
        self.num_kept = self.num_fetched = self.num_tokens = 0
        self.leaving: deque[tuple[Event, torch.Tensor]] = deque()
        self.arriving: deque[tuple[Event, torch.Tensor]] = deque()
        self.device = like.device

    def begin(self) -> None:
        """As DeviceInputs."""
        self._wait_for_all_but(0)  # nothing, unless the last pass raised
        for event, _ in self.arriving:
            self.back.wait(event)
        self.num_kept = self.num_fetched = 0
        self.arriving.clear()

    def keep(self, x: torch.Tensor) -> None:
        """As DeviceInputs; its memory is free again as soon as the copy is done."""
        self.num_tokens = x.shape[0]
        host = self._host(self.num_kept)
        self.num_kept += 1
        self.leaving.append((self.out.copy(host, x, self.out.mark()), x))
        self._wait_for_all_but(IN_FLIGHT)

    def settle(self) -> None:
        """All copies are done before anything that follows."""
        self._wait_for_all_but(0)
        self.num_fetched = self.num_kept

    def take(self) -> torch.Tensor:
        """As DeviceInputs."""
        self._fetch(2 - len(self.arriving))
        event, x = self.arriving.popleft()
        self.back.wait(event)
        self.num_kept -= 1
        return x

    def _fetch(self, count: int) -> None:
        for _ in range(min(count, self.num_fetched)):
            self.num_fetched -= 1
            host = self._host(self.num_fetched)
            # made by the stream that computes, whose work so far may still read what lay there
            x = torch.empty(host.shape, dtype=host.dtype, device=self.device)
            self.arriving.append((self.back.copy(x, host, self.back.mark()), x))

    def _host(self, number: int) -> torch.Tensor:
        used = self.num_tokens * self.width
        return self.buffers[number][:used].view(self.num_tokens, self.width)

    def _wait_for_all_but(self, count: int) -> None:
        while len(self.leaving) > count:
            event, _ = self.leaving.popleft()
            self.out.wait(event)

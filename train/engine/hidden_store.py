"""Where the inputs of recomputed blocks are between the forward and the backward pass."""

from collections import deque

import torch

from train.engine.copies import Copies, Event, host_buffers

MAX_LEAVING = 1  # copies to the host not yet waited for: 8 KB a token take less time than a block


class DeviceInputs:
    """On the device: 8 KB a token and block of Llama-3.1-8B."""

    def __init__(self) -> None:
        self.stack: list[torch.Tensor] = []

    def begin(self) -> None:
        """A forward pass begins; its backward pass follows before the next one."""
        self.stack.clear()

    def keep(self, x: torch.Tensor) -> None:
        """Keeps the next block's input [T, H]."""
        self.stack.append(x)

    def settle(self) -> None:
        """The forward pass has ended."""

    def take(self) -> torch.Tensor:
        """Returns the inputs in reverse order, one a call."""
        return self.stack.pop()


class HostInputs:
    """In pinned host memory: copied there during the forward pass and back, a block ahead, during the backward pass."""

    def __init__(self, num_inputs: int, max_tokens: int, like: torch.Tensor, out: Copies, back: Copies) -> None:
        """Room for `num_inputs` inputs of `max_tokens` tokens, with the width and type of `like` [H]."""
        size = max_tokens * like.numel() * like.element_size()
        self.width = like.numel()
        self.buffers = [b.view(like.dtype) for b in host_buffers([size] * num_inputs, like.is_cuda)]
        self.out, self.back = out, back
        self.num_kept = self.num_to_fetch = self.num_tokens = 0
        self.leaving: deque[tuple[Event, torch.Tensor]] = deque()
        self.arriving: deque[tuple[Event, torch.Tensor]] = deque()
        self.device = like.device

    def begin(self) -> None:
        """As DeviceInputs."""
        self._wait_for_all_but(0)  # there are none, unless the last pass raised
        for event, _ in self.arriving:
            self.back.wait(event)
        self.num_kept = self.num_to_fetch = 0
        self.arriving.clear()

    def keep(self, x: torch.Tensor) -> None:
        """As DeviceInputs; its device memory is free as soon as the copy is done."""
        self.num_tokens = x.shape[0]
        host = self._host(self.num_kept)
        self.num_kept += 1
        self.leaving.append((self.out.copy(host, x, self.out.mark()), x))
        self._wait_for_all_but(MAX_LEAVING)

    def settle(self) -> None:
        """As DeviceInputs; what follows begins after all copies."""
        self._wait_for_all_but(0)
        self.num_to_fetch = self.num_kept

    def take(self) -> torch.Tensor:
        """As DeviceInputs; the copy of the next one starts."""
        self._fetch(2 - len(self.arriving))
        event, x = self.arriving.popleft()
        self.back.wait(event)
        self.num_kept -= 1
        return x

    def _fetch(self, count: int) -> None:
        for _ in range(min(count, self.num_to_fetch)):
            self.num_to_fetch -= 1
            host = self._host(self.num_to_fetch)
            # allocated by the computing stream, whose work so far may still read what was there
            x = torch.empty(host.shape, dtype=host.dtype, device=self.device)
            self.arriving.append((self.back.copy(x, host, self.back.mark()), x))

    def _host(self, number: int) -> torch.Tensor:
        used = self.num_tokens * self.width
        return self.buffers[number][:used].view(self.num_tokens, self.width)

    def _wait_for_all_but(self, count: int) -> None:
        while len(self.leaving) > count:
            event, _ = self.leaving.popleft()
            self.out.wait(event)

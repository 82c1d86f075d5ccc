"""Host memory that GPUs copy from: of this process, or of its machine, whose processes then keep one copy together.

One copy needs no locks: frozen weights are written once, each thing by one process, and only read after that.
"""

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Protocol

import torch
import torch.distributed as dist

from train.engine.copies import HostMemoryError, host_buffers
from train.engine.peer_memory import PeerMemoryError, agree, gathered, keep, machine_file
from train.run.machine import machine_number

PORTABLE = 1  # cudaHostRegisterPortable: pinned for every CUDA context of the process
PAGE = 4096  # bytes, to try it with


class HostMemory(Protocol):
    """Where streamed weights and the embedding are kept."""

    is_shared: bool  # with other processes, so that all have to settle before it is read

    def buffers(self, sizes: Sequence[int]) -> list[torch.Tensor]:
        """Byte buffers of these sizes, pinned where a GPU copies from them; raises HostMemoryError."""
        ...

    def writes(self, place: int) -> bool:
        """Whether this process writes the thing at this place in an order that all processes have in common."""
        ...


class OwnMemory:
    """Memory of this process alone."""

    is_shared = False

    def __init__(self, pin: bool) -> None:
        self.pin = pin

    def buffers(self, sizes: Sequence[int]) -> list[torch.Tensor]:
        """As HostMemory."""
        return host_buffers(list(sizes), self.pin)

    def writes(self, place: int) -> bool:
        """Everything."""
        return True


class MachineMemory:
    """Memory that the processes of a machine have in common; all processes of the run call it together.

    Mapped and pinned until the process ends, which undoes both: before that a copy from it may be under way, and to
    wait for it could be for ever where another process has been lost.
    """

    is_shared = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        every = machines(device)
        here = [rank for rank, machine in enumerate(every) if machine == every[dist.get_rank()]]
        self.index, self.num_processes = here.index(dist.get_rank()), len(here)

    def buffers(self, sizes: Sequence[int]) -> list[torch.Tensor]:
        """As HostMemory; other processes' must have the same sizes."""
        try:
            memory = _pinned_file(sum(sizes), self.device)
        except PeerMemoryError as error:
            reason = f"{sum(sizes) / 2**30:.2f} GiB of host memory could not be shared or pinned: {error}"
            raise HostMemoryError(reason) from error
        keep(memory)
        return list(memory.split(list(sizes)))

    def writes(self, place: int) -> bool:
        """As HostMemory: the processes of the machine take turns."""
        return place % self.num_processes == self.index


def machines(device: torch.device, are_whole: bool = False) -> list[int]:
    """A number for the machine of each process, or its container there, in the order of ranks; all processes call this
    together."""
    number = 0
    with suppress(OSError):  # told where memory is shared
        number = machine_number(are_whole)
    return [each for (each,) in gathered([number], device)]


def cannot_share(device: torch.device) -> str:
    """Why the processes of a machine cannot have host memory in common; empty where they can, on every machine.

    Tried with one page; all processes call this together.
    """
    try:
        memory = _pinned_file(PAGE, device)
    except PeerMemoryError as error:
        return str(error)
    if device.type == "cuda":
        _cudart().cudaHostUnregister(memory.data_ptr())
    return ""


def _pinned_file(num_bytes: int, device: torch.device) -> torch.Tensor:
    memory, problem = machine_file(num_bytes, device), ""
    if device.type == "cuda":
        problem = _pin(memory, device)
        try:
            agree(problem, device)
        except (PeerMemoryError, torch.OutOfMemoryError):
            if not problem:
                _cudart().cudaHostUnregister(memory.data_ptr())
            raise
    return memory


def _pin(memory: torch.Tensor, device: torch.device) -> str:
    """Why the driver does not pin the pages for this process; empty where it has."""
    code = _cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, PORTABLE)
    if int(code) == 0:
        return ""
    with suppress(RuntimeError):  # the runtime tells its last error once more, at the next kernel
        torch.zeros(1, device=device)
    return f"cudaHostRegister: {torch.cuda.CudaError(int(code))}"


def _cudart() -> Any:
    return torch.cuda.cudart()

"""Memory that processes of a machine see together: of each one's GPU over NVLink or PCIe, or of the host as files."""

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import _symmetric_memory as symmetric_memory

from train.run.machine import machine_number

MAX_PROBLEM = 200  # bytes of what one process tells the others
PRESENT, SHORT = 1, 2  # what a process begins with in an exchange: it is there, or there without memory for it

_KEPT: list[Any] = []  # what holds the mappings, for as long as the process lives


class PeerMemoryError(RuntimeError):
    """Memory could not be shared with other processes."""


def arenas(num_bytes: int, device: torch.device) -> Sequence[torch.Tensor]:
    """uint8 memory of every process, in the order of ranks; all processes call this together.

    A GPU's lies beside torch's caching allocator, and stays readable until the last process that maps it has ended.
    Raises PeerMemoryError where they cannot read one another's memory.
    """
    try:
        return _of_gpus(num_bytes, device) if device.type == "cuda" else _of_files(num_bytes, device)
    except (dist.DistError, torch.OutOfMemoryError):  # a process is lost, or one has no memory
        raise
    except (RuntimeError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise PeerMemoryError(f"processes cannot read each other's memory here: {reason}") from error


def _of_gpus(num_bytes: int, device: torch.device) -> Sequence[torch.Tensor]:
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")  # which copies do not need
    mine = symmetric_memory.empty(num_bytes, dtype=torch.uint8, device=device)
    group: Any = dist.group.WORLD
    handle: Any = symmetric_memory.rendezvous(mine, group)
    _KEPT.extend([mine, handle])
    return [handle.get_buffer(rank, (num_bytes,), torch.uint8) for rank in range(dist.get_world_size())]


def _of_files(num_bytes: int, device: torch.device) -> Sequence[torch.Tensor]:
    file = _file(num_bytes)
    _KEPT.append(file)
    found = [_mapped(place, num_bytes) for place in gathered(_place_of(file), device)]
    dist.barrier()  # until all have mapped them
    return found


def machine_file(num_bytes: int, device: torch.device) -> torch.Tensor:
    """uint8 host memory, zeroed, of which a machine has one copy that all its processes map.

    All processes call this together. Raises PeerMemoryError in all of them, those of other machines too, where one
    cannot map it.
    """
    file, machine, place, problem = -1, 0, [0, -1, 0, 0], ""
    memory = torch.empty(0, dtype=torch.uint8)
    try:
        try:
            machine, file = machine_number(), _file(num_bytes)
            place = _place_of(file)
        except OSError as error:
            problem = str(error)
        offers = gathered([machine, num_bytes, *place], device)
        first = next(offer for offer in offers if offer[0] == machine)  # whose file it is
        if any(offer[1] != num_bytes for offer in offers):
            problem = "processes have made different plans"
        if not problem:
            try:
                memory = _mapped(first[2:], num_bytes)
            except (OSError, RuntimeError) as error:
                problem = str(error).partition("\n")[0]
        agree(problem, device)
    finally:
        if file >= 0:  # mappings hold its pages
            os.close(file)
    return memory


def agree(problem: str, device: torch.device) -> None:
    """Raises PeerMemoryError in all processes if one of them has a problem; all call this together."""
    said = problem.encode()[:MAX_PROBLEM].ljust(MAX_PROBLEM)
    for rank, letters in enumerate(gathered(list(said), device)):
        if found := bytes(letters).decode(errors="replace").strip():
            raise PeerMemoryError(f"process {rank}: {found}")


def keep(memory: torch.Tensor) -> None:
    """Keeps memory mapped for as long as the process lives."""
    _KEPT.append(memory)


def gathered(numbers: list[int], device: torch.device) -> list[list[int]]:
    """The numbers of every process, in the order of ranks; all processes call this together.

    Raises DistError where one is lost, whatever the backend: NCCL returns what it has when it gives up. Raises
    OutOfMemoryError in all of them where one has no memory for it.
    """
    try:
        found = _exchanged([PRESENT, *numbers], device)
    except torch.OutOfMemoryError:  # what is allocated comes before the exchange, in which the others wait
        torch.cuda.empty_cache()
        found = _exchanged([SHORT, *(0 for _ in numbers)], device)
    states = [state for state, *_ in found]
    if not all(states):
        raise dist.DistError("a collective of NCCL or gloo was given up: a process is not in it")
    if SHORT in states:
        raise torch.OutOfMemoryError(f"process {states.index(SHORT)} ran out of memory in an exchange with the others")
    return [told for _, *told in found]


def any_failed(device: torch.device, failed: bool) -> bool:
    """Whether a trial failed in any process, the same in all; one without memory to tell it has failed as well."""
    if not dist.is_initialized():
        return failed
    try:
        return any(told for (told,) in gathered([int(failed)], device))
    except torch.OutOfMemoryError:
        return True


def _exchanged(numbers: list[int], device: torch.device) -> list[list[int]]:
    mine = torch.tensor(numbers, device=device if dist.get_backend() == "nccl" else "cpu")
    every = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    try:
        dist.all_gather(every, mine)
        return [each.tolist() for each in every]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise dist.DistError(str(error)) from error


def _file(num_bytes: int) -> int:
    """A file in memory; no file system's limit applies (a container's /dev/shm has 64 MiB)."""
    file = os.memfd_create("handloop weights")
    os.ftruncate(file, num_bytes)
    return file


def _place_of(file: int) -> list[int]:
    status = os.fstat(file)
    return [os.getpid(), file, status.st_dev, status.st_ino]


def _mapped(place: list[int], num_bytes: int) -> torch.Tensor:
    """The file of another process; raises OSError where the system does not give it, or another one."""
    pid, number, *identity = place
    file = os.open(f"/proc/{pid}/fd/{number}", os.O_RDWR)
    try:
        if _place_of(file)[2:] != identity:  # in another PID namespace, another process has this number
            raise OSError(f"/proc/{pid} is another process here")
        return torch.from_file(f"/proc/self/fd/{file}", shared=True, size=num_bytes, dtype=torch.uint8)
    finally:
        os.close(file)


def settle(device: torch.device) -> None:
    """Waits until every process has written what the others will read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    gathered([], device)

"""Memory of each process of a machine that all can read: of GPUs over NVLink or PCIe, of CPUs as mapped files."""

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import _symmetric_memory as symmetric_memory

_KEPT: list[Any] = []  # what holds the mappings, for as long as the process lives


class PeerMemoryError(RuntimeError):
    """Memory could not be shared with other processes."""


def arenas(num_bytes: int, device: torch.device) -> Sequence[torch.Tensor]:
    """uint8 memory of every process, in the order of ranks; all processes call this together.

    A GPU's lies beside torch's caching allocator, and stays readable until the last process that maps it has ended.
    Raises PeerMemoryError where they cannot read one another's memory.
    """
    try:
        return _of_gpus(num_bytes, device) if device.type == "cuda" else _of_files(num_bytes)
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


def _of_files(num_bytes: int) -> Sequence[torch.Tensor]:
    file = os.memfd_create("handloop weights")  # no file system's limit applies
    os.ftruncate(file, num_bytes)
    _KEPT.append(file)
    places = [torch.zeros(2, dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(places, torch.tensor([os.getpid(), file]))
    paths = ["/proc/{}/fd/{}".format(*place.tolist()) for place in places]
    found = [torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8) for path in paths]
    dist.barrier()  # until all have mapped them
    return found


def settle(device: torch.device) -> None:
    """Waits until every process has written what the others will read."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    dist.barrier()

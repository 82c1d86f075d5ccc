"""The processes that compute a micro-batch's tokens together (context parallelism)."""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator

from train.collate import WHOLE, Part
from train.config import Config
from train.engine.machine_memory import machines
from train.metrics import to_host
from train.run.exits import ExitCode, ExitWith
from train.run.processes import check_present


def start_group(config: Config, accelerator: Accelerator) -> Part:
    """This process's part in its group: as many consecutive processes of one machine as batch.context_parallel says.

    All processes call it together. One exchange and one sum are made here: what NCCL allocates for them lies beside
    torch's memory, and has to be there when that is counted. Raises ExitWith(BAD_INPUT) where a group is on several
    machines.
    """
    count, device = config.batch.context_parallel, accelerator.device
    if count == 1:
        return WHOLE
    places = machines(device)  # of each process
    if any(len(set(places[first : first + count])) > 1 for first in range(0, len(places), count)):
        reason = "a group's processes are on several machines, which exchange too slowly for every block"
        raise ExitWith(ExitCode.BAD_INPUT, f"--batch.context_parallel {count}: {reason}; write a divisor of one's")
    timeout = timedelta(minutes=config.run.timeout_minutes)
    group: Any = dist.new_subgroups(count, timeout=timeout)[0]

    def swap(chunks: torch.Tensor) -> torch.Tensor:
        swapped = torch.empty_like(chunks)
        dist.all_to_all_single(swapped, chunks, group=group)
        return swapped

    def any_of(flag: bool) -> bool:
        counts = torch.tensor([float(flag), 1.0], device=device)
        dist.all_reduce(counts, group=group)
        found, num_present = to_host(*counts)
        check_present(count, num_present)
        return found > 0

    swap(torch.zeros(count, 1, device=device))
    any_of(False)
    return Part(accelerator.process_index % count, count, swap, any_of)

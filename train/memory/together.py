"""What several processes plan with, so that each comes to the same plan."""

from collections import Counter
from dataclasses import replace

from accelerate import Accelerator

from train.engine.machine_memory import cannot_share, machines
from train.memory.gpus import Gpu
from train.memory.outlook import Outlook
from train.run.accelerator import check_peers, least


def planned_together(outlook: Outlook, accelerator: Accelerator) -> tuple[Outlook, str]:
    """The outlook of a run on so many processes, and why those of a machine keep a copy each of what is streamed.

    Rates that were measured and free memory, of which each process has found its own, become the least of all. Raises
    ExitWith(BAD_INPUT) where weights cannot be shared out as memory.shard asks.
    """
    if accelerator.num_processes == 1 or outlook.planner is None:
        return outlook.on(accelerator.num_processes), ""
    device, job = accelerator.device, outlook.planner.job
    containers, whole = machines(device), machines(device, are_whole=True)
    if outlook.config.memory.shard:
        check_peers(accelerator, containers)
    gpu = _least_of(job.gpu, accelerator)
    outlook = replace(outlook, planner=replace(outlook.planner, job=replace(job, gpu=gpu)))
    num_local = max(Counter(whole).values())  # machines may have unequally many
    reason = cannot_share(device) if num_local > 1 else ""
    if num_local > 1 and len(set(containers)) > len(set(whole)):
        reason = reason or "they are in several containers of a machine"
    return outlook.on(accelerator.num_processes, num_local, shares_host=num_local > 1 and not reason), reason


def _least_of(gpu: Gpu, accelerator: Accelerator) -> Gpu:
    """This process's GPU, with no more than any process's has or may take."""
    rates = [gpu.flops, gpu.fp32_flops, gpu.bandwidth, gpu.bus]
    found = least(accelerator, [*rates, float(gpu.max_host_bytes), float(gpu.has_graphs), *map(float, gpu.capability)])
    flops, fp32_flops, bandwidth, bus, host_bytes, has_graphs, *capability = found
    return replace(
        gpu,
        flops=flops,
        fp32_flops=fp32_flops,
        bandwidth=bandwidth,
        bus=bus,
        max_host_bytes=int(host_bytes),
        has_graphs=bool(has_graphs),
        capability=(int(capability[0]), int(capability[1])),
    )

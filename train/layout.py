"""How many samples an optimizer step has, and how they are divided: per device, accumulated, by processes."""

import math
from dataclasses import dataclass, replace

from accelerate import Accelerator

from train.config import BatchConfig
from train.run.exits import ExitCode, ExitWith


@dataclass(frozen=True)
class BatchLayout:
    """How one optimizer step's samples are divided among processes and micro-batches."""

    per_device: int
    accumulation: int
    num_processes: int  # a group of batch.context_parallel ones counts as one
    rank: int
    samples: int = 0  # in a step; 0: per_device x accumulation x num_processes
    asked: str = ""  # asked_for(the options), which a checkpoint keeps
    context_parallel: int = 1  # processes in a group

    @classmethod
    def of(cls, batch: BatchConfig, accelerator: Accelerator, asked: str = "") -> "BatchLayout":
        """Of this process's part of a run, whose batch is `arranged`."""
        rank = accelerator.process_index // batch.context_parallel
        return replace(cls.of_first(batch, accelerator.num_processes), rank=rank, asked=asked)

    @classmethod
    def of_first(cls, batch: BatchConfig, num_processes: int = 1) -> "BatchLayout":
        """Of the first of so many processes, which need not be there; the batch is `arranged` for them."""
        num_groups, count = groups(batch, num_processes), batch.context_parallel
        return cls(batch.per_device, batch.accumulation, num_groups, 0, batch.samples, context_parallel=count)

    @property
    def samples_per_step(self) -> int:
        """The global batch size."""
        return self.samples or self.per_device * self.accumulation * self.num_processes

    def arithmetic(self, unit: str = "samples") -> str:
        """The batch arithmetic, as it is told."""
        factors = f"{self.per_device} per device x {self.accumulation} accumulated x "
        factors += _processes(self.num_processes, self.context_parallel)
        if self.per_device * self.accumulation * self.num_processes == self.samples_per_step:
            return f"{factors} = {self.samples_per_step} {unit} per step"
        return f"{self.samples_per_step} {unit} per step in uneven shares, of at most {factors}"


def _processes(num_groups: int, context_parallel: int) -> str:
    """So many processes, alone or in groups."""
    count = num_groups * context_parallel
    told = f"{count} process{'es' if count > 1 else ''}"
    return told + (f" in groups of {context_parallel}" if context_parallel > 1 else "")


def groups(batch: BatchConfig, num_processes: int) -> int:
    """Groups that batch.context_parallel makes of the processes; raises ExitWith(BAD_INPUT) where some are left."""
    count = batch.context_parallel
    if num_processes % count:
        reason = f"{num_processes} process{'es make' if num_processes > 1 else ' makes'} no groups of {count}"
        remedy = f"start a multiple of {count}, one a GPU (accelerate launch), or leave it out"
        raise ExitWith(ExitCode.BAD_INPUT, f"--batch.context_parallel {count}: {reason}; {remedy}")
    return num_processes // count


def arranged(batch: BatchConfig, num_processes: int) -> BatchConfig:
    """The batch with numbers for `num_processes`: where `samples` is given, accumulation follows from it.

    A number that they do not divide is dealt unevenly. A batch that is arranged stays as it is. Raises
    ExitWith(BAD_INPUT), with what would work, where options contradict each other or a process would have no sample.
    """
    samples, given, num_processes = batch.samples, batch.accumulation, groups(batch, num_processes)
    if not samples:
        return batch
    if samples < num_processes:
        reason = f"--batch.samples {samples} leaves some of {num_processes} processes without a sample: "
        raise ExitWith(ExitCode.BAD_INPUT, f"{reason}give at least {num_processes}, or start at most {samples}")
    if given and given != math.ceil(samples / (num_processes * batch.per_device)):
        raise ExitWith(ExitCode.BAD_INPUT, _contradiction(batch, num_processes))
    per_device = min(batch.per_device, math.ceil(samples / num_processes))
    return replace(batch, per_device=per_device, accumulation=math.ceil(samples / (num_processes * per_device)))


def keeping(batch: BatchConfig, samples: int) -> BatchConfig:
    """The batch with so many samples in a step, still to be `arranged`."""
    return replace(batch, samples=samples, accumulation=0)


def asked_for(batch: BatchConfig) -> str:
    """The options as they were given, of a batch that depends on the number of processes; empty for another."""
    return "" if batch.samples else f"{batch.per_device} x {batch.accumulation}"


def _contradiction(batch: BatchConfig, num_processes: int) -> str:
    per_device, accumulation, samples = batch.per_device, batch.accumulation, batch.samples
    product, fits = per_device * accumulation * num_processes, math.ceil(samples / (num_processes * per_device))
    ways = [f"leave out --batch.accumulation, which is then {fits}", f"give --batch.samples {product}"]
    if samples % (accumulation * num_processes) == 0:
        ways.insert(1, f"give --batch.per_device {samples // (accumulation * num_processes)}")
    processes = _processes(num_processes, batch.context_parallel)
    return (
        f"--batch.samples {samples}, and {per_device} per device x {accumulation} accumulated x {processes} are "
        f"{product}: {', or '.join(ways)}"
    )

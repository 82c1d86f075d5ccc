"""A run that goes on with another number of processes: its steps keep their samples."""

from accelerate import Accelerator

from train.checkpoints.contents import Checkpoint
from train.checkpoints.identity import SAMPLES
from train.config import BatchConfig
from train.layout import BatchLayout, arranged, asked_for, groups, keeping
from train.run.exits import ExitCode, ExitWith
from train.run.processes import say


def kept_batch(checkpoint: Checkpoint | None, asked: BatchConfig, accelerator: Accelerator) -> BatchConfig:
    """The batch as it is `arranged` for these processes; of a checkpoint's run that was begun with the same options
    on another number of them, its samples in a step, which is said.

    Options that the run was not begun with are left as they are: its identity refuses them where a step would have
    other samples. Raises ExitWith(BAD_INPUT) as `arranged`, and where the step has too few samples.
    """
    num_processes = groups(asked, accelerator.num_processes)
    batch = arranged(asked, accelerator.num_processes)
    if checkpoint is None or asked.samples:
        return batch
    samples, layout = checkpoint.state.identity.get(SAMPLES), checkpoint.state.layout
    begun = layout.get("asked") or f"{layout.get('per_device')} x {layout.get('accumulation')}"
    product = batch.per_device * batch.accumulation * num_processes
    if not isinstance(samples, int) or samples == product or begun != asked_for(asked):
        return batch
    if samples < num_processes:
        raise ExitWith(
            ExitCode.BAD_INPUT,
            f"{checkpoint.path}: the run has {samples} samples in a step, which {num_processes} processes cannot "
            f"share; start at most {samples}",
        )
    kept = arranged(keeping(asked, samples), accelerator.num_processes)
    told = BatchLayout.of(kept, accelerator).arithmetic()
    say(accelerator, f"batch     {told}, as the run began; {begun} on {num_processes} would be {product}")
    return kept

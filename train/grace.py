"""Whether a stop signal is obeyed within the time that whoever sends it gives."""

from train.config import RunConfig


def grace_warning(run: RunConfig, micro_batch_seconds: float, save_seconds: float) -> str:
    """A warning if a micro-batch and a save take longer than run.grace_seconds; otherwise empty."""
    seconds = micro_batch_seconds + save_seconds
    if seconds <= run.grace_seconds:
        return ""
    save = f" and a save of {save_seconds:.1f} s" if save_seconds else ""
    return (
        f"a stop takes up to {seconds:.1f} s (a micro-batch of {micro_batch_seconds:.1f} s{save}), longer than "
        f"run.grace_seconds = {run.grace_seconds:g}: who waits no longer kills the run, and the steps since the last "
        "checkpoint are computed again. Lower --batch.per_device (with --batch.merge off) or --data.max_length, or "
        "raise --run.grace_seconds to what the scheduler gives"
    )


class Grace:
    """Measures it while training, and warns once."""

    def __init__(self, run: RunConfig) -> None:
        self.run = run
        self.save_seconds = 0.0  # of the last save
        self.is_first_step = True  # which takes longer than others: kernels are chosen, graphs captured
        self.is_told = False

    def check(self, micro_batch_seconds: float) -> str:
        """A warning after a step whose micro-batches took so long, the first time that it is due; otherwise empty."""
        warning = grace_warning(self.run, micro_batch_seconds, self.save_seconds)
        if self.is_first_step or self.is_told:
            warning = ""
        self.is_first_step, self.is_told = False, self.is_told or bool(warning)
        return warning

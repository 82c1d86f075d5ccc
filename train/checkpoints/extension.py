"""A run that goes on to another number of steps: where its schedule allows it, or as an extension."""

from train.checkpoints.contents import Checkpoint
from train.config import Config
from train.data import TrainingData
from train.learning_rate import Schedule
from train.run.exits import ExitCode, ExitWith

TOTAL = "total optimizer steps"  # in a checkpoint's identity


def resumed_schedule(checkpoint: Checkpoint, config: Config, data: TrainingData) -> Schedule:
    """The schedule with which a checkpoint's run goes on to the steps of `config`; it may be an extension.

    Raises ExitWith(FINGERPRINT_MISMATCH) where steps that were made would have had other rates, unless `run.extend`
    asks for a further decay, and where more steps were made than the run is to have.
    """
    completed, total = checkpoint.state.step, data.total_steps(config.train)
    # a checkpoint of 0.1.0 has its total alone
    rows = checkpoint.state.schedule or [[0, config.optim.lr, checkpoint.state.identity.get(TOTAL)]]
    try:
        saved = Schedule.from_rows(config.optim, rows)
    except ValueError as error:
        reason = f"{checkpoint.path}: its learning rate schedule cannot be read: {error}"
        raise ExitWith(ExitCode.FINGERPRINT_MISMATCH, reason) from None
    if total < completed:
        raise ExitWith(
            ExitCode.FINGERPRINT_MISMATCH,
            f"{checkpoint.path} has {completed} optimizer steps, and this command makes only {total} "
            f"({_what_says_so(config, data)}); steps that were made cannot be taken back: ask for more, or start again "
            "with --run.resume never",
        )
    if total == saved.total_steps:
        return saved
    if saved.is_independent(completed):
        return saved.with_end(total)
    if config.run.extend:
        return saved.extended(completed, total)
    raise ExitWith(ExitCode.FINGERPRINT_MISMATCH, _refusal(checkpoint, saved, config, data))


def _refusal(checkpoint: Checkpoint, saved: Schedule, config: Config, data: TrainingData) -> str:
    completed, total, shape = checkpoint.state.step, data.total_steps(config.train), config.optim.schedule
    old, new = saved.rate(completed - 1), saved.with_end(total).rate(completed - 1)
    return (
        f"{checkpoint.path} belongs to a run of {saved.total_steps} optimizer steps, and this command makes {total} "
        f"({_what_says_so(config, data)}).\n"
        f"The {shape} schedule depends on that number: step {completed} had the learning rate {old:.3g}, in a run of "
        f"{total} steps it would have had {new:.3g}. Two honest ways:\n"
        f"  --run.resume never    starts again, with one decay over all {total} steps; the run so far is kept aside\n"
        f"  --run.extend true     goes on with a new {shape} decay from {old:.3g} after step {completed} to step "
        f"{total}"
    )


def _what_says_so(config: Config, data: TrainingData) -> str:
    epochs = data.steps_per_epoch * config.train.epochs
    if config.train.max_steps and config.train.max_steps <= epochs:
        return f"--train.max_steps {config.train.max_steps}"
    return f"--train.epochs {config.train.epochs}"

"""Whether a recipe fits the data: what is said before the first step, and of the answers at the end."""

import math

from train.config import Config, TrainConfig

# Learning rates of AdamW that have any use, and those of recipes
RATES, RATES_OF_ALL = (1e-6, 0.02, "1e-4 to 1e-3"), (1e-8, 1e-3, "1e-5 to 5e-5")
MAX_WARMUP = 1 / 3  # of the steps; recipes take 0 to 10 %
MIN_STEPS = 100  # with fewer, an adapter that starts at zero has hardly left it at the usual rates
ENOUGH_STEPS = 200  # which a few dozen rows take to be learnt (docs/LOG.md, 2026-11-27)
MIN_RIGHT = 0.5  # of the questions from the training data, below which a short run has taught little
MIN_KNOWN, MIN_KEPT = 4, 0.6  # general questions that the base answers, and the share of them that should stay
# Epochs beyond which held-out loss usually rises: 3 are usual, small data sets are learnt by heart in ten to twenty.
MAX_EPOCHS_OF_MANY, MANY_SAMPLES = 5, 2_000
MAX_EPOCHS = 20


def recipe_warnings(config: Config, num_samples: int, steps_per_epoch: int, total_steps: int, warmup: int) -> list[str]:
    """A line for each number that hardly fits a run of `total_steps` over `num_samples`, with the option that mends it.

    `warmup` is in steps, as the run has it. What ends early by validation may have any number of epochs.
    """
    found = [
        _of_rate(config),
        _of_warmup(config, warmup, total_steps),
        _of_steps(config, steps_per_epoch, total_steps),
        _of_epochs(config, num_samples, steps_per_epoch, total_steps),
    ]
    return [line for line in found if line]


def _of_rate(config: Config) -> str:
    rate, is_whole = config.optim.lr, config.train.method == "full"
    least, most, usual = RATES_OF_ALL if is_whole else RATES
    if least <= rate <= most:
        return ""
    size = "high" if rate > most else "low"
    return f"a learning rate of {rate:g} is {size}; {usual} are usual for {'all weights' if is_whole else 'adapters'}"


def _of_warmup(config: Config, warmup: int, total_steps: int) -> str:
    asked = config.optim.warmup
    if warmup <= MAX_WARMUP * total_steps or (isinstance(asked, float) and asked <= MAX_WARMUP):
        return ""
    fits = "--optim.warmup 0.1 is a tenth of them" if total_steps >= 10 else "--optim.warmup 0 has none"
    if warmup >= total_steps:
        return f"the warmup of {warmup:,} steps leaves none of the run's {total_steps:,} at the peak rate; {fits}"
    return f"the warmup of {warmup:,} steps is {warmup / total_steps:.0%} of the run's {total_steps:,}; {fits}"


def _of_steps(config: Config, steps_per_epoch: int, total_steps: int) -> str:
    train, batch = config.train, config.batch
    if total_steps >= MIN_STEPS or 0 < train.max_steps <= total_steps:  # which the user has asked for
        return ""
    ways = []
    if batch.accumulation > 1 and batch.accumulation * total_steps >= MIN_STEPS:
        fewer = max(1, batch.accumulation * total_steps // MIN_STEPS)
        smaller = f"--batch.samples {max(1, batch.samples * fewer // batch.accumulation)}"
        ways.append(f"{smaller if batch.samples else f'--batch.accumulation {fewer}'} takes smaller ones")
    if epochs := _enough_epochs(steps_per_epoch):
        steps = epochs * steps_per_epoch
        ways.append(f"{_without_limit(train.max_steps, steps)}--train.epochs {epochs} makes {steps:,}")
    advice = "; ".join(ways) or "more data, or a base that needs less teaching"
    return f"{total_steps:,} optimizer steps teach little, about {MIN_STEPS} are the least that usually do: {advice}"


def _enough_epochs(steps_per_epoch: float) -> int:
    """The epochs that make ENOUGH_STEPS, or MAX_EPOCHS where those make MIN_STEPS; 0 where they do not."""
    epochs = min(MAX_EPOCHS, math.ceil(ENOUGH_STEPS / steps_per_epoch))
    return epochs if epochs * steps_per_epoch >= MIN_STEPS else 0


def _without_limit(max_steps: int, num_steps: float) -> str:
    """The option that lets a run of `num_steps` steps be; empty where train.max_steps does."""
    return "--train.max_steps 0 " if 0 < max_steps < num_steps else ""


def decided(train: TrainConfig, steps_per_epoch: int) -> str:
    """Which of two limits ends the run, and how the other is reached; empty where there is no train.max_steps."""
    steps, most = steps_per_epoch * train.epochs, train.max_steps
    if not most:
        return ""
    if steps == most:
        return f"as --train.epochs {train.epochs} and --train.max_steps {most} both say"
    if steps > most:
        return f"by --train.max_steps {most}, which comes before the {steps:,} of --train.epochs {train.epochs}"
    enough = math.ceil(most / steps_per_epoch)
    return (
        f"by --train.epochs {train.epochs}, which comes before --train.max_steps {most}; --train.epochs {enough} "
        "reaches it"
    )


def longer(train: TrainConfig, steps_per_epoch: int) -> str:
    """The option that doubles a run that has made all its steps."""
    if 0 < train.max_steps < steps_per_epoch * train.epochs:
        return f"--train.max_steps {2 * train.max_steps}"
    return f"{_without_limit(train.max_steps, 2 * steps_per_epoch * train.epochs)}--train.epochs {2 * train.epochs}"


def taught_little(num_right: int, num_asked: int, num_steps: int, epochs: float, max_steps: int = 0) -> str:
    """What is said at the end of a short run whose answers to its own training data are mostly wrong, or nothing.

    `max_steps` is train.max_steps, which would cap a longer run as well.
    """
    if num_steps >= ENOUGH_STEPS or num_right >= MIN_RIGHT * num_asked:
        return ""
    steps_per_epoch = num_steps / epochs
    enough, capped = _enough_epochs(steps_per_epoch), 0 < max_steps <= num_steps
    if enough > epochs:
        limit = _without_limit(max_steps, enough * steps_per_epoch)
        way = f"{limit}--train.epochs {enough} --run.resume never trains anew and longer"
    else:
        way = "more data does, without that limit" if capped else "more data does"
    way = f"--train.max_steps {max_steps} was the limit: {way}" if capped else way
    return f"{num_steps:,} steps taught little: {num_right} of {num_asked} trained questions are answered right; {way}"


def forgot(num_right: int, num_before: int, num_asked: int) -> str:
    """What is said at the end where general questions were answered right before, and mostly are not any more."""
    if num_before < MIN_KNOWN or num_right >= MIN_KEPT * num_before:
        return ""
    return (
        f"general questions are forgotten: {num_right} of {num_asked} right, {num_before} before. Ordinary rows beside "
        "yours keep them: --data.path YOURS demo/everyday.jsonl --run.resume never (docs/DATA.md); a lower --optim.lr "
        "or fewer epochs forget less, too"
    )


def _of_epochs(config: Config, num_samples: int, steps_per_epoch: int, total_steps: int) -> str:
    limit = MAX_EPOCHS_OF_MANY if num_samples >= MANY_SAMPLES else MAX_EPOCHS
    epochs = total_steps / steps_per_epoch
    if epochs <= limit or config.validate.patience or config.validate.final == "best":
        return ""
    has_held_out = config.data.validation_path or config.data.validation_fraction
    held_out = "" if has_held_out else " --data.validation_fraction 0.1"
    stop = f"--validate.patience 2 --validate.final best{held_out} ends where held-out loss no longer falls"
    usual = min(3, limit) if num_samples >= MANY_SAMPLES else 10
    return (
        f"{epochs:.3g} epochs over {num_samples:,} samples: what is seen so often is learnt by heart; "
        f"--train.epochs {usual} is usual, or {stop}"
    )

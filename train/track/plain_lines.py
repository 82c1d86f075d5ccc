"""A run in lines, for logs."""

from train.track.progress import Progress, Row
from train.track.words import duration


def plain_line(progress: Progress, row: Row, now: float) -> str:
    """All that the screen shows, on one line; `progress` has taken the row."""
    facts, step = progress.facts, row["step"]
    parts = [f"step {step}/{facts.total_steps}", f"epoch {row['epoch']:.2f}"]
    if "train/learning_rate" in row:
        smoothed = f" (smoothed {progress.smoothed.value():.4f})" if progress.first_loss is not None else ""
        parts.append((f"loss {row['train/loss']:.4f}" if "train/loss" in row else "left out") + smoothed)
    parts += _validation(progress, row)
    if "train/learning_rate" in row:
        parts.append(f"lr {row['train/learning_rate']:.2e}")
        parts += [f"grad norm {row['train/grad_norm']:.3f}"] if "train/grad_norm" in row else []
        parts.append(f"{row['perf/tokens_per_second']:,.0f} tokens/s")
    parts += [f"MFU {row['perf/mfu']:.1%}"] if "perf/mfu" in row else []
    if (peak := facts.peak_gib(row)) is not None:
        parts.append(f"{peak:.2f}{f' of {facts.planned_gib:.2f}' if facts.planned_gib else ''} GiB")
    parts += [f"checkpoint {progress.checkpoint}"] if progress.checkpoint else []
    parts += [f"{progress.failed_saves} saves failed"] if progress.failed_saves else []
    if left := progress.seconds_left(now):
        parts.append(f"{duration(left)} left")
    return "  ".join(parts)


def epoch_line(progress: Progress, row: Row) -> str:
    """The end of an epoch, or a validation, in less than a terminal's width, to stay above the screen."""
    parts = [f"epoch {row['epoch']:.2f}", f"step {row['step']}"]
    parts += [f"loss {progress.smoothed.value():.4f} smoothed"] if progress.first_loss is not None else []
    if "eval/loss" in row:
        best = progress.best_validation
        told = ", best so far" if best and best[1] == row["step"] else ""
        parts.append(f"validation {row['eval/loss']:.4f}{told}")
    return "  ".join(parts)


def _validation(progress: Progress, row: Row) -> list[str]:
    general = [f"general text {row['eval/general_loss']:.4f}"] if "eval/general_loss" in row else []
    if "eval/loss" not in row:
        return general
    told = [f"perplexity {row['eval/perplexity']:.2f}"] if "eval/perplexity" in row else []
    if best := progress.best_validation:
        told.append("best so far" if best[1] == row["step"] else f"best {best[0]:.4f} at step {best[1]}")
    return [f"validation {row['eval/loss']:.4f} ({', '.join(told + general)})"]

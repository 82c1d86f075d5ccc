"""What of a run is told outside it: an allow-list of options, and the numbers by which runs are compared."""

from collections.abc import Sequence
from typing import Any

from train.config import Config

# Sections that are sent. Paths, and any section added later, stay at home until they are named here.
SHARED_SECTIONS = ("lora", "batch", "optim", "train", "memory", "checkpoint")
KEPT = ("lora.init_from", "lora.trainable_tokens", "checkpoint.mirror")  # of these: a path, words of the data, a place
ABOUT = ("plan", "audit")  # tables of the run as a whole; others are of a step
WARM_UP_STEPS = 5  # the first of a run, in which kernels are compiled and memory is found


def shared_config(config: Config) -> dict[str, dict[str, Any]]:
    """The options that are sent, by section."""
    sections = {section: vars(getattr(config, section)).items() for section in SHARED_SECTIONS}
    return {
        section: {name: value for name, value in fields if f"{section}.{name}" not in KEPT}
        for section, fields in sections.items()
    }


def flat_config(config: Config) -> dict[str, bool | int | float | str]:
    """The same as `section.name`; lists are words with spaces between them."""
    return {
        f"{section}.{name}": " ".join(map(str, value)) if isinstance(value, tuple) else value
        for section, fields in shared_config(config).items()
        for name, value in fields.items()
    }


def table_key(name: str) -> str:
    """Under which a table is sent."""
    return f"{'run' if name in ABOUT else 'samples'}/{name}"


def plan_table(plan: dict[str, Any]) -> list[dict[str, str]]:
    """The facts of plan.json that are sent; `reason`, for one, may quote a path."""
    facts = {name: plan[name] for name in ("engine", "summary", "peak_bytes") if name in plan}
    facts |= {f"bytes of {name}": count for name, count in plan.get("parts", {}).items()}
    return [{"fact": name, "value": str(value)} for name, value in facts.items()]


def summary_of(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What a run comes to, out of the rows of metrics.jsonl; a number that the rows do not have is left out.

    Tokens a second are those of all processes over the time of their steps, without the first of the run.
    """
    steps = [row for row in rows if row["step"] > 0]
    found: dict[str, float] = {}
    validated = [row for row in steps if "eval/loss" in row]  # before the first step nothing was reached
    if validated:
        best = min(validated, key=lambda row: row["eval/loss"])
        found |= {"best/eval_loss": best["eval/loss"], "best/step": best["step"]}
    if steps:
        found |= {"total/steps": steps[-1]["step"], "total/tokens": sum(row.get("data/tokens", 0) for row in steps)}
        found |= {"total/step_seconds": round(sum(row.get("perf/step_seconds", 0.0) for row in steps), 3)}
    timed = [row for row in steps[WARM_UP_STEPS:] if row.get("perf/step_seconds")]
    if timed:
        seconds = sum(row["perf/step_seconds"] for row in timed)
        found["mean/tokens_per_second"] = round(sum(row.get("data/tokens", 0) for row in timed) / seconds, 1)
    peaks = [row["memory/peak_reserved_gib"] for row in steps if "memory/peak_reserved_gib" in row]
    if peaks:
        found["peak/reserved_gib"] = max(peaks)
    return found

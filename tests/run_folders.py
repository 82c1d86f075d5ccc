"""Run folders as training leaves them, written without training: rows, attempts, configuration and answers."""

import json
import math
import random
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from train.profiles import PROFILES
from train.run.attempts import plain

VERSIONS = {"python": "3.11.7", "torch": "2.13.0"}


def row(step: int) -> dict[str, Any]:
    """A row of metrics.jsonl; noisy, and the same for the same step."""
    noise = random.Random(step)
    return {
        "step": step,
        "epoch": step / 50,
        "train/loss": 0.5 + 4 * math.exp(-step / 40) + noise.uniform(-0.2, 0.2),
        "train/grad_norm": noise.uniform(0.5, 2),
        "train/learning_rate": 0.003 * (1 - step / 1e4),
        "perf/step_seconds": round(noise.uniform(0.2, 0.4), 4),
        "perf/tokens_per_second": round(noise.uniform(1000, 2000), 1),
        "perf/mfu": 0.3,
        "memory/peak_allocated_gib": 1.5,
        "memory/peak_reserved_gib": 1.75,
        "data/tokens": 400,
        "data/sample_ids": [1, 2],
    }


def rows_of(num_steps: int, validate_every: int = 50) -> list[dict[str, Any]]:
    """The rows of a run, one of step 0 among them, with validations, checkpoints, a skipped step and a warning."""
    rows = [{"step": 0, "epoch": 0.0, "eval/loss": 0.3}, *map(row, range(1, num_steps + 1))]
    for each in rows[validate_every::validate_every]:
        loss = 0.6 + each["train/loss"] / 2
        each |= {"eval/loss": loss, "eval/perplexity": math.exp(loss), "eval/path1/loss": loss - 0.1}
        each |= {"eval/general_loss": 3 + each["step"] / 1000, "eval/best_loss": loss, "eval/best_step": each["step"]}
    for each in rows[validate_every + 1 :: validate_every]:
        each |= {"checkpoint/step": each["step"] - 1, "perf/save_seconds": 0.1}
    skipped = rows[num_steps // 2]
    del skipped["train/loss"], skipped["train/grad_norm"]
    skipped |= {"train/skipped": 1, "warning": "loss nan; nothing was updated, the step is skipped"}
    return rows


def write_run(folder: Path, num_steps: int = 120, profile: str = "demo", **options: Any) -> Path:
    """A finished run in two attempts, resumed in the middle; `options` are `section__field=value`."""
    config = plain(asdict(PROFILES[profile]()))
    for name, value in options.items():
        section, _, field = name.partition("__")
        config[section][field] = value
    middle = num_steps // 2
    data = {"num_records": 210, "num_samples": 200, "num_training_samples": 200, "num_dropped": 10, "skipped": ["a:1"]}
    data |= {"tokens_per_epoch": 20000, "supervised_tokens_per_epoch": 9000, "steps_per_epoch": 50}
    data |= {"total_steps": num_steps, "formats": ["prompt_response"], "ignored_fields": {"id": 210}}
    weights = {"quantized": {"NF4": 1000}, "others": {"head": 50}, "type_of_others": "bf16", "total": 1050}
    start = {"versions": VERSIONS, "device": "a GPU", "num_processes": 1, "data": data, "code_version": "abc"}
    start |= {"base": {"commit": "", "weights": weights, "adapted_layers": {"q_proj": 4}}}
    end = {"code": 75, "name": "interrupted", "reason": "stopped by SIGTERM", "last_step": middle}
    lines = [
        {"attempt": 1, "event": "start", "time": "2026-01-01T10:00:00+00:00", "from_step": 0, **start},
        {"attempt": 1, "event": "end", "time": "2026-01-01T10:05:00+00:00", **end},
        {"attempt": 2, "event": "start", "time": "2026-01-01T11:00:00+00:00", "from_step": middle, **start},
        {"attempt": 2, "event": "end", "time": "2026-01-01T11:05:00+00:00", "code": 0, "name": "finished"},
    ]
    plan = {"engine": "fused", "summary": "all blocks", "is_fused": True, "micro_batch_tokens": 512}
    plan |= {"peak_bytes": 2 << 30, "parts": {"head": 1 << 30}, "validation_paths": ["held <out>.jsonl"]}
    write(folder / "config.json", config)
    write(folder / "plan.json", plan)
    write(folder / "exit.json", {"code": 0, "name": "finished", "reason": "finished"})
    write_lines(folder / "attempts.jsonl", lines)
    write_lines(folder / "metrics.jsonl", rows_of(num_steps))
    return folder


def write_answers(folder: Path, question: str = "What is AOG?", answer: str = "Aircraft on ground.") -> None:
    """What a run and `handloop compare` leave of answers, a merge's receipt, and answers while training."""
    told = {"question": question, "reference": answer, "before": "?", "after": answer}
    flags = {"exact": True, "stopped": True, "before_exact": False, "before_stopped": False}
    write(folder / "answers.json", [told | flags, told | flags | {"exact": False}])
    share = {"count": 1, "total": 2, "share": 0.5, "low": 0.095, "high": 0.905}
    figures = {"exact": share, "normalised_exact": share, "stopped": share, "f1": 0.75, "mean_tokens": 4.5}
    both = {when: {"text": answer, "exact": True, "stopped": True} for when in ("before", "after")}
    group = {"num_questions": 2, "before": figures, "after": figures, "answers": [{"question": question, **both}]}
    loss = {"before": 3.8, "after": 4.6, "difference": 0.8, "num_tokens": 1238}
    write(folder / "compare.json", {"groups": {"held_out": group, "general": group}, "losses": {"general": loss}})
    now = {"question": question, "reference": answer, "before": "?", "now": "Aircraft", "exact": False, "stopped": True}
    write_lines(folder / "validation_answers.jsonl", [{"step": 50, **now}, {"step": 100, **now, "now": answer}])
    receipt = {"mean_kl": 0.0002, "agreement": 1.0, "largest_difference": 1.5, "num_questions": 8, "equal_answers": 8}
    write(folder / "merged-dequantized" / "receipt.json", {"receipt": receipt, "merge_and_unload": receipt})
    write(folder / "export" / "receipts.json", {"files": {"model.gguf": receipt}})
    write(folder / "final" / "base.json", {"name": "owner/base", "commit": "c0ffee"})


def write(path: Path, content: Any) -> None:
    """A JSON file, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def write_lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """A file of one JSON object a line, with its folders."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(each)}\n" for each in rows), encoding="utf-8")


def damage(content: Any, noise: random.Random, share: float) -> Any:
    """The content with this share of its values, at any depth, replaced by something else."""
    if noise.random() < share:
        return noise.choice([None, "<b>x", -1, 10**400, [1], {"a": {}}, float("nan"), True])
    if isinstance(content, dict):
        return {key: damage(value, noise, share) for key, value in content.items()}
    if isinstance(content, list):
        return [damage(value, noise, share) for value in content]
    return content

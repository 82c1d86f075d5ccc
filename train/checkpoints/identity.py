"""What makes a run this run, and how a difference is told: in the words of the options, not as two hashes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from data_tools.prepare import Prepared
from train.checkpoints.extension import TOTAL
from train.config import Config, EngineConfig, LoraConfig, OptimConfig, TrainConfig
from train.data import TrainingData
from train.models.fingerprint import base_fingerprint
from train.models.initial_adapter import initial_content
from train.run.devices import compute_type

IDENTITY_SECTIONS = ("lora", "optim")  # every field of these, and the single fields named in identity()
# what earlier versions did where they had no such field
DEFAULTS = {f"lora.{name}": value for name, value in asdict(LoraConfig()).items()}
DEFAULTS |= {f"optim.{name}": value for name, value in asdict(OptimConfig()).items()}
DEFAULTS |= {"train.method": TrainConfig().method, "engine.products": EngineConfig().products}
DEFAULTS |= {"model.max_positions": 0}
# settings that the data's fingerprint covers; what a run has more of decides nothing by itself
DATA_SETTINGS = (
    "max_length",
    "truncation",
    "text_overlap",
    "format",
    "fields",
    "on_error",
    "template_arguments",
    "history",
    "empty_reasoning",
    "leave_out",
)
SAMPLES = "batch (samples in a step)"
INITIAL = "lora.init_from"  # the content of the adapter that the run started from; its place is a detail
DETAILS = "details"  # the entry that only explains a difference of another
MAX_LINES = 10  # on changed files


def identity(config: Config, prepared: Prepared, data: TrainingData, device: torch.device) -> dict[str, object]:
    """Everything that makes a run this run: a checkpoint is continued only if all of it is equal, but for DETAILS."""
    values: dict[str, object] = {
        "model.base": base_fingerprint(config),
        "model.quantization": config.model.quantization,
        "model.max_positions": config.model.max_positions,
        "model.dtype": compute_type(config.model.dtype, device).name,
        "data": prepared.fingerprint,
        "data.validation_fraction": config.data.validation_fraction,
        "data.weights": list(config.data.weights),
        "data.packing": config.data.packing,
        "data.group_by_length": config.data.group_by_length,
        SAMPLES: data.layout.samples_per_step,
        "train.method": config.train.method,
        "engine.products": config.engine.products,
        "train.seed": config.train.seed,
        TOTAL: data.total_steps(config.train),
    }
    if prepared.statistics.date:  # says why the data's fingerprint differs on another day
        values["data.date"] = prepared.statistics.date
    for section in IDENTITY_SECTIONS:
        for name, value in asdict(getattr(config, section)).items():
            values[f"{section}.{name}"] = _plain(value)
    settings = {f"data.{name}": _plain(getattr(config.data, name)) for name in DATA_SETTINGS}
    base = {f"model.{name}": getattr(config.model, name) for name in ("name_or_path", "revision", "random_init")}
    values[INITIAL] = initial_content(config)  # wherever it lies
    values[DETAILS] = {**settings, **base, INITIAL: config.lora.init_from, **prepared.parts}
    return values


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each difference; none where a checkpoint is this run's, but for the number of steps.

    An entry that an older checkpoint lacks is none: what it stands for is then in the data's fingerprint.
    """
    saved = {**{name: _plain(value) for name, value in DEFAULTS.items()}, **saved}
    details = _readable(saved.get(DETAILS)), now[DETAILS]
    told_apart = {"model.base", "data", "data.date", INITIAL, TOTAL, DETAILS}
    lines = [
        f"{name} {_shown(saved.get(name))} -> {_shown(now.get(name))}"
        for name in sorted({*saved, *now} - told_apart)
        if saved.get(name) != now.get(name)
    ]
    if saved.get("data") != now["data"]:
        lines += _of_data(saved, now, *details)
    if saved.get(INITIAL) != now[INITIAL]:
        lines += _of_initial(*details)
    if saved.get("model.base") != now["model.base"]:
        drawn_anew = now[DETAILS]["model.random_init"] and saved.get("train.seed") != now["train.seed"]
        lines += [] if drawn_anew else _of_base(*details)
    if lines and saved.get(TOTAL) != now[TOTAL]:
        lines.append(f"{TOTAL} {_shown(saved.get(TOTAL))} -> {_shown(now[TOTAL])}")
    return lines


def _readable(details: Any) -> Mapping[str, Any] | None:
    """The details of a checkpoint, which may be a stranger's: None where there are none, or of another shape."""
    if not isinstance(details, dict) or not {"tokenizer", "chat template", "preparation", "content"} <= details.keys():
        return None
    content = details["content"]
    is_list = isinstance(content, list) and all(isinstance(each, list) and len(each) == 2 for each in content)
    return details if is_list else None


def _of_initial(saved: Mapping[str, Any] | None, now: Mapping[str, Any]) -> list[str]:
    changed = _settings({INITIAL: "", **(saved or {})}, now, [INITIAL])
    return changed or [f"{INITIAL}: the adapter in {now[INITIAL]} has changed"]


def _of_base(saved: Mapping[str, Any] | None, now: Mapping[str, Any]) -> list[str]:
    names = [name for name in now if name.startswith("model.")]
    changed = _settings(saved or {}, now, names)
    return changed or ["model.base: the base's weights, or its config.json, have changed"]


def _of_data(
    saved: Mapping[str, Any], now: Mapping[str, Any], before: Mapping[str, Any] | None, after: Mapping[str, Any]
) -> list[str]:
    """Why the fingerprints of the data differ, as far as the checkpoint says what its own covers."""
    lines = _settings(saved, now, ["data.date"])
    if before is not None:
        lines += _settings(before, after, [name for name in after if name.startswith("data.")])
        lines += [f"the {name} has changed" for name in ("tokenizer", "chat template") if before[name] != after[name]]
        if before["preparation"] != after["preparation"]:
            lines.append("this version of Handloop makes other samples of the same data")
        lines += _of_content(before["content"], after["content"])
    why = "" if before else "; this checkpoint, perhaps of an earlier version, does not say which of them"
    return lines or [f"data: the content, the tokenizer, the chat template or a setting of the data has changed{why}"]


def _of_content(before: Sequence[Sequence[str]], after: Sequence[Sequence[str]]) -> list[str]:
    """What has changed in which of data.path, each a (name, hash)."""
    lines = []
    for (old, old_hash), (new, new_hash) in zip(before, after, strict=False):
        if old_hash != new_hash:
            lines.append(f"the content of {new} has changed" if old == new else f"data.path {old} -> {new}")
    if len(before) != len(after):
        lines.append(f"data.path has {len(before)} entries in the checkpoint, {len(after)} now")
    more = [f"and {len(lines) - MAX_LINES} more of data.path"] if len(lines) > MAX_LINES else []
    return lines[:MAX_LINES] + more


def _settings(before: Mapping[str, Any], after: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    both = [name for name in names if name in before and name in after]
    return [f"{name} {_shown(before[name])} -> {_shown(after[name])}" for name in both if before[name] != after[name]]


def _shown(value: Any) -> str:
    if isinstance(value, list):
        value = " ".join(map(str, value))
    return "(none)" if value in ("", None) else str(value)


def _plain(value: Any) -> Any:
    """As JSON gives it back."""
    return list(value) if isinstance(value, tuple) else value

"""A run continues only if its identity is equal: each difference is refused by name."""

import json
import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.compare_runs import at, change_states
from tests.conftest import Outcome, arguments, run_command
from tests.tally import Tally
from train.config import Config

# (option, changed value, the name in the refusal)
CHANGES: list[tuple[str, Any, str]] = [
    ("optim.lr", 0.02, "optim.lr"),
    ("train.seed", 1, "train.seed"),
    ("lora.r", 2, "lora.r"),
    ("batch.per_device", 4, "batch (samples in a step)"),
    ("data.max_length", 96, "data.max_length"),
    ("optim.name", "adamw", "optim.name"),
    ("optim.schedule", "cosine", "optim.schedule"),
    ("optim.warmup", 3, "optim.warmup"),
    ("optim.weight_decay", 0.1, "optim.weight_decay"),
    ("optim.max_grad_norm", 0.5, "optim.max_grad_norm"),
    ("lora.alpha", 16, "lora.alpha"),
    ("lora.dropout", 0.2, "lora.dropout"),
    ("lora.target_modules", ("q_proj",), "lora.target_modules"),
    ("lora.rslora", True, "lora.rslora"),
    ("lora.modules_to_save", ("lm_head",), "lora.modules_to_save"),
    ("optim.lora_plus_ratio", 2.0, "optim.lora_plus_ratio"),
    ("batch.accumulation", 2, "batch (samples in a step)"),
    ("data.validation_fraction", 0.2, "data.validation_fraction"),
    ("data.packing", True, "data.packing"),
    ("data.group_by_length", True, "data.group_by_length"),
    ("data.weights", (2.0,), "data.weights"),
    ("data.truncation", "left", "data.truncation"),
    ("model.quantization", "none", "model.quantization"),
    ("model.dtype", "bf16", "model.dtype"),
    ("model.max_positions", 1024, "model.max_positions"),
    ("data.text_overlap", 0.25, "data.text_overlap"),
    ("data.format", "prompt_response", "data.format"),
    ("data.fields", ("prompt=prompt", "response=response"), "data.fields"),
    ("data.on_error", "skip", "data.on_error"),
    ("data.history", "last", "data.history"),
    ("data.empty_reasoning", "train", "data.empty_reasoning"),
    ("data.leave_out", ("system",), "data.leave_out"),
]


def changed(config: Config, option: str, value: Any) -> Config:
    """The configuration with one field changed."""
    section, name = option.split(".")
    return replace(config, **{section: replace(getattr(config, section), **{name: value})})


def told(outcome: Outcome) -> list[str]:
    """The differences that a refusal names."""
    return [line.strip() for line in outcome.stderr.splitlines() if line.startswith("  ")]


def shown(option: str, value: Any, config: Config) -> str:
    """The value as the refusal shows it; a batch counts its samples."""
    if option.startswith("batch."):
        batch = {"per_device": config.batch.per_device, "accumulation": config.batch.accumulation}
        return str(math.prod({**batch, option.partition(".")[2]: value}.values()))
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


@pytest.mark.fault("T22")
def test_each_difference_is_named(config: Config, tmp_path: Path, tally: Tally) -> None:
    """A change of any one field of the identity is exit 77, and only that field is named, with old and new value."""
    config = at(replace(config, train=replace(config.train, max_steps=4)), tmp_path / "run")
    assert run_command(arguments(config)).returncode == 0
    for option, value, name in CHANGES[: tally.times(3, len(CHANGES))]:
        outcome = run_command(arguments(changed(config, option, value)))
        differing = told(outcome)
        tally.check(outcome.returncode == 77, f"{option}: {outcome.returncode} {outcome.stderr[-300:]}")
        known = (*{name for _, _, name in CHANGES}, "total optimizer steps")
        names = {next((each for each in known if line.startswith(f"{each} ")), line) for line in differing}
        allowed = {name, "total optimizer steps"} if option.startswith(("batch", "data")) else {name}
        tally.check(name in names and names <= allowed, f"{option}: {differing}")
        tally.check(
            any(line.endswith(f"-> {shown(option, value, config)}") for line in differing), f"{option}: {differing}"
        )
        tally.check("loading" not in outcome.stdout, f"{option}: refused only after the base was loaded")


@pytest.mark.fault("T22")
def test_a_changed_file_is_another_run(config: Config, shape: Path, tmp_path: Path, tally: Tally) -> None:
    """Another byte of data, template or tokenizer, or another field of config.json, is exit 77, in words."""
    folder, data = tmp_path / "base", tmp_path / "pairs.jsonl"
    shutil.copytree(shape, folder)
    shutil.copy(config.data.path[0], data)
    config = replace(config, model=replace(config.model, name_or_path=str(folder)))
    config = at(replace(config, data=replace(config.data, path=(str(data),))), tmp_path / "run")
    config = replace(config, train=replace(config.train, max_steps=4))
    assert run_command(arguments(config)).returncode == 0
    template, tokenizer = folder / "chat_template.jinja", folder / "tokenizer.json"

    def other_rope() -> None:
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | {"rms_norm_eps": 1e-4}))

    def other_pieces() -> None:
        values = json.loads(tokenizer.read_text())
        merges = values["model"]["merges"]
        merges[-1], merges[-2] = merges[-2], merges[-1]
        tokenizer.write_text(json.dumps(values))

    edits = {
        f"the content of {data} has changed": lambda: data.write_text(data.read_text().replace("bolt", "bold", 1)),
        "the chat template has changed": lambda: template.write_text(template.read_text() + " "),
        "the tokenizer has changed": other_pieces,
        "model.base: the base's weights, or its config.json, have changed": other_rope,
    }
    for wanted, edit in edits.items():
        kept = {path: path.read_bytes() for path in (data, template, tokenizer, folder / "config.json")}
        edit()
        outcome = run_command(arguments(config))
        tally.check(outcome.returncode == 77, f"{wanted}: {outcome.returncode} {outcome.stderr[-300:]}")
        tally.check(told(outcome) == [wanted], f"{wanted}: {outcome.stderr[-300:]}")
        for path, content in kept.items():
            path.write_bytes(content)
    tally.check(run_command(arguments(config)).returncode == 0, "unchanged again, and refused")


@pytest.mark.fault("T22")
def test_what_decides_nothing_is_no_difference(config: Config, tmp_path: Path, tally: Tally) -> None:
    """The same file elsewhere, and a base of the same content elsewhere, are the same run; another file is named."""
    config = at(replace(config, train=replace(config.train, max_steps=4)), tmp_path / "run")
    assert run_command(arguments(config)).returncode == 0
    copy, other = tmp_path / "copy.jsonl", tmp_path / "other.jsonl"
    shutil.copy(config.data.path[0], copy)
    shutil.copytree(config.model.name_or_path, tmp_path / "base")
    moved = replace(config, data=replace(config.data, path=(str(copy),)))
    moved = replace(moved, model=replace(moved.model, name_or_path=str(tmp_path / "base")))
    tally.check(run_command(arguments(moved)).returncode == 0, "moved files are refused")
    other.write_text(copy.read_text().replace("bolt", "bold", 1))
    outcome = run_command(arguments(changed(config, "data.path", (str(other),))))
    tally.check(told(outcome) == [f"data.path {config.data.path[0]} -> {other}"], outcome.stderr[-300:])
    outcome = run_command(arguments(changed(config, "data.path", (str(copy), str(other)))))
    tally.check("data.path has 1 entries in the checkpoint, 2 now" in told(outcome), outcome.stderr[-300:])


@pytest.mark.fault("T22")
def test_a_checkpoint_that_does_not_say_what_its_data_was(config: Config, tmp_path: Path, tally: Tally) -> None:
    """One of an earlier version, with the hash of its data alone, is continued; another hash is refused in words."""
    config = at(replace(config, train=replace(config.train, max_steps=4)), tmp_path / "run")
    assert run_command(arguments(config)).returncode == 0

    def as_before(state: dict[str, Any]) -> None:
        del state["identity"]["details"], state["schedule"], state["versions"]["CPU threads"]
        later = ("rslora", "init_from", "trainable_tokens", "modules_to_save")
        for name in (*(f"lora.{option}" for option in later), "optim.lora_plus_ratio"):
            del state["identity"][name]

    def of_another_shape(state: dict[str, Any]) -> None:
        state["identity"]["details"] = {"tokenizer": 1, "chat template": [], "preparation": None, "content": [3]}

    for change in (of_another_shape, as_before):
        change_states(tmp_path / "run", change)
        outcome = run_command(arguments(changed(config, "data.max_length", 96)))
        tally.check(outcome.returncode == 77, outcome.stderr[-300:])
        why = "data: the content, the tokenizer, the chat template or a setting of the data has changed"
        tally.check(why in outcome.stderr and "does not say which" in outcome.stderr, outcome.stderr[-300:])
    tally.check(run_command(arguments(config)).returncode == 0, "an older checkpoint is refused")


@pytest.mark.fault("T22")
def test_the_number_of_threads_is_said(config: Config, tmp_path: Path, tally: Tally) -> None:
    """Resumed on a CPU with another number of threads than the checkpoint's, a run says so as for versions."""
    config = at(replace(config, train=replace(config.train, max_steps=4)), tmp_path / "run")
    assert run_command(arguments(config)).returncode == 0
    same = run_command(arguments(config))
    tally.check("the last bits may differ" not in same.stdout, same.stdout)
    other = run_command(arguments(config), SetThreads(2))
    said = "versions have changed since the checkpoint, so the last bits may differ: CPU threads 1 -> 2"
    tally.check(other.returncode == 0 and said in other.stdout, other.stdout)


@dataclass(frozen=True)
class SetThreads:
    """As OMP_NUM_THREADS does, which a forked process reads no more."""

    number: int

    def __call__(self) -> None:
        torch.set_num_threads(self.number)

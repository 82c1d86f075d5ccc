"""A run continues only if its identity is equal: each difference is refused by name."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.compare_runs import at
from tests.conftest import arguments, run_command
from tests.tally import Tally
from train.config import Config

# (option, changed value, the name in the refusal)
CHANGES: list[tuple[str, Any, str]] = [
    ("optim.lr", 0.02, "optim.lr"),
    ("train.seed", 1, "train.seed"),
    ("lora.r", 2, "lora.r"),
    ("batch.per_device", 4, "batch (samples in a step)"),
    ("data.max_length", 96, "data"),
    ("train.epochs", 1, "total optimizer steps"),
    ("optim.name", "adamw", "optim.name"),
    ("optim.schedule", "cosine", "optim.schedule"),
    ("optim.warmup", 3, "optim.warmup"),
    ("optim.weight_decay", 0.1, "optim.weight_decay"),
    ("optim.max_grad_norm", 0.5, "optim.max_grad_norm"),
    ("lora.alpha", 16, "lora.alpha"),
    ("lora.dropout", 0.2, "lora.dropout"),
    ("lora.target_modules", ("q_proj",), "lora.target_modules"),
    ("batch.accumulation", 2, "batch (samples in a step)"),
    ("data.validation_fraction", 0.2, "data.validation_fraction"),
    ("data.packing", True, "data.packing"),
    ("data.group_by_length", True, "data.group_by_length"),
    ("data.weights", (2.0,), "data.weights"),
    ("data.truncation", "left", "data"),
    ("model.quantization", "none", "model.quantization"),
    ("model.dtype", "bf16", "model.dtype"),
    ("train.max_steps", 5, "total optimizer steps"),
]


def changed(config: Config, option: str, value: Any) -> Config:
    """The configuration with one field changed."""
    section, name = option.split(".")
    return replace(config, **{section: replace(getattr(config, section), **{name: value})})


@pytest.mark.fault("T22")
def test_each_difference_is_named(config: Config, tmp_path: Path, tally: Tally) -> None:
    """A change of any one field of the identity is exit 77, and only that field is named, with old and new value."""
    config = at(replace(config, train=replace(config.train, max_steps=4)), tmp_path / "run")
    assert run_command(arguments(config)).returncode == 0
    for option, value, name in CHANGES[: tally.times(5, len(CHANGES))]:
        outcome = run_command(arguments(changed(config, option, value)))
        differing = [line.strip() for line in outcome.stderr.splitlines() if " in the checkpoint, " in line]
        tally.check(outcome.returncode == 77, f"{option}: {outcome.returncode} {outcome.stderr[-300:]}")
        names = {line.partition(": ")[0] for line in differing}
        allowed = {name, "total optimizer steps"} if option.startswith(("batch", "data")) else {name}
        if option == "train.seed":
            allowed.add("model.base")  # its random weights come from the seed
        tally.check(name in names and names <= allowed, f"{option}: {differing}")
        tally.check("loading" not in outcome.stdout, f"{option}: refused only after the base was loaded")


@pytest.mark.fault("T22")
def test_a_changed_file_is_another_run(config: Config, shape: Path, tmp_path: Path, tally: Tally) -> None:
    """Another byte of the data or the chat template, or another field of config.json, is exit 77."""
    folder, data = tmp_path / "base", tmp_path / "pairs.jsonl"
    shutil.copytree(shape, folder)
    shutil.copy(config.data.path[0], data)
    config = replace(config, model=replace(config.model, name_or_path=str(folder)))
    config = at(replace(config, data=replace(config.data, path=(str(data),))), tmp_path / "run")
    config = replace(config, train=replace(config.train, max_steps=4))
    assert run_command(arguments(config)).returncode == 0
    template = folder / "chat_template.jinja"

    def other_rope() -> None:
        values = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(values | {"rms_norm_eps": 1e-4}))

    edits = {
        "data": lambda: data.write_text(data.read_text().replace("bolt", "bold", 1)),
        "template": lambda: template.write_text(template.read_text() + " "),
        "base": other_rope,
    }
    for what, edit in edits.items():
        kept = {path: path.read_bytes() for path in (data, template, folder / "config.json")}
        edit()
        outcome = run_command(arguments(config))
        wanted = "model.base" if what == "base" else "data"
        tally.check(outcome.returncode == 77, f"{what}: {outcome.returncode} {outcome.stderr[-300:]}")
        tally.check(f"  {wanted}: " in outcome.stderr, f"{what}: {outcome.stderr[-300:]}")
        for path, content in kept.items():
            path.write_bytes(content)
    tally.check(run_command(arguments(config)).returncode == 0, "unchanged again, and refused")

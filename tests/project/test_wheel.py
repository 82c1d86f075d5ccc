"""A wheel holds what a user needs, and works where there is no checkout."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.project.sources import SOURCES

BUNDLED = (
    *("demo/base/config.json", "demo/base/generation_config.json", "demo/base/model.safetensors"),
    *("demo/base/tokenizer.json", "demo/base/tokenizer_config.json", "demo/base/chat_template.jinja"),
    *("demo/glossary.csv", "demo/glossary.jsonl", "demo/held_out.jsonl"),
    *("demo/general.txt", "demo/general_questions.jsonl"),
)
QUICK = (
    *("--train.max_steps", "2", "--compare.num_questions", "2", "--compare.max_new_tokens", "4"),
    *("--validate.at_start", "false", "--validate.num_questions", "0", "--track.wandb", "off"),
)


@pytest.mark.slow
def test_a_wheel_trains_from_any_folder(tmp_path: Path) -> None:
    """It holds all modules and what is bundled, nothing else, and trains the demo with files of its own."""
    project, wheels, target, elsewhere = (tmp_path / name for name in ("project", "wheels", "target", "elsewhere"))
    elsewhere.mkdir()
    # a copy, because a folder build/ that an earlier build has left would go into the wheel
    for name in ("train", "data_tools", "demo", "accelerate_configs"):
        shutil.copytree(ROOT / name, project / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, project / name)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    alone = ("--no-deps", "--no-index")
    subprocess.run([*pip, "wheel", *alone, "--no-build-isolation", "-w", wheels, project], check=True)
    (wheel,) = wheels.glob("*.whl")
    subprocess.run([*pip, "install", *alone, "--target", target, wheel], check=True)

    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    wanted = {path.relative_to(ROOT).as_posix() for path in SOURCES} | {"train/report/page.html"}
    configurations = {f"accelerate_configs/{path.name}" for path in (ROOT / "accelerate_configs").iterdir()}
    wanted |= {f"train/bundled_files/{name}" for name in configurations | set(BUNDLED)}
    assert wanted <= names, wanted - names
    others = {name for name in names - wanted if not name.startswith("train/bundled_files/demo/")}
    assert not others  # a profile may bring files of its own in demo/

    command = [str(target / "bin" / "handloop"), "train", "--profile", "demo", *QUICK, "--json"]
    environment = {**os.environ, "PYTHONPATH": str(target)}
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["code"], told["name"], told["reason"]) == (0, "finished", "finished")
    assert (told["step"], told["run"]) == (2, str(elsewhere / "runs" / "demo"))
    assert told["answers"]["held_out"]["total"] == 2
    config = json.loads((elsewhere / "runs" / "demo" / "config.json").read_text())
    for path in (config["model"]["name_or_path"], *config["data"]["path"], *config["data"]["validation_path"]):
        assert Path(path).is_relative_to(target / "train" / "bundled_files"), path
    assert str(ROOT) not in (elsewhere / "runs" / "demo" / "config.json").read_text()

"""Every foreseen mistake is exit 78 with one message that says what to do, no traceback and no partial files."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import ROOT, arguments, run_command
from train.config import Config
from train.track.metrics_file import read_metrics

CASES = {
    "missing file": (["--data.path", "gone.jsonl"], ["gone.jsonl: no such file or folder"]),
    "empty file": (["--data.path", "{tmp}/empty.jsonl"], ["empty.jsonl: the file is empty"]),
    "broken line": (["--data.path", "{tmp}/broken.jsonl"], ["broken.jsonl:2: not JSON"]),
    "wrong fields": (
        ["--data.path", "{tmp}/fields.jsonl"],
        ["fields.jsonl:1: unknown fields (question, response); known are "],
    ),
    "no model": (["--model.name_or_path", "{tmp}"], ["--model.name_or_path", "name a folder"]),
    "unreachable model": (
        ["--model.name_or_path", "nobody/nothing"],
        ["nobody/nothing", "HF_HUB_OFFLINE is set; unset it"],
    ),
    "no such layer": (["--lora.target_modules", "w_q"], ["--lora.target_modules", "w_q"]),
    "no template": (["--data.chat_template", "gone.jinja"], ["--data.chat_template", "No such file", "gone.jinja"]),
    "impossible split": (["--data.validation_fraction", "0.001"], ["--data.validation_fraction 0.001"]),
}


@pytest.mark.parametrize("name", CASES)
def test_bad_data_and_models(name: str, config: Config, tmp_path: Path) -> None:
    """Unusable data and models are named, with the option or the line."""
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": \n')
    (tmp_path / "fields.jsonl").write_text('{"question": "a", "response": "b"}\n')
    changed, expected = CASES[name]
    words = arguments(config)
    option = changed[0]
    if option in words:
        position = words.index(option)
        following = next((i for i in range(position + 1, len(words)) if words[i].startswith("--")), len(words))
        del words[position:following]
    outcome = run_command([*words, option, changed[1].format(tmp=tmp_path)])
    assert outcome.returncode == 78, outcome.stdout + outcome.stderr
    for part in expected:
        assert part in outcome.stderr
    assert "Traceback" not in outcome.stdout + outcome.stderr
    run_dir = Path(config.run.dir)
    assert json.loads((run_dir / "exit.json").read_text())["code"] == 78
    assert {path.name for path in run_dir.iterdir()} <= {"exit.json", ".lock"}


@pytest.mark.parametrize("profile", ["a100", "4gb", "qwen3_4b_4gb", "multi_gpu"])
def test_a_gpu_profile_without_a_gpu(profile: str, tmp_path: Path) -> None:
    """Without a GPU the run ends before anything else is tried, and says what runs without one."""
    words = ["--profile", profile, "--run.dir", str(tmp_path / "run")]
    outcome = run_command(words, CUDA_VISIBLE_DEVICES="")
    assert outcome.returncode == 78
    assert "needs a CUDA GPU" in outcome.stderr
    assert "--profile demo" in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_the_launch_scripts_return_the_real_exit_code() -> None:
    """launch/*.sh return 78, where accelerate launch returns 1."""
    script = ["bash", str(ROOT / "launch" / "demo.sh"), "--tiny", "--optim.lrr", "1"]  # not tiny, it may fetch a base
    outcome = subprocess.run(script, capture_output=True, text=True, timeout=300)
    assert outcome.returncode == 78, outcome.stderr
    assert "did you mean --optim.lr?" in outcome.stderr
    assert "Traceback" not in outcome.stderr


def test_accumulation_in_the_accelerate_configuration_is_refused(config: Config) -> None:
    """Only the profile sets it; another value in the accelerate configuration would be ignored."""
    outcome = run_command(arguments(config), ACCELERATE_GRADIENT_ACCUMULATION_STEPS="16")
    assert outcome.returncode == 78
    assert "gradient_accumulation_steps 16" in outcome.stderr


def test_a_loss_that_is_not_a_number_stops_the_run(config: Config, tmp_path: Path) -> None:
    """With a far too large learning rate three steps are skipped, then exit 79 names the samples."""
    words = [*arguments(config), "--checkpoint.every", "1"]
    position = words.index("--optim.lr")
    words[position + 1] = "1e30"
    words = [word for i, word in enumerate(words) if word != "epoch" and words[min(i + 1, len(words) - 1)] != "epoch"]
    outcome = run_command(words)
    assert outcome.returncode == 79, outcome.stdout + outcome.stderr
    assert "pairs.jsonl:" in outcome.stderr
    rows = read_metrics(Path(config.run.dir) / "metrics.jsonl")
    assert [row["step"] for row in rows if "train/loss" not in row] == [
        row["step"] for row in rows if "train/skipped" in row
    ]
    assert all(math.isfinite(row.get("train/loss", 0.0)) for row in rows)


def test_python_can_run_the_file_directly(tmp_path: Path) -> None:
    """Without accelerate launch, the command prints its message and returns its own exit code."""
    command = [sys.executable, str(ROOT / "train" / "main.py"), "--profile", "nope"]
    outcome = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=120)
    assert outcome.returncode == 78
    assert "unknown profile 'nope'" in outcome.stderr


def test_the_trainer_runs_the_audit_first(config: Config, tmp_path: Path) -> None:
    """Validation data that is also trained on is exit 78 before loading; with data.gate warn it is a warning."""
    leaking = replace(config, data=replace(config.data, validation_path=config.data.path))
    outcome = run_command(arguments(leaking))
    assert outcome.returncode == 78
    assert "validation rows are also training rows" in outcome.stderr
    assert "--data.gate warn" in outcome.stderr
    assert "loading" not in outcome.stdout
    outcome = run_command(arguments(replace(leaking, data=replace(leaking.data, gate="warn"))))
    assert outcome.returncode == 0, outcome.stderr
    assert "validation rows are also training rows" in outcome.stdout


def test_mistakes_are_found_before_loading(config: Config, tmp_path: Path) -> None:
    """W&B online without a key, a misspelled --run.resume or a missing folder is 78 before anything is loaded."""
    nothing = {"WANDB_API_KEY": "", "NETRC": str(tmp_path / "none"), "WANDB_MODE": "", "HOME": str(tmp_path)}
    online = replace(config, track=replace(config.track, wandb="online"))
    misspelled = replace(config, run=replace(config.run, resume="musst"))
    gone = replace(config, model=replace(config.model, name_or_path=str(tmp_path / "gone")))
    for changed, part in (
        (online, "there is no key"),
        (misspelled, "write auto, must, never"),
        (gone, "no such folder"),
    ):
        outcome = run_command(arguments(changed), **nothing)
        assert outcome.returncode == 78, outcome.stderr
        assert part in outcome.stderr
        assert "loading" not in outcome.stdout

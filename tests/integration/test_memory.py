"""Streamed runs from the command line to the answers, and the output of `handloop plan`."""

import json
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.compare_runs import at, reference, result_of
from tests.conftest import Run, arguments, run_command
from train.commands.handloop import main as command
from train.commands.probe import format_probe
from train.config import CheckpointConfig, CompareConfig, Config, EngineConfig, LoraConfig
from train.memory.gpus import KNOWN_GPUS
from train.memory.reference import engine_lines


@pytest.fixture
def asked(config: Config) -> Config:
    """A fused run with dropout, validation, a checkpoint after every step and two questions at the end."""
    return replace(
        config,
        lora=LoraConfig(r=4, dropout=0.1),
        data=replace(config.data, validation_fraction=0.2),
        checkpoint=CheckpointConfig(every=1),
        compare=CompareConfig(num_questions=2, max_new_tokens=8),
        engine=EngineConfig(kind="fused"),
    )


def test_a_streamed_run_that_is_killed_ends_in_the_resident_bits(asked: Config, tmp_path: Path) -> None:
    """A streamed run, killed twice and resumed, has the losses, tensors and answers of a resident run."""
    expected = reference(asked, tmp_path / "resident")
    streamed = replace(asked, memory=replace(asked.memory, offload="stream"))
    run_dir = tmp_path / "streamed"
    words = arguments(at(streamed, run_dir))
    for number in (1, 3):
        run = Run(words)
        while run.is_alive() and not (run_dir / "checkpoints" / f"step-{number:010d}").exists():
            time.sleep(0.002)
        run.signal(signal.SIGKILL)
        assert run.wait().returncode == -signal.SIGKILL
    outcome = run_command(words)
    assert outcome.returncode == 0, outcome.stderr
    assert "2 blocks' weights are streamed from host memory" in outcome.stdout
    assert "continues after step" in outcome.stdout
    assert result_of(run_dir) == expected
    answers = [json.loads((folder / "answers.json").read_text()) for folder in (run_dir, tmp_path / "resident")]
    assert answers[0] == answers[1]
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert any("eval/loss" in row for row in rows)


def plan(config: Config, *words: str) -> list[str]:
    """The command line of `handloop plan` for the tiny shape on a GPU."""
    length = [] if "--data.max_length" in words else ["--data.max_length", "128"]
    return ["plan", "--profile", "a100", "--model.name_or_path", config.model.name_or_path, *length, *words]


def test_the_plan_of_a_run_is_told(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    """By component, or without a GPU a line for each known one; exit 0 where it fits."""
    assert command(plan(config, "--gpu", "4GiB")) == 0
    told = capsys.readouterr().out
    for part in ("packed weights", "working memory", "predicted peak", "nothing is streamed", "speed     unknown"):
        assert part in told
    assert "H200" not in told
    assert command(plan(config)) == 0
    assert "H200" in capsys.readouterr().out
    assert command(plan(config, "--gpu", "A100-40", "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["gpu"] == "A100-40"
    assert found["fits"]
    assert found["predicted_tokens_per_second"] > 0
    assert sum(found["parts_gib"].values()) == pytest.approx(found["predicted_peak_gib"], abs=1e-3)
    assert [each["gpu"] for each in found["gpus"]] == [gpu.name for gpu in KNOWN_GPUS]


def test_what_does_not_fit_is_78(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that does not fit is exit 78, with what would fit."""
    assert command(plan(config, "--memory.budget", "1MiB", "--lora.r", "64")) == 78
    told = capsys.readouterr().out
    assert "does not fit: " in told
    assert "What would fit: " in told


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--gpu", "huge"), "write a size such as 4GiB, or one of B200"),
        (("--gpu", "0GiB"), "CUDA itself takes 0.45 GiB of a GPU"),
        (("--gpu", "T4", "--model.dtype", "bf16"), "compute capability 7.5 has no bf16"),
        (("--gpu", "T4", "--probe"), "a probe runs on the GPU that is here"),
        (("--steps", "3"), "only --probe runs steps"),
        (("--data.max_length", "513"), "was made for 512 at most"),
        (("--mean-length", "129"), "rows hold at most data.max_length"),
        (("--model.quantization", "int8"), "transformers and PEFT (int8 layers round their inputs"),
        (("--memory.offload", "stream", "--engine.kind", "reference"), "only the fused engine streams"),
        (("--engine.products", "fp8", "--gpu", "A100-80"), "compute capability 8.0 has no fp8 products"),
        (("--engine.products", "fp8", "--engine.kind", "reference"), "only the fused engine has them"),
        (("--engine.products", "fp8", "--model.quantization", "none"), "they are those of NF4 weights; use nf4"),
        (("--engine.products", "fp8", "--model.dtype", "fp16"), "fp8 products give bf16; use auto"),
        (("--probe",), "needs a CUDA GPU"),
        (("--steps", "0"), "'0' is not a positive integer"),
    ],
)
def test_what_cannot_be_planned_is_78(
    words: tuple[str, ...], message: str, config: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    """Impossible options are exit 78 with one message."""
    assert command(plan(config, *words)) == 78
    assert message in capsys.readouterr().err


def test_a_probe_is_told_beside_its_prediction() -> None:
    """Prediction and measurement are printed side by side; the reference engine has no prediction."""
    measured = {
        "gpu": "H",
        "plan": "P",
        "engine": [],
        "predicted_peak_gib": 3.5,
        "peak_gib": 3.33,
        "reserved_gib": 3.6,
        "predicted_seconds": 0.765,
        "seconds": 0.753,
        "tokens_per_second": 10885.1,
        "host_gib": 6.2,
        "load_seconds": 2.8,
    }
    told = format_probe(measured)
    assert "     3.50      3.33" in told
    assert "    0.765     0.753" in told
    assert "10,885" in told
    assert "not predicted" not in told
    reference = format_probe(measured | {"predicted_peak_gib": 0.0, "engine": engine_lines("why", ["padded rows"])})
    assert reference.startswith("engine    transformers and PEFT (why)\n          padded rows\nH: P\n")
    assert "not predicted" in reference

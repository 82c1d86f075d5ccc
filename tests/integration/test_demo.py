"""The demo is the main job and does what the README says."""

import json
import os
import resource
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT, thorough
from train.track.metrics_file import read_metrics


def a_part(folder: Path) -> list[str]:
    """The options of a demo on 12 terms of the real demo's 36, with more epochs and fewer validations and saves."""
    trained, held_out = (
        (ROOT / "demo" / f"certification{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        for name in ("", "_held_out")
    )
    held_out = held_out[12:24]
    terms = {json.loads(row)["response"] for row in held_out}
    trained = [row for row in trained if json.loads(row)["response"] in terms]
    for name, rows in (("trained", trained), ("held_out", held_out)):
        (folder / f"{name}.jsonl").write_text("".join(rows), encoding="utf-8")
    words = ["--data.path", str(folder / "trained.jsonl"), "--data.validation_path", str(folder / "held_out.jsonl")]
    return [*words, *["--train.epochs", "20", "--validate.every", "50", "--checkpoint.every", "50"]]


@pytest.mark.parametrize(
    ("is_whole", "count", "minutes"),
    [(False, 36, 1.0), pytest.param(True, 150, 5.0, marks=thorough)],
    ids=["smaller", "whole"],
)
def test_the_tiny_demo_learns_every_answer_and_stops(
    is_whole: bool, count: int, minutes: float, tmp_path: Path
) -> None:
    """bash launch/demo.sh --tiny: no answer is exact before, 95 % are exact and end after, many of those held out."""
    run_dir = tmp_path / "demo"
    words = [] if is_whole else a_part(tmp_path)
    # one thread, as all tests have, where others run beside it; as many as the launcher chooses where it is the demo
    left_out = {"OMP_NUM_THREADS"} if is_whole else set()
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    environment |= {
        "HF_HUB_OFFLINE": "1",
        "WANDB_API_KEY": "",
        "NETRC": str(tmp_path / "none"),
        "WANDB_MODE": "offline",
    }
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = before.ru_utime + before.ru_stime
    outcome = subprocess.run(
        ["bash", str(ROOT / "launch" / "demo.sh"), "--tiny", "--run.dir", str(run_dir), *words],
        capture_output=True,
        text=True,
        env=environment,
        timeout=900,
    )
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = used.ru_utime + used.ru_stime - began
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    answers = json.loads((run_dir / "answers.json").read_text())
    assert len(answers) >= count
    assert len({answer["question"] for answer in answers}) == len(answers)
    assert not any(answer["before_exact"] or answer["before"] == answer["reference"] for answer in answers)
    good = [a for a in answers if a["exact"] and a["stopped"] and a["after"] == a["reference"]]
    assert len(good) >= 0.95 * len(answers), [a["question"] for a in answers if a not in good]
    assert cpu_seconds < 2 * 60 * minutes, (
        "of 2 cores, in CPU time, waiting threads that spin too: wall time depends on other load"
    )
    rows = read_metrics(run_dir / "metrics.jsonl")
    losses = [row["train/loss"] for row in rows if row["step"]]
    assert losses[-1] < 0.2 < 5 < losses[0]
    assert "eval/loss" in rows[-1]
    held_out = json.loads((run_dir / "answers_held_out.json").read_text())
    assert len(held_out) >= count // 4
    assert {a["question"] for a in held_out}.isdisjoint(a["question"] for a in answers)
    understood = sum(a["exact"] for a in held_out) / len(held_out)
    assert 0.4 < understood < 0.95
    for part in ("before: 0 of", "handloop sync", "samples per step", "handloop compare"):
        assert part in outcome.stdout
    assert "Traceback" not in outcome.stdout + outcome.stderr

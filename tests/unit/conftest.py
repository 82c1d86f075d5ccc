"""A small finished run of the bundled base, for the commands that take one."""

import json
from pathlib import Path

import pytest

from tests.conftest import BUNDLED_BASE, run_command

MAX_NEW_TOKENS = 12
NUM_ASKED = 6


@pytest.fixture(scope="session")
def finished_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder; its data, pairs.jsonl and held_out.jsonl, lie beside it. The adapters change every answer."""
    folder = tmp_path_factory.mktemp("finished")
    for name, numbers in (("pairs", range(19)), ("held_out", range(19, 26))):
        rows = [{"prompt": f"What is part {i}?", "response": f"A bolt of {i} grams."} for i in numbers]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--profile", "demo", "--model.name_or_path", str(BUNDLED_BASE), "--run.dir", str(folder / "run")]
    words += ["--data.path", str(folder / "pairs.jsonl"), "--data.validation_path", str(folder / "held_out.jsonl")]
    words += ["--train.epochs", "4", "--optim.warmup", "0", "--track.wandb", "off", "--data.gate", "warn"]
    words += ["--compare.num_questions", str(NUM_ASKED), "--compare.max_new_tokens", str(MAX_NEW_TOKENS)]
    outcome = run_command(words)
    assert outcome.returncode == 0, outcome.stderr
    return folder / "run"

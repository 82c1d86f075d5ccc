"""What a real run leaves is what the serving scripts read."""

import json
from pathlib import Path

from launch.serving import Adapter, find, make_command
from tests.compare_runs import at
from tests.conftest import arguments, run_command
from train.config import Config


def test_a_finished_run_can_be_served(config: Config, tmp_path: Path) -> None:
    """Base, rank, end tokens, chat template and how the base was held are found in final/."""
    run = tmp_path / "mine"
    outcome = run_command(arguments(at(config, run)))
    assert outcome.returncode == 0, outcome.stderr
    found = find(run, "")
    assert isinstance(found, Adapter)
    assert (found.base, found.commit, found.held, found.rank) == (config.model.name_or_path, "", "NF4", config.lora.r)
    assert found.end_token_ids == json.loads((run / "final" / "generation_config.json").read_text())["eos_token_id"]
    assert found.end_token_ids
    command, notes, _ = make_command(["vllm", str(run), "--dry-run"])
    assert {"--chat-template", "--generation-config", "--tokenizer"} <= set(command)
    assert "in NF4" in notes[0]
    command, _, _ = make_command(["sglang", str(run), "--dry-run"])
    assert {"--chat-template", "--json-model-override-args"} <= set(command)

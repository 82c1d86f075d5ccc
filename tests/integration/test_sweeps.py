"""launch/sweep.yaml: what W&B's own agent makes of it is a run of ours, under the agent's id."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT
from tests.fake_wandb import FakeServer, environment
from train.track.metrics_file import read_metrics

RUN = "sweeprun"
SUGGESTED: dict[str, Any] = {"optim.lr": 0.003, "lora.r": 4, "lora.rslora": True}  # as the server's controller would
QUICK = {"train.max_steps": 3, "compare.num_questions": 0, "checkpoint.every": 3, "validate.tokens": 2000}
QUICK |= {"validate.num_questions": 0, "validate.at_start": False, "validate.general_text": "off"}


def agent(sweep: dict[str, Any]) -> Any:
    """W&B's agent behind its conversation with the server, which the fake one cannot have."""
    from wandb.wandb_agent import Agent

    made = Agent.__new__(Agent)
    vars(made).update(_sweep_command=sweep["command"], _in_jupyter=False, _function=None)
    vars(made).update(_forward_signals=False, _run_processes={})
    return made


def test_an_agent_s_run_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command that it starts trains with the suggested options, and the server gets the number that is sought."""
    sweep = yaml.safe_load((ROOT / "launch" / "sweep.yaml").read_text(encoding="utf-8"))
    assert set(sweep["parameters"]) == set(SUGGESTED)
    sweep["command"] = [part.replace("runs/sweep/", f"{tmp_path}/") for part in sweep["command"]]
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    for name in ("WANDB_SWEEP_PARAM_PATH", "WANDB_RUN_ID"):  # the agent sets them in this process
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("WANDB_SWEEP_ID", "a-sweep")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.chdir(ROOT)
    with FakeServer() as server:
        for name, value in environment(server.url).items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("WANDB_MODE")
        started = agent(sweep)
        chosen = {name: {"value": value} for name, value in (SUGGESTED | QUICK).items()}
        started._command_run({"run_id": RUN, "program": sweep["program"], "args": chosen})
        assert started._run_processes[RUN].wait() == 0
    assert [row["step"] for row in read_metrics(tmp_path / RUN / "metrics.jsonl") if row["step"]] == [1, 2, 3]
    assert server.names == {RUN}
    assert server.summary[sweep["metric"]["name"]] > 0
    sent = b"".join(server.bodies)
    assert b'\\"r\\":4' in sent
    assert b'\\"rslora\\":true' in sent

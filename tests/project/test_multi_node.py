"""launch/multi_node.sh starts again what can go on, and launch/skypilot.yaml takes it where there are several."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from train.cli import parse

# stands in for the launcher: ends with the codes in the file `codes`, one a start; on TERM with 75
LAUNCH = """set -euo pipefail
launch() {
    trap 'exit 75' TERM
    echo "${topology[*]} | $*" >> told
    read -r code < codes
    sed -i 1d codes
    touch ready
    if [ "$code" = wait ]; then for i in $(seq 100); do /bin/sleep 0.1; done; fi
    exit "$code"
}
"""
NODE = {"NODES": "2", "NODE": "1", "FIRST_NODE": "10.0.0.1", "PROCESSES": "4"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with the script, a launcher that is a stand-in, and a sleep that takes no time."""
    (tmp_path / "launch").mkdir()
    script = (ROOT / "launch" / "multi_node.sh").read_text(encoding="utf-8")
    (tmp_path / "launch" / "multi_node.sh").write_text(script)
    (tmp_path / "launch" / "_common.sh").write_text(LAUNCH)
    (tmp_path / "sleep").write_text("#!/bin/sh\n")
    (tmp_path / "sleep").chmod(0o755)
    return tmp_path


def started(folder: Path, codes: str, **node: str) -> "subprocess.Popen[str]":
    (folder / "codes").write_text("".join(f"{code}\n" for code in codes.split()))
    setting = {**os.environ, **node, "PATH": f"{folder}:{os.environ['PATH']}"}
    command = ["bash", "launch/multi_node.sh", "--data.path", "a b"]
    return subprocess.Popen(command, cwd=folder, env=setting, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("codes", "code", "starts"),
    [("0", 0, 1), ("78", 78, 1), ("81 0", 0, 2), ("83 75 81 0", 0, 4), ("77", 77, 1), ("81 80", 80, 2)],
)
def test_what_can_go_on_is_started_again(codes: str, code: int, starts: int, folder: Path) -> None:
    """A lost or stopped peer, and a killed trainer; every other end is the script's own."""
    assert started(folder, codes, **NODE).wait(20) == code
    told = (folder / "told").read_text().splitlines()
    assert len(told) == starts
    topology = (
        "--num_machines 2 --machine_rank 1 --num_processes 8 --main_process_ip 10.0.0.1 --main_process_port 29500"
    )
    meeting = "--rdzv_conf is_host=false,join_timeout=3600,read_timeout=3600"
    assert set(told) == {f"{topology} {meeting} | multi_node_ddp.yaml multi_gpu --data.path a b"}


def test_a_machine_that_is_asked_to_stop_does_not_start_again(folder: Path) -> None:
    """The signal reaches the launcher, whose end is the script's, at once."""
    running = started(folder, "wait 0", **NODE)
    while not (folder / "ready").exists():
        time.sleep(0.02)
    running.send_signal(signal.SIGTERM)
    assert running.wait(20) == 75
    assert len((folder / "told").read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"NODE": ""}, "set NODES"),
        ({"NODE": "2"}, "set NODES"),
        ({"NODES": "two"}, "set NODES"),
        ({"NODES": "08"}, "set NODES"),  # octal to bash
        ({"NODES": "9" * 20}, "set NODES"),
        ({"NODE": "01"}, "set NODES"),
        ({"PROCESSES": "1.5"}, "PROCESSES=1.5 is no whole number"),
        ({"PROCESSES": "08"}, "PROCESSES=08 is no whole number"),
        ({"PORT": "http"}, "PORT=http is no whole number"),
        ({"SECONDS_TO_MEET": "1h"}, "SECONDS_TO_MEET=1h is no whole number"),
        ({"FIRST_NODE": ""}, "set NODES"),
        ({"PROCESSES": "0"}, "needs a GPU on each machine"),
    ],
)
def test_what_it_cannot_use_is_refused(change: dict[str, str], said: str, folder: Path) -> None:
    """Exit 78 with what is wanted, before anything is started."""
    refused = started(folder, "0", **NODE | change)
    assert said in refused.communicate(timeout=20)[1]
    assert refused.returncode == 78
    assert not (folder / "told").exists()


def test_the_first_machine_is_where_they_meet(folder: Path) -> None:
    """Number 0 keeps the store of the rendezvous, whatever its names and addresses are."""
    assert started(folder, "0", **NODE | {"NODE": "0"}).wait(20) == 0
    assert re.search(r"--machine_rank 0 .*is_host=true", (folder / "told").read_text())


@pytest.mark.parametrize(("nodes", "script"), [("1", "a100.sh"), ("3", "multi_node.sh")])
def test_what_skypilot_starts(nodes: str, script: str, folder: Path) -> None:
    """The script for one machine or several, with the mirror and options that are real."""
    job = yaml.safe_load((ROOT / "launch" / "skypilot.yaml").read_text(encoding="utf-8"))
    assert job["resources"]["job_recovery"]["recover_on_exit_codes"] == [75, 81, 83]
    (folder / "launch" / script).write_text('echo "${NODES:-} ${NODE:-} ${FIRST_NODE:-}"; printf "%s\\n" "$@"\n')
    given = {"MIRROR": "s3://bucket/runs/x", "DATA": "https://host/some/pairs.jsonl", "SKYPILOT_NUM_NODES": nodes}
    assert set(job["envs"]) == {"MIRROR", "DATA"}
    given |= {"SKYPILOT_NODE_RANK": "2", "SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2\n10.0.0.3"}
    done = subprocess.run(
        ["bash", "-euc", job["run"]],
        cwd=folder,
        env={**os.environ, **given},
        capture_output=True,
        text=True,
        check=True,
    )
    node, *words = done.stdout.splitlines()
    assert node.split() == ([] if nodes == "1" else ["3", "2", "10.0.0.1"])
    config = parse(["--profile", "a100", *words])
    assert config.data.path == ("downloaded/pairs.jsonl",)
    assert config.checkpoint.mirror == given["MIRROR"]
    assert config.checkpoint.minutes > 0

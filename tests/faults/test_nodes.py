"""Several machines: launch/multi_node.sh on two hosts with a cable between them, of which one dies."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.compare_runs import at, result_of, start_processes
from tests.conftest import ROOT, arguments, thorough
from tests.two_hosts import ADDRESSES, TwoHosts, refusal
from train.config import CheckpointConfig, Config
from train.run.json_lines import last_step


def script_in(folder: Path) -> Path:
    """launch/multi_node.sh beside a _common.sh that installs nothing."""
    (folder / "launch").mkdir(parents=True)
    common = (ROOT / "launch" / "_common.sh").read_text(encoding="utf-8")
    launch = common[common.index("topology=()") :].replace(".venv/bin/python", sys.executable)
    (folder / "launch" / "_common.sh").write_text(f"set -euo pipefail\ncd {ROOT}\n{launch}")
    script = folder / "launch" / "multi_node.sh"
    script.write_text((ROOT / "launch" / "multi_node.sh").read_text(encoding="utf-8"))
    return script


class Nodes:
    """The same command on both hosts."""

    def __init__(self, hosts: TwoHosts, folder: Path, config: Config) -> None:
        self.hosts, self.folder, self.config = hosts, folder, config
        self.script = script_in(folder / "script")

    def start(self, host: int) -> "subprocess.Popen[bytes]":
        """Starts the script on a host, whose run folder is its own."""
        environment = {"NODES": "2", "NODE": str(host), "FIRST_NODE": ADDRESSES[0], "PROCESSES": "1"}
        environment |= {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        words = arguments(at(self.config, self.folder / f"run-{host}"), "multi_gpu")[2:]
        return self.hosts.start(host, ["bash", str(self.script), *words], environment, self.log(host))

    def log(self, host: int) -> Path:
        return self.folder / f"log-{host}"

    def said(self, host: int) -> str:
        """What a host has said so far."""
        return self.log(host).read_text()

    def die(self, host: int) -> None:
        """Kills everything on a host at once, as a machine that is taken away."""
        for _ in range(3):
            for pid in self.hosts.pids(host):
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)


@pytest.fixture
def hosts() -> Iterator[TwoHosts]:
    """Two hosts; without the right to make them the test is skipped."""
    if why_not := refusal():
        pytest.skip(why_not)
    with TwoHosts() as made:
        yield made


@thorough
@pytest.mark.parametrize("victim", [0, 1])
def test_a_node_dies_and_another_takes_its_place(victim: int, config: Config, hosts: TwoHosts, tmp_path: Path) -> None:
    """All on a host is killed while it trains, and its disk is gone: the other one waits for the new one; same bits."""
    config = replace(config, batch=replace(config.batch, per_device=2, accumulation=2))
    config = replace(config, train=replace(config.train, epochs=20), run=replace(config.run, timeout_minutes=0.5))
    config = replace(config, checkpoint=CheckpointConfig(every=2))
    whole = [run.wait() for run in start_processes(arguments(at(config, tmp_path / "whole")), [None, None])]
    assert [one.returncode for one in whole] == [0, 0], whole[0].stderr

    nodes = Nodes(
        hosts, tmp_path, replace(config, checkpoint=CheckpointConfig(every=2, mirror=f"file://{tmp_path}/far"))
    )
    running = [nodes.start(host) for host in (0, 1)]
    while last_step(tmp_path / "run-0" / "metrics.jsonl") < 10:
        assert running[0].poll() is None, nodes.said(0)
        time.sleep(0.02)
    nodes.die(victim)
    running[victim].wait(20)
    shutil.rmtree(tmp_path / f"run-{victim}")
    time.sleep(2)
    running[victim] = nodes.start(victim)
    assert [one.wait(120) for one in running] == [0, 0], nodes.said(0) + nodes.said(1)
    assert "multi_node: ended with 81, starting again" in nodes.said(1 - victim)
    assert re.search(r"continues after step \d+", nodes.said(0))
    assert result_of(tmp_path / "run-0") == result_of(tmp_path / "whole")

"""Stop signals at any moment, through any launcher: the run saves, its exit code tells, and no process is left."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.compare_runs import at, exit_record, finish, known_reference, result_of, wait_for_rows
from tests.conftest import ROOT, Run, arguments, run_command, thorough
from tests.injections import DiskError
from tests.tally import Tally
from train.config import CheckpointConfig, Config

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


@pytest.mark.fault("T10")
def test_stop_signals_at_random_moments(config: Config, tmp_path: Path, tally: Tally) -> None:
    """Loading, between micro-batches, while saving, when it has ended: exit 75 and exit.json, then the same bits."""
    longer = replace(config, lora=replace(config.lora, dropout=0.1), train=replace(config.train, epochs=8))
    longer = replace(longer, checkpoint=CheckpointConfig(every=5))
    expected = known_reference(longer)
    for number in range(tally.times(2, 60)):
        draw, run_dir = random.Random(number), tmp_path / f"run-{number}"
        words = arguments(at(longer, run_dir))
        run = Run(words)
        while not (run_dir / ".lock").exists():  # by then its handlers are installed
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 1.5))
        kind = SIGNALS[number % len(SIGNALS)]
        if run.is_alive():
            run.signal(kind)
        asked = time.monotonic()
        code = run.wait().returncode
        took = time.monotonic() - asked
        tally.check(code in (0, 75), f"seed {number}: {kind.name}, code {code}")
        tally.check(exit_record(run_dir)["code"] == code, f"seed {number}: {exit_record(run_dir)}")
        tally.check(took < 20, f"seed {number}: {took:.1f} s until it ended")
        finish(words)
        tally.check(result_of(run_dir) == expected, f"seed {number}: {kind.name}, another result")


@pytest.mark.fault("T10")
def test_a_signal_inside_a_save_and_again(config: Config, tmp_path: Path, tally: Tally) -> None:
    """SIGTERM or SIGUSR1 twice during a save: it finishes, exit 75; Ctrl-C twice, a second apart, ends at once."""
    slow = DiskError(1, 5, seconds=0.5)
    kinds = ((signal.SIGTERM, 75), (signal.SIGINT, 128 + signal.SIGINT), (signal.SIGUSR1, 75))
    for kind, wanted in kinds[: tally.times(2, 3)]:
        run_dir = tmp_path / kind.name
        words = arguments(replace(at(config, run_dir), checkpoint=CheckpointConfig(every=1)))
        run = Run(words, slow)
        while not list((run_dir / "checkpoints").glob(".tmp-*")):
            assert run.is_alive()
            time.sleep(0.005)
        for _ in range(2):
            run.signal(kind)
            time.sleep(1.2 if kind == signal.SIGINT else 0.1)
        code = run.wait().returncode
        tally.check(code == wanted, f"{kind.name}: code {code}")
        if wanted == 75:
            steps = list((run_dir / "checkpoints").glob("step-*"))
            tally.check(len(steps) >= 1, f"{kind.name}: nothing saved")
        tally.check(run_command(words).returncode == 0, f"{kind.name}: does not go on")


COMMANDS = {
    "ours": [sys.executable, "-m", "train.launcher", "--quiet", "--config_file", "accelerate_configs/cpu.yaml"],
    "ours, two processes": [
        *(sys.executable, "-m", "train.launcher", "--quiet", "--config_file", "accelerate_configs/multi_gpu_ddp.yaml"),
        *("--num_processes", "2", "--num_cpu_threads_per_process", "1", "--main_process_port", "0"),
    ],
    "accelerate": [str(Path(sys.executable).with_name("accelerate")), "launch", "--quiet", "--cpu"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
}
# of one process; tests/integration/test_train_command.py stops ours as well, and of foreign ones torchrun stays
MARKS = {"ours": thorough, "accelerate": thorough}


@pytest.mark.fault("T11")
@pytest.mark.parametrize("name", [pytest.param(name, marks=MARKS.get(name, ())) for name in COMMANDS])
def test_signals_through_launchers(name: str, config: Config, tmp_path: Path, tally: Tally) -> None:
    """A signal to the launcher alone: the trainer saves, no process is left, and our launcher returns its exit code."""
    kinds = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    if not tally.full:
        kinds = {"ours": kinds[:1], "ours, two processes": kinds[1:2], "accelerate": kinds[:1]}.get(name, kinds[:1])
    for kind in kinds:
        run_dir = tmp_path / kind.name
        endless = at(replace(config, train=replace(config.train, epochs=10_000)), run_dir)
        launcher = subprocess.Popen(
            [*COMMANDS[name], str(ROOT / "train" / "main.py"), *arguments(endless)],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=(tmp_path / "stderr").open("w"),
            env={**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)},
            # a shell starts what it puts into the background, this suite perhaps, with Ctrl-C ignored
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        metrics, deadline = run_dir / "metrics.jsonl", time.monotonic() + 120
        while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 3):
            assert launcher.poll() is None, (tmp_path / "stderr").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        launcher.send_signal(kind)
        code = launcher.wait(timeout=60)
        deadline = time.monotonic() + 10
        while trainers(run_dir) and time.monotonic() < deadline:
            time.sleep(0.05)
        tally.check(not trainers(run_dir), f"{name}, {kind.name}: processes left")
        tally.check(exit_record(run_dir)["code"] == 75, f"{name}, {kind.name}: {exit_record(run_dir)}")
        if name.startswith("ours"):
            tally.check(code == 75, f"{name}, {kind.name}: code {code}")
        newest = max(path.name for path in (run_dir / "checkpoints").glob("step-*"))
        rows = metrics.read_bytes().count(b"\n")
        tally.check(int(newest[5:]) == rows, f"{name}, {kind.name}: {newest}, {rows} rows")


def trainers(run_dir: Path) -> list[int]:
    """Processes with the run folder among their arguments."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(run_dir).encode() in command and b"main.py" in command:
                found.append(int(entry.name))
    return found


@thorough  # tests/integration: test_demo.py gets the 0, test_bad_input.py the 78
@pytest.mark.fault("T11")
def test_the_launcher_returns_every_code(config: Config, tmp_path: Path, tally: Tally) -> None:
    """Our launcher returns 0 for a finished run and 78 for bad input, where accelerate returns 1."""
    cases = {0: arguments(at(config, tmp_path / "good")), 78: ["--profile", "demo", "--optim.lr", "-1"]}
    for wanted, words in cases.items():
        command = [*COMMANDS["ours"], str(ROOT / "train" / "main.py"), *words]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        tally.check(done.returncode == wanted, f"{done.returncode} instead of {wanted}: {done.stderr[-500:]}")


@pytest.mark.fault("T17")
def test_two_jobs_and_a_lock_left_behind(config: Config, tmp_path: Path, tally: Tally) -> None:
    """A second job on the run folder is refused and the first continues; the lock of a killed job has no effect."""
    for number in range(tally.times(1, 3)):
        run_dir = tmp_path / f"run-{number}"
        words = arguments(at(replace(config, train=replace(config.train, epochs=400)), run_dir))
        first = Run(words)
        assert wait_for_rows(first, run_dir, 1)
        second = run_command(words)
        tally.check(second.returncode == 78 and "in use by another job" in second.stderr, second.stderr[-300:])
        tally.check(first.is_alive() and not (run_dir / "exit.json").exists(), "the first run was harmed")
        first.signal(signal.SIGKILL)
        first.wait()
        third = Run(words)
        while "steps " not in third.said():
            assert third.is_alive()
            time.sleep(0.01)
        third.signal(signal.SIGTERM)
        tally.check(third.wait().returncode == 75, "a stale lock kept it out")
        tally.check(json.loads((run_dir / "exit.json").read_text())["code"] == 75, "exit.json")

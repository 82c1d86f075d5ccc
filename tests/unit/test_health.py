"""The health check of a container."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from train import health
from train.run.heartbeats import write_beat

TRAINER = """
import sys, time
from train.run.signals import follow_launcher, tell_doing, tell_launcher
follow_launcher(); tell_launcher("run", 10.0); tell_doing(sys.argv[1]); print(flush=True); time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The launcher's."""
    return tmp_path


@pytest.fixture
def trainer(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that has told the launcher what a trainer tells it, and does nothing."""
    environment = {**os.environ, "HANDLOOP_LAUNCHER": str(folder), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", TRAINER, "training, step 3"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
        process.kill()


def last_told(folder: Path, pid: int, what: str, seconds: float) -> None:
    """Makes what the trainer does something that it began so long ago."""
    path = folder / f"doing-{pid}"
    path.write_text(what)
    os.utime(path, (time.time() - seconds,) * 2)


def test_a_step_that_takes_too_long_is_unhealthy(
    folder: Path, trainer: subprocess.Popen[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found by the trainer's environment; a step, or a save, of more than run.timeout_minutes fails the check."""
    assert folder in health.launcher_folders()
    monkeypatch.setattr(health, "launcher_folders", lambda: {folder})
    assert health.main() == 0
    for what in health.LIMITED:
        last_told(folder, trainer.pid, f"{what} 3", 590)
        assert health.main() == 0
        last_told(folder, trainer.pid, f"{what} 3", 650)
        assert health.main() == 1
        assert f"process 0: {what} 3, for 650 s" in capsys.readouterr().err
    for what in ("loading the base", "reading the data", "validating after step 3", "asking the questions"):
        last_told(folder, trainer.pid, what, 7200)
        assert health.main() == 0
    last_told(folder, trainer.pid, "training, step 3", 650)
    trainer.kill()
    trainer.wait()
    assert health.main() == 0  # its end is the launcher's to tell


def test_a_stopped_trainer_is_unhealthy(folder: Path, trainer: subprocess.Popen[str]) -> None:
    """Stopped by SIGSTOP it fails the check, continued it passes."""
    assert health.trouble(folder) == ""
    trainer.send_signal(signal.SIGSTOP)
    os.waitpid(trainer.pid, os.WUNTRACED)
    assert health.trouble(folder) == "process 0 is stopped (as by SIGSTOP)"
    trainer.send_signal(signal.SIGCONT)
    os.waitpid(trainer.pid, os.WCONTINUED)
    assert health.trouble(folder) == ""


def test_a_process_that_waits_in_vain_is_unhealthy(
    folder: Path, trainer: subprocess.Popen[str], tmp_path: Path
) -> None:
    """Rank 1 has arrived where rank 0 has not, for longer than the timeout and the launcher's patience."""
    run = tmp_path / "run-folder"
    (folder / "run").write_text(json.dumps({"dir": str(run), "timeout_seconds": 600}))
    (folder / f"pid-{os.getpid()}").write_text("1")
    beats = run / ".heartbeats"
    beats.mkdir(parents=True)
    write_beat(beats, rank=0, step=2, arrivals=0)
    write_beat(beats, rank=1, step=2, arrivals=1)
    assert health.trouble(folder) == ""
    os.utime(beats / "1", (time.time() - 700,) * 2)
    assert health.trouble(folder) == "processes wait for one that has not answered for 600 s"


def test_where_nothing_trains_all_is_well(tmp_path: Path) -> None:
    """A container with another command, or whose trainer has not registered yet, is healthy."""
    assert health.launcher_folders(tmp_path) == set()
    assert health.trouble(tmp_path) == ""


def test_the_limited_words_are_the_loops() -> None:
    """What is limited is called so by the training loop."""
    source = (ROOT / "train" / "loop.py").read_text(encoding="utf-8")
    assert all(f'doing.now = f"{words} ' in source for words in health.LIMITED)

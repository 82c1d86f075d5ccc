"""launch/slurm.sbatch hands a signal on, waits for what is saved, and queues what can go on again."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT
from train.cli import parse

SCRIPT = ROOT / "launch" / "slurm.sbatch"
# stands in for handloop: ends with its last word, on USR1 after a while with 75
TRAINER = """#!/bin/bash
echo "$@" > told
trap 'sleep 0.5; exit 75' USR1
touch ready
case ${*: -1} in wait) for i in $(seq 100); do sleep 0.1; done; exit 1 ;; *) exit "${*: -1}" ;; esac
"""


@pytest.fixture
def job(tmp_path: Path) -> Path:
    """A folder with a venv whose handloop is a stand-in, a scontrol that notes its words, and a squeue."""
    folder = tmp_path / ".venv" / "bin"
    folder.mkdir(parents=True)
    (folder / "activate").write_text(f'PATH="{folder}:$PATH"\n')
    (tmp_path / "state").write_text("RUNNING\n")
    scontrol, squeue = '#!/bin/bash\necho "$@" > queued\n', "#!/bin/bash\ncat state\n"
    for name, text in (("handloop", TRAINER), ("scontrol", scontrol), ("squeue", squeue)):
        (folder / name).write_text(text)
        (folder / name).chmod(0o755)
    return tmp_path


def started(job: Path, *words: str) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(["bash", str(SCRIPT), *words], cwd=job, env={**os.environ, "SLURM_JOB_ID": "17"})


@pytest.mark.parametrize(
    ("code", "is_queued"), [(0, False), (78, False), (75, True), (81, True), (83, True), (138, True), (143, True)]
)
def test_what_can_go_on_is_queued_again(code: int, is_queued: bool, job: Path) -> None:
    """Ends that the same command goes on from; others are the job's own code."""
    assert started(job, "--profile", "a100", str(code)).wait(20) == (0 if is_queued else code)
    assert (job / "queued").exists() == is_queued
    if is_queued:
        assert (job / "queued").read_text() == "requeue 17\n"
    words = "train --run.grace_seconds 110 --checkpoint.minutes 30 --profile a100"
    assert (job / "told").read_text() == f"{words} {code}\n"


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_saves_first(number: signal.Signals, job: Path) -> None:
    """The script's signal reaches the trainer, whose end it waits for before it queues the job again."""
    running = started(job, "wait")
    while not (job / "ready").exists():
        time.sleep(0.02)
    running.send_signal(number)
    assert running.wait(20) == 0
    assert (job / "queued").read_text() == "requeue 17\n"


@pytest.mark.parametrize(("state", "is_queued"), [("COMPLETING", False), ("CANCELLED", False), ("", True)])
def test_what_slurm_has_decided_stays(state: str, is_queued: bool, job: Path) -> None:
    """A job that was cancelled is not queued again, nor one that Slurm itself has; without an answer it is tried."""
    (job / "state").write_text(f"{state}\n" if state else "")
    assert started(job, "75").wait(20) == (0 if is_queued else 75)
    assert (job / "queued").exists() == is_queued


@pytest.mark.parametrize(
    ("words", "minutes", "seconds"),
    [("--checkpoint.minutes 5", 5, 110), ("--checkpoint.minutes=5", 5, 110), ("--run.grace-seconds 9", 30, 9)],
)
def test_an_option_of_the_user_replaces_the_scripts(words: str, minutes: int, seconds: int, job: Path) -> None:
    """Handloop refuses an option that is given twice."""
    assert started(job, "--profile", "a100", *words.split(), "0").wait(20) == 0
    config = parse((job / "told").read_text().split()[1:-1])
    assert (config.checkpoint.minutes, config.run.grace_seconds) == (minutes, seconds)


def test_its_options_are_real(job: Path) -> None:
    """Slurm's signal comes earlier than what the run is told that it has; both are in the script."""
    text = SCRIPT.read_text(encoding="utf-8")
    (seconds,) = re.findall(r"^#SBATCH --signal=B:USR1@(\d+)$", text, re.MULTILINE)
    assert started(job, "--profile", "a100", "0").wait(20) == 0
    config = parse((job / "told").read_text().split()[1:-1])
    assert config.run.grace_seconds < int(seconds)
    assert config.checkpoint.minutes > 0

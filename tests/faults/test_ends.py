"""However a run ends, exit.json says with which code, what was being done, and what to do."""

import os
import pty
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.compare_runs import at, exit_record, result_of
from tests.conftest import ROOT, arguments, run_command, thorough
from tests.interruptions import Defect, NoUser
from train.config import Config
from train.run.attempts import read_attempts
from train.run.folder import RunFolder

TOKEN = "hf_" + "CanaryCanaryCanaryCanaryCanary1234"
DEFECTS = {
    "reading the data": Defect("train.main", "read_data", ZeroDivisionError(f"with {TOKEN}")),
    "loading the base": Defect("train.main", "assemble", RuntimeError("not of the processes")),
    "training, step 2": Defect("train.loop", "optimizer_step", AttributeError("no such thing"), call=2),
    "publishing final/": Defect("train.delivery", "publish_final", KeyError("name")),
    "starting the processes": Defect("train.main", "start_accelerator", SystemExit("a library left")),
}


@pytest.mark.fault("T28")
@pytest.mark.parametrize("doing", DEFECTS)
def test_a_defect(doing: str, config: Config, tmp_path: Path) -> None:
    """Exit 70, the report without secrets in the run folder, one message without a traceback; it moves aside."""
    folder = RunFolder(tmp_path / "run")
    secret = replace(config, track=replace(config.track, project=TOKEN))
    outcome = run_command(arguments(at(secret, folder.path)), DEFECTS[doing])
    assert outcome.returncode == 70, outcome.stderr
    record = exit_record(folder.path)
    assert (record["code"], record["name"], record["doing"]) == (70, "defect", doing)
    told = str(record["reason"])
    assert f"a defect of Handloop, while {doing}: {type(DEFECTS[doing].error).__name__}" in told
    assert f"the report is in {folder.defect}" in told
    assert "run the same command again" in told
    assert told in outcome.stderr
    assert "Traceback" not in outcome.stderr
    report = folder.defect.read_text()
    assert all(part in report for part in ("Traceback", "--track.project [secret]", "torch ", f"doing     {doing}"))
    assert TOKEN not in report + outcome.stderr + outcome.stdout
    attempts = read_attempts(folder)
    assert [attempt.end and attempt.end["doing"] for attempt in attempts] == ([doing] if len(attempts) else [])
    if not doing.startswith("training"):  # what comes after it is the same for all
        return
    again = replace(at(config, folder.path), run=replace(config.run, dir=str(folder.path), resume="never"))
    assert run_command(arguments(again)).returncode == 0
    assert (folder.path / "previous-1" / "defect.txt").read_text() == report
    assert not folder.defect.exists()


@pytest.mark.fault("T28")
def test_a_defect_before_there_is_a_run_folder(config: Config, tmp_path: Path) -> None:
    """The report goes to stderr, the code is the same."""
    outcome = run_command(arguments(at(config, tmp_path / "run")), Defect("train.main", "parse", ValueError(TOKEN)))
    assert outcome.returncode == 70
    assert "Traceback" in outcome.stderr
    assert "a defect of Handloop, while reading the command line: ValueError: [secret]" in outcome.stderr


REFUSED = {
    "a rank that is no number": (None, {"RANK": "abc"}, "RANK=abc is not a number; for a single process: unset RANK"),
    "half a world": (None, {"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set without RANK"),
    "a home that cannot be written": (None, {"HOME": "/proc/nope", "HANDLOOP_CACHE": ""}, "HANDLOOP_CACHE"),
    "no home": (NoUser(), {"HOME": "", "HANDLOOP_CACHE": ""}, "HANDLOOP_CACHE"),
    "a cache that is read-only": (None, {"HANDLOOP_CACHE": "/proc/self"}, "HANDLOOP_CACHE"),
    "a folder without rights": (
        Defect("train.main", "assemble", PermissionError(13, "Permission denied", "/there")),
        {},
        "while loading the base: [Errno 13] Permission denied: '/there'",
    ),
    "no memory": (Defect("train.main", "assemble", MemoryError()), {}, "free host memory"),
}


@pytest.mark.fault("T28")
@pytest.mark.parametrize("name", REFUSED)
def test_what_the_machine_refuses(name: str, config: Config, tmp_path: Path) -> None:
    """Exit 78 with exit.json, naming the variable or the place; no traceback, no report of a defect."""
    fault, environment, named = REFUSED[name]
    outcome = run_command(arguments(at(config, tmp_path / "run")), fault, **environment)
    assert outcome.returncode == 78, outcome.stderr
    assert named in str(exit_record(tmp_path / "run")["reason"])
    assert named in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert not RunFolder(tmp_path / "run").defect.exists()


@pytest.mark.fault("T28")
@pytest.mark.parametrize("name", ["a home that cannot be written", "no user and no home"])
def test_libraries_need_no_home(name: str, config: Config, tmp_path: Path) -> None:
    """With HANDLOOP_CACHE a run trains without a home, which Hugging Face's and torch's caches would have."""
    fault, home = (None, "/proc/nope") if name.startswith("a home") else (NoUser(), "")
    names = dict.fromkeys(("LOGNAME", "USER", "LNAME", "USERNAME", "HF_HOME", "XDG_CACHE_HOME"), "")
    outcome = run_command(arguments(at(config, tmp_path / "run")), fault, HOME=home, **names)
    assert outcome.returncode == 0, outcome.stderr


@thorough  # the next one closes the same pipe, and the one after it wants the same bits
@pytest.mark.fault("T28")
def test_a_terminal_that_is_gone(config: Config, tmp_path: Path) -> None:
    """The real script whose reader leaves after the first line, without UTF-8: the same bits, exit 0."""
    assert run_command(arguments(at(config, tmp_path / "alone"))).returncode == 0
    process = script(arguments(at(config, tmp_path / "run")))
    assert process.stdout
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(120) == 0
    assert exit_record(tmp_path / "run")["code"] == 0
    assert result_of(tmp_path / "run") == result_of(tmp_path / "alone")


@pytest.mark.fault("T28")
def test_ctrl_c_that_ends_the_reader_first(config: Config, tmp_path: Path) -> None:
    """As behind `| tee`: stdout and stderr are gone when the signal comes; it saves and ends with 75."""
    run_dir = tmp_path / "run"
    process = script(arguments(at(replace(config, train=replace(config.train, epochs=10_000)), run_dir)))
    metrics = run_dir / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes()):
        assert process.poll() is None
        time.sleep(0.05)
    assert process.stdout
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 75
    assert exit_record(run_dir)["code"] == 75
    assert list((run_dir / "checkpoints").glob("step-*"))


@pytest.mark.fault("T28")
def test_a_terminal_that_closes_while_it_shows_the_screen(config: Config, tmp_path: Path) -> None:
    """The real script on a terminal that is closed, as by a lost connection, while its thread draws: same bits, 0."""
    config = replace(config, train=replace(config.train, epochs=8))
    assert run_command(arguments(at(config, tmp_path / "alone"))).returncode == 0
    ours, its = pty.openpty()
    process = script(arguments(at(config, tmp_path / "run")), its, TERM="xterm")
    os.close(its)
    shown = b""
    while b"smoothed" not in shown:
        shown += os.read(ours, 65536)
    os.close(ours)
    assert process.poll() is None
    assert process.wait(120) == 0
    assert exit_record(tmp_path / "run")["code"] == 0
    assert result_of(tmp_path / "run") == result_of(tmp_path / "alone")


def script(words: list[str], stdout: int = subprocess.PIPE, **environment: str) -> subprocess.Popen:
    """`python train/main.py WORDS`, with one pipe for both streams, in an encoding without most characters."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train" / "main.py"), *words],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "PYTHONIOENCODING": "ascii:strict",
            "PYTHONUNBUFFERED": "1",
            **environment,
        },
        stdout=stdout,
        stderr=subprocess.STDOUT,
    )

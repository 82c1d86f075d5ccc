"""What the launcher says of trainer processes that could not say it themselves; the trainers here are fakes."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.conftest import ROOT
from train.run import host_memory, launcher
from train.run.attempts import read_attempts
from train.run.exits import ExitCode
from train.run.folder import RunFolder, read_object
from train.run.heartbeats import read_beats

TIMEOUT = 2.0
LAUNCH = (
    "import sys, tempfile\nfrom pathlib import Path\nimport train.run.launcher as launcher\n"
    "counts = list(map(int, sys.argv[1].split(',')))\nlauncher.oom_kills = lambda: counts.pop(0)\n"
    "with tempfile.TemporaryDirectory() as folder:\n"
    "    sys.exit(launcher.Launcher([sys.executable, *sys.argv[2:]], Path(folder)).wait())"
)


def launched(run_dir: Path, *behaviours: str, oom_kills: str = "0,0") -> tuple[int, str, float]:
    """Exit code, stderr and seconds of the launcher with one fake trainer for each behaviour."""
    fake = str(ROOT / "tests" / "unit" / "run" / "fake_trainer.py")
    words = [sys.executable, "-c", LAUNCH, oom_kills, fake, str(run_dir), str(TIMEOUT), *behaviours]
    began = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(words, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stderr, time.monotonic() - began


LOST = {
    "killed": (("killed",), 83, "the trainer was killed from outside while loading, as the kernel"),
    "ended by hand": (("ctrl_c",), 83, "ended by a second Ctrl-C, without saving"),
    "crashed": (("crash",), 70, "the trainer crashed while loading (Fatal Python error: Aborted)"),
    "one of two killed": (("wait", "killed"), 81, "process 1 was killed from outside"),
    "the first killed": (("killed", "wait"), 81, "process 0 was killed from outside"),
    "one of two crashed": (("wait", "crash"), 81, "process 1 crashed while loading (Fatal Python error: Aborted)"),
    "one of two stopped": (("wait", "stopped"), 81, "process 1 is stopped"),
    "stopped where the others are": (("wait", "stopped there"), 81, "process 1 is stopped"),
    "stopped, the other aborted": (("watchdog", "stopped"), 81, "process 1 is stopped"),
    "behind, the other aborted": (("watchdog", "behind"), 81, "process 1 has not answered for more than 2 s"),
    "behind": (("wait", "behind", "wait"), 81, "process 1 has not answered for more than 2 s"),
    "unheard of, the other aborted": (("watchdog", "unheard"), 81, "process 1 has not answered for more than 2 s"),
    "unheard of": (("unheard", "wait"), 81, "process 0 has not answered for more than 2 s"),
    "one without memory": (("wait", "memory"), 78, "process 1: no memory left"),
    "one without its data": (("wait", "alone"), 78, "process 1: no such file"),
}


def test_lost_trainers_are_named(tmp_path: Path) -> None:
    """Within the timeout and ten seconds: code, message, exit.json and the attempt's end; no process is left."""
    folders = {name: RunFolder(tmp_path / f"{number:02}" / "run") for number, name in enumerate(LOST)}
    for folder in folders.values():
        (folder.checkpoints / "step-0000000003").mkdir(parents=True)
    with ThreadPoolExecutor(4) as at_once:  # launchers wait most of the time
        runs = {name: at_once.submit(launched, folder.path, *LOST[name][0]) for name, folder in folders.items()}
    for name, folder in folders.items():
        found, said, seconds = runs[name].result()
        _, code, told = LOST[name]
        assert found == code, f"{name}: {said}"
        assert f"handloop: {told}" in said, name
        assert seconds < TIMEOUT + 10, name
        check_records(name, folder)
    everything = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(tmp_path) not in everything


def check_records(name: str, folder: RunFolder) -> None:
    """What the launcher has left in the run folder is what it said."""
    behaviours, code, told = LOST[name]
    record = read_object(folder.exit)
    assert (record["code"], record["name"], record["doing"]) == (code, ExitCode(code).name.lower(), "loading"), name
    assert str(record["reason"]).startswith(told), name
    if code != ExitCode.BAD_INPUT:  # which says itself what to do
        assert "the newest checkpoint stands: run the same command again" in str(record["reason"]), name
    (attempt,) = read_attempts(folder)
    assert attempt.end is not None, name
    assert attempt.end["code"] == code, name
    if len(behaviours) > 1 and code == 81 and "unheard" not in behaviours:
        assert f"last heard of: {told[:9]}: step 3, " in str(record["reason"]), name
    assert folder.defect.exists() == ("crash" in behaviours or "watchdog" in behaviours), name


def test_without_a_checkpoint_none_is_said_to_stand(tmp_path: Path) -> None:
    """A run that is lost before its first checkpoint starts from the beginning, and says so: one process, and two."""
    with ThreadPoolExecutor() as at_once:
        runs = [at_once.submit(launched, tmp_path / names[0], *names) for names in (("killed",), ("wait", "killed"))]
    for run, name in zip(runs, ("killed", "wait"), strict=True):
        said = run.result()[1]
        assert "no checkpoint had been written, so it starts from the beginning: run the same command again" in said
        assert "stands" not in said + str(read_object(RunFolder(tmp_path / name).exit)["reason"])


def test_a_beat_is_never_half_written(tmp_path: Path) -> None:
    """A reader finds a whole one at every moment, while a process writes them as fast as it can."""
    write = "from pathlib import Path\nfrom train.run.heartbeats import write_beat\nnumber = 0\nwhile True:\n"
    write += f"    write_beat(Path({str(tmp_path)!r}), 0, number % 1000, 0)\n    number += 1\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", write], env=environment) as writer:
        while not read_beats(tmp_path):
            time.sleep(0.01)
        seen = [len(read_beats(tmp_path)) for _ in range(3000)]
        writer.kill()
    assert seen == [1] * 3000


def test_a_kill_for_want_of_memory(tmp_path: Path) -> None:
    """If the kernel has counted one meanwhile, the message says what to lower."""
    code, said, _ = launched(tmp_path / "run", "killed", oom_kills="4,5")
    assert code == ExitCode.KILLED
    assert "host memory ran out" in said
    assert "--batch.per_device" in str(read_object(tmp_path / "run" / "exit.json")["reason"])
    assert "host memory" not in launched(tmp_path / "other", "killed", oom_kills="4,4")[1]


def test_ends_of_their_own_are_passed_on(tmp_path: Path) -> None:
    """A trainer that ends by itself is not taken for one that was killed."""
    assert launched(tmp_path / "run", "fine", "fine")[0] == 0
    code, said, _ = launched(tmp_path / "clock", "fine", "clock")
    assert code == 0, said  # its beat is an hour old by a clock that is not this one's
    code, said, _ = launched(tmp_path / "lost one", "lost one", "memory")
    assert (code, "process 1: no memory left" in said) == (78, True)
    code, said, _ = launched(tmp_path / "other", "exception")
    assert code != ExitCode.KILLED
    assert "killed" not in said


def test_nothing_is_written_into_another_job_s_folder(tmp_path: Path) -> None:
    """The first process is refused the run folder: the others are ended soon, and no record is touched."""
    code, _, seconds = launched(tmp_path / "run", "refused", "wait")
    assert code == ExitCode.BAD_INPUT
    assert seconds < 12
    assert not (tmp_path / "run" / "exit.json").exists()


@pytest.mark.parametrize(
    ("own", "place"),
    [
        ("0::/job\n", "job/memory.events"),
        ("0::/not/visible/here\n", "memory.events"),
        ("5:cpu:/x\n4:memory:/job\n", "memory/job/memory.oom_control"),
        ("5:cpu:/x\n4:memory:/hidden\n", "memory/memory.oom_control"),
    ],
)
def test_the_kernel_s_count(own: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """cgroup v2 and v1, seen from the host and from a container; without a file it is 0."""
    monkeypatch.setattr(host_memory, "OWN", tmp_path / "own")
    monkeypatch.setattr(host_memory, "CGROUPS", tmp_path)
    assert host_memory.oom_kills() == 0
    (tmp_path / "own").write_text(own)
    assert host_memory.oom_kills() == 0
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / place).write_text("low 0\noom 9\noom_kill 3\noom_group_kill 1\n")
    assert host_memory.oom_kills() == 3


def test_threads_on_a_cpu_are_said_to_accelerate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as it would take, divided among the processes; nothing where the user says so, and on GPUs."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(launcher.psutil, "cpu_count", lambda logical: 6)
    files = {name: str(ROOT / "accelerate_configs" / f"{name}.yaml") for name in ("cpu", "single_a100")}
    cpu = ["--quiet", "--config_file", files["cpu"]]
    script = ["train/main.py", "--profile", "demo", "--num_processes", "3"]  # behind the script it is not accelerate's
    assert launcher._threads([*cpu, *script]) == ["--num_cpu_threads_per_process", "6"]
    assert launcher._threads([*cpu, "--num_processes", "2", *script]) == ["--num_cpu_threads_per_process", "3"]
    assert launcher._threads([*cpu, "--num_processes", "9", *script]) == ["--num_cpu_threads_per_process", "1"]
    assert launcher._threads([*cpu, "--num_cpu_threads_per_process", "4", *script]) == []
    assert launcher._threads(["--config_file", files["single_a100"], *script]) == []
    assert launcher._threads(["--config_file", str(tmp_path / "none"), *script]) == []
    assert launcher._threads(script) == []
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert launcher._threads([*cpu, *script]) == []

"""`handloop train` up to where accelerate takes over; tests/integration/test_train_command.py runs it."""

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import pytest
from accelerate.commands.launch import launch_command_parser

from tests.conftest import ROOT
from tests.run_folders import write_answers, write_run
from train.bundled import bundled
from train.commands import train
from train.commands.handloop import main
from train.profiles import FOR_4_GB, PROFILES
from train.run.exits import ExitCode
from train.run.folder import RunFolder


def launched(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, str], list[str]]:
    """What accelerate is given before train/main.py, by option, and what train/main.py is given."""
    calls: list[list[str]] = []
    monkeypatch.setattr(train, "launch", lambda arguments, output: (calls.append(arguments), (75, ""))[1])
    assert main(["train", *words]) == 75
    (arguments,) = calls
    script = arguments.index(str(ROOT / "train" / "main.py"))
    assert arguments[0] == "--quiet"
    launch_command_parser().parse_args(arguments)  # accelerate itself knows all of it
    return dict(zip(arguments[1:script:2], arguments[2:script:2], strict=True)), arguments[script + 1 :]


@pytest.mark.parametrize(
    ("words", "file", "count"),
    [
        (["--profile", "demo"], "cpu.yaml", "1"),
        (["--profile", "demo", "--run.device", "cuda"], "single_a100.yaml", "1"),
        (["--profile", "a100"], "single_a100.yaml", "1"),
        (["--profile", "a100", "--run.device", "cpu"], "cpu.yaml", "1"),
        (["--profile", "a100", "--num_processes", "4"], "multi_gpu_ddp.yaml", "4"),
        *((["--profile", name], "single_4gb_cpu_offload.yaml", "1") for name in FOR_4_GB),
        (["--profile", "multi_gpu"], "multi_gpu_ddp.yaml", "3"),
        (["--profile", "multi_gpu", "--num_processes", "1"], "single_a100.yaml", "1"),
    ],
)
def test_the_topology_fits(words: list[str], file: str, count: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Device and number of processes choose accelerate's configuration; multi_gpu takes all GPUs."""
    monkeypatch.setattr(train, "_count_gpus", lambda: 3)
    topology, recipe = launched(words, monkeypatch)
    assert topology == {"--config_file": str(bundled("accelerate_configs") / file), "--num_processes": count}
    assert recipe[:2] == words[:2]
    assert ("--data.validation_path" in recipe) == (words[1] == "demo")


def test_the_users_topology_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every option of accelerate that the help names reaches it, and the recipe reaches train/main.py as written."""
    mine = tmp_path / "mine.yaml"
    mine.write_text("num_processes: 1\n")
    given = {"--config_file": str(mine), "--num_processes": "4"} | {f"--{name}": "2" for name in train.PASSED_ON}
    words = [word for pair in given.items() for word in pair]
    recipe = ["--profile", "demo", "--data.path", "a.jsonl", "b.jsonl", "--optim.lr=1e-3"]
    topology, passed = launched([*words, *recipe], monkeypatch)
    assert topology == given
    assert passed == recipe  # and no data of the demo's
    topology, _ = launched(["--config_file", str(mine), "--profile", "demo"], monkeypatch)
    assert topology == {"--config_file": str(mine)}  # whose number of processes stands


def test_scripts_and_command_pair_the_same() -> None:
    """For every profile the command takes the configuration that its script in launch/ names, on one machine."""
    from tests.project.test_launch import PAIRS

    pairs = {match[2]: match[1] for script, match in PAIRS.items() if match and script != "multi_node.sh"}
    found = {name: train.configuration_for(make(), 2 if name == "multi_gpu" else 1) for name, make in PROFILES.items()}
    assert found == pairs


def test_refusals_come_before_accelerate(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """No profile, a bad value, no such file, one GPU where several are needed: 78, and nothing is started."""
    monkeypatch.setattr(train, "launch", lambda *_: pytest.fail("accelerate is started"))
    done = subprocess.CompletedProcess((), 0, stdout="1\n")
    monkeypatch.setattr(train.subprocess, "run", lambda *_, **__: done)
    for words, reason in (
        ([], "--profile NAME"),
        (["--profile", "demo", "--optim.lr", "-1"], "optim.lr"),
        (["--profile", "demo", "--num_processes", "0"], "positive integer"),
        (["--profile", "demo", "--config_file", "no.yaml"], "no.yaml: there is no such file"),
        (["--profile", "multi_gpu"], "torch finds 1; for one write --profile a100"),
    ):
        assert main(["train", *words]) == ExitCode.BAD_INPUT
        told = capsys.readouterr()
        assert reason in told.err
        assert told.out == ""


def test_help_and_the_printed_configuration_start_nothing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """--help alone is on the command, with a profile or a topic on the recipe, which --print-config prints."""
    monkeypatch.setattr(train, "launch", lambda *_: pytest.fail("accelerate is started"))
    for words, expected, other in (
        (["--help"], "--config_file", "optim.lr"),
        (["--profile", "demo", "--help"], "optim.lr", "--config_file"),
        (["--help", "all"], "optim.lora_plus_ratio", "--config_file"),
        (["--profile", "demo", "--print-config"], '"lr": 0.003', "--config_file"),
    ):
        with pytest.raises(SystemExit) as left:
            main(["train", *words])
        assert not left.value.code
        told = capsys.readouterr().out
        assert expected in told
        assert other not in told


SLOW_START = (
    "import sys, time\nfrom train.commands import handloop, train\n"
    "def config(*_):\n    print('reading', flush=True)\n    time.sleep(60)\n"
    "train.Options.config = config\nsys.exit(handloop.main())"
)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_stop_before_training_is_one(number: signal.Signals) -> None:
    """A stop signal while the words are read ends with 75, as it does later."""
    command = [sys.executable, "-c", SLOW_START, "train", "--profile", "demo"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as started:
        assert started.stdout is not None
        assert started.stdout.readline() == b"reading\n"
        started.send_signal(number)
        _, said = started.communicate(timeout=60)
    assert started.returncode == ExitCode.INTERRUPTED
    assert f"stopped by {number.name} before training began" in said.decode()


def test_the_handlers_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """After the command the process's own signal handlers stand again."""

    def mine(number: int, frame: FrameType | None) -> None:
        """A handler of whoever calls the command."""

    before = signal.signal(signal.SIGTERM, mine)
    try:
        launched(["--profile", "demo"], monkeypatch)
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_what_became_of_it_is_told(tmp_path: Path) -> None:
    """A finished run has its result; of an attempt that was refused there code and reason are told, and no result."""
    run = write_run(tmp_path / "run")
    write_answers(run)
    told = train.outcome(0, "finished", RunFolder(run))
    assert (told["code"], told["name"], told["step"], told["total_steps"]) == (0, "finished", 120, 120)
    assert told["final"] == str(run / "final")
    assert told["answers"] == {
        "trained": {
            "total": 2,
            "exact_before": 0,
            "contained_before": 0,
            "contained_after": 0,  # written by a version that did not say
            "exact_after": 1,
            "ended_after": 2,
        }
    }
    told = train.outcome(78, "another job has it", RunFolder(run))
    assert (told["code"], told["name"], told["reason"]) == (78, "bad_input", "another job has it")
    assert (told["final"], told["answers"]) == (None, {})
    told = train.outcome(130, "", RunFolder(tmp_path / "none"))
    assert (told["name"], told["step"], told["loss_last"]) == ("", 0, None)

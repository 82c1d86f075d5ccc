"""Variables that a launcher, accelerate's configuration or a shell left: honoured, or refused in one line."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import PartialState
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from tests.compare_runs import exit_record
from tests.conftest import arguments, run_command
from train.config import Config
from train.run import accelerator as building
from train.run.accelerator import check_machine
from train.run.environment import REFUSED, TF32, THREADS, check_environment, is_first_process, launch_problem
from train.run.exits import ExitCode, ExitWith

WORLD = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_", "OMP_")) or name in (*WORLD, "LOCAL_WORLD_SIZE", TF32, *THREADS):
            monkeypatch.delenv(name)


def set_all(monkeypatch: pytest.MonkeyPatch, variables: Mapping[str, str]) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def refusal(config: Config) -> str:
    """The reason of the refusal, or nothing."""
    try:
        check_environment(config)
    except ExitWith as end:
        return end.reason if end.code == ExitCode.BAD_INPUT else f"another code: {end.code}"
    return ""


def on(config: Config, device: Any) -> Config:
    return replace(config, run=replace(config.run, device=device))


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"RANK": "1"}, "RANK=1 is set without WORLD_SIZE"),
        ({"LOCAL_RANK": "0"}, "LOCAL_RANK=0 is set without WORLD_SIZE"),
        ({"RANK": "abc"}, "RANK=abc is not a number"),
        ({"RANK": ""}, "RANK= is not a number"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1 is not a number"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two is not a number"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 is set without RANK"),
        ({**WORLD, "WORLD_SIZE": "1"}, "RANK=1 is not one of the ranks of WORLD_SIZE=1"),
        ({**WORLD, "LOCAL_RANK": "5"}, "LOCAL_RANK=5 is not one of the ranks of WORLD_SIZE=2"),
        ({**WORLD, "LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK=1 is not one of the ranks of LOCAL_WORLD_SIZE=1"),
        ({**WORLD, "MASTER_ADDR": ""}, "WORLD_SIZE=2 is set without MASTER_ADDR"),
        ({**WORLD, "MASTER_PORT": "http"}, "MASTER_PORT=http is not a number"),
    ],
)
def test_what_is_left_of_a_launch_is_refused(
    variables: dict[str, str], said: str, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line names what is wrong and what to unset, and the process acts as the only one that it is."""
    set_all(monkeypatch, variables)
    reason = refusal(config)
    assert said in reason
    assert "\n" not in reason
    words = reason.partition("unset ")[2].split()
    assert set(words) == set(variables) - {"LOCAL_WORLD_SIZE"} | ({"LOCAL_WORLD_SIZE"} & set(variables))
    assert is_first_process()


@pytest.mark.parametrize(
    "variables",
    [
        {},
        WORLD,
        {**WORLD, "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "none"},  # torchrun
        {**WORLD, "RANK": "3", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2"},  # the second node
        {"WORLD_SIZE": "1"},
        {"MASTER_ADDR": "somewhere", "MASTER_PORT": "29500"},
        {name: value for name, value in WORLD.items() if name != "LOCAL_RANK"},  # CPU only
        {"WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "MASTER_ADDR": "127.0.0.1"},
    ],
)
def test_a_genuine_launch_is_none_of_it(
    variables: dict[str, str], config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun, accelerate and srun with env:// stay as they are."""
    set_all(monkeypatch, variables)
    assert launch_problem() == refusal(config) == ""
    assert is_first_process() == (variables.get("RANK", "0") == "0")


@pytest.mark.parametrize("variables", [{"RANK": "1"}, {"RANK": "abc"}, {"LOCAL_RANK": "0"}])
def test_a_stale_rank_ends_the_command(variables: dict[str, str], config: Config, tmp_path: Path) -> None:
    """The command says it, returns 78 and leaves exit.json: a process that took itself for another wrote nothing."""
    outcome = run_command(arguments(config), None, **variables)
    assert outcome.returncode == ExitCode.BAD_INPUT, outcome.stderr
    assert "unset" in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert exit_record(tmp_path / "run")["code"] == ExitCode.BAD_INPUT


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two GPUs, as far as the start asks for them."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("check_build", "check_bitsandbytes", "compute_type"):
        monkeypatch.setattr(building.devices, name, lambda *arguments: None)


def test_a_process_without_a_gpu_is_refused(gpus: None, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """The third process of a machine with two GPUs; and several processes that do not say whose GPU is whose."""
    set_all(monkeypatch, {**WORLD, "RANK": "2", "LOCAL_RANK": "2", "WORLD_SIZE": "4"})
    assert "LOCAL_RANK=2 has no GPU: 2 visible" in refusal(on(config, "auto"))
    assert refusal(on(config, "cpu")) == ""
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert refusal(on(config, "cuda")) == ""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert "LOCAL_RANK=1 has no GPU: 1 visible" in refusal(on(config, "cuda"))
    monkeypatch.setenv("SLURM_LOCALID", "1")  # srun --gpus-per-task=1
    check_machine(on(config, "cuda"))
    monkeypatch.delenv("LOCAL_RANK")
    assert "WORLD_SIZE=4 is set without LOCAL_RANK" in refusal(on(config, "auto"))


def test_use_cpu_beside_a_profile_for_a_gpu(gpus: None, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """use_cpu in the accelerate configuration would train a GPU profile on the CPU in fp32; auto may do so."""
    check_machine(on(config, "cuda"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "False")  # what accelerate launch sets without it
    check_machine(on(config, "cuda"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(ExitWith, match=r"use_cpu .* --run\.device is cuda"):
        check_machine(on(config, "cuda"))
    for device in ("auto", "cpu"):
        check_machine(on(config, device))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "perhaps")
    assert "neither true nor false" in refusal(config)


def test_a_gpu_that_is_hidden_is_named(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where CUDA_VISIBLE_DEVICES hides the GPUs, the refusal says so."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ExitWith, match=r"finds none \(CUDA_VISIBLE_DEVICES is ''\)"):
        check_machine(on(config, "cuda"))


@pytest.mark.parametrize("row", REFUSED, ids=lambda row: row.variable)
def test_what_accelerate_could_do_is_refused(row: Any, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in a line with what to use instead; values that ask for nothing pass."""
    value = {
        "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR",
        "ACCELERATE_MIXED_PRECISION": "fp8",
        "ACCELERATE_TORCH_DEVICE": "xpu:1",
    }.get(row.variable, "true")
    monkeypatch.setenv(row.variable, value)
    reason = refusal(config)
    assert f"{row.variable}={value}" in reason
    assert row.instead in reason
    assert "\n" not in reason
    for harmless in row.harmless:
        monkeypatch.setenv(row.variable, harmless.upper())
        assert refusal(config) == ""


def configured(words: list[str], multi_gpu: bool) -> dict[str, str]:
    """The variables that `accelerate launch WORDS` sets."""
    options = launch_command_parser().parse_args(["--num_cpu_threads_per_process", "1", *words, "script.py"])
    options.num_processes, options.num_machines = options.num_processes or (2 if multi_gpu else 1), 1
    options.use_cpu = False
    options.mixed_precision = options.mixed_precision or "no"
    options.dynamo_backend = options.dynamo_backend or "no"
    made = prepare_multi_gpu_env(options) if multi_gpu else prepare_simple_launcher_cmd_env(options)[1]
    return {name: value for name, value in made.items() if os.environ.get(name) != value and name != "LOCAL_RANK"}


@pytest.mark.parametrize(
    ("words", "multi_gpu", "said"),
    [
        ([], False, ""),
        (["--num_processes", "2"], True, ""),
        (["--use_fsdp"], True, "FSDP"),
        (["--use_megatron_lm"], True, "Megatron-LM"),
        (["--use_parallelism_config", "true"], True, "tensor, context"),
        (["--dynamo_backend", "inductor"], False, "dynamo backend"),
        (["--mixed_precision", "fp16"], False, "mixed_precision"),
        (["--mixed_precision", "bf16"], True, "mixed_precision"),
    ],
)
def test_what_accelerate_launch_really_sets(
    words: list[str], multi_gpu: bool, said: str, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variables are those of the installed accelerate, and those of a plain launch are none that is refused."""
    made = configured(words, multi_gpu)
    assert any(name.startswith("ACCELERATE_") for name in made)
    set_all(monkeypatch, {name: value for name, value in made.items() if not name.startswith("MASTER_")})
    reason = refusal(config)
    assert reason == "" if not said else said in reason


def test_one_process_in_place_of_several_is_refused(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate starts one on a CPU, whatever number it was asked for; one that was asked for is no problem."""
    for count, said in ((2, "asked for several processes on a CPU and starts one"), (1, "")):
        made = configured(["--cpu", "--num_processes", str(count)], False)
        monkeypatch.delenv("MASTER_ADDR", raising=False)
        set_all(monkeypatch, made)
        reason = refusal(config)
        assert said in reason if said else reason == ""
    several = configured(["--cpu", "--num_processes", "2"], False)
    set_all(monkeypatch, several | {"OMPI_COMM_WORLD_RANK": "1"})  # mpirun has started them
    assert "starts one" not in refusal(config)


def test_every_problem_is_said_at_once(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """One line each."""
    set_all(monkeypatch, {"RANK": "1", "ACCELERATE_USE_FSDP": "true", "OMP_NUM_THREADS": "all"})
    assert len(refusal(config).splitlines()) == 3


def test_what_torch_would_compute_otherwise(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """TF32 forced from outside, numbers of threads that are none, and a workspace that is not deterministic."""
    for name in THREADS:
        for value, is_good in (("8", True), ("4,2", True), ("abc", False), ("0", False), ("-1", False), ("", False)):
            monkeypatch.setenv(name, value)
            assert (refusal(config) == "") == is_good, f"{name}={value}"
        monkeypatch.delenv(name)
    monkeypatch.setenv(TF32, "1")
    assert f"{TF32}=1 would round" in refusal(on(config, "auto"))
    assert refusal(on(config, "cpu")) == ""
    monkeypatch.setenv(TF32, "0")
    assert refusal(on(config, "auto")) == ""
    exact = replace(config, run=replace(config.run, deterministic=True))
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    assert "CUBLAS_WORKSPACE_CONFIG=:0:0" in refusal(exact)
    assert refusal(config) == ""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    assert refusal(exact) == ""


def test_torch_s_own_switch_to_tf32_is_overruled(config: Config) -> None:
    """TORCH_ALLOW_TF32_CUBLAS_OVERRIDE makes torch start with rounded products; a run turns that off."""
    torch.set_float32_matmul_precision("high")
    building.start_accelerator(config)
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_device_that_nothing_was_written_for(config: Config) -> None:
    """An Apple or Intel accelerator that accelerate finds by itself is refused, and so is a CPU for a GPU profile."""

    class Fake:
        distributed_type = PartialState(cpu=True).distributed_type

        def __init__(self, device: str) -> None:
            self.device = torch.device(device)

    def check(wanted: str, found: str) -> None:
        fake: Any = Fake(found)
        building._check_accelerator(on(config, wanted), fake)

    for wanted, found in (("auto", "cuda"), ("auto", "cpu"), ("cpu", "cpu"), ("cuda", "cuda")):
        check(wanted, found)
    for wanted, found in (("auto", "mps"), ("auto", "xpu"), ("cuda", "cpu")):
        with pytest.raises(ExitWith, match=rf"accelerate chooses.* {found}"):
            check(wanted, found)

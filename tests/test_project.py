"""The project's own rules: what imports what, how long functions are, what pairs with what."""

import ast
import graphlib
import json
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

from benchmarks.faults import FAULTS
from tests.conftest import ROOT
from train.profiles import PROFILES

SOURCES = sorted(path for folder in ("train", "data_tools") for path in (ROOT / folder).rglob("*.py"))
LIBRARIES_WITH_ONE_OWNER = {
    "peft": {"train.models.language_model"},
    "bitsandbytes": {
        "train.engine.families",
        "train.engine.lora_linear",
        "train.engine.packed_weights",
        "train.models.base",
        "train.models.language_model",
        "train.optim",
    },
    "triton": {"train.engine.kernels"},
    "wandb": {"train.track.weights_and_biases"},
    "tyro": {"train.cli"},
}
# Each package of train/, and each module directly in it, may import only these of ours, beside its own modules.
ALLOWED = {
    "train": set(),
    "data_tools": set(),
    "train.batching": {"collate"},
    "train.collate": set(),
    "train.config": set(),
    "train.metrics": set(),
    "train.seeds": set(),
    "train.optim": {"config"},
    "train.profiles": {"config"},
    "train.run": {"config", "data_tools", "metrics", "optim"},
    "train.launcher": {"run"},
    "train.data": {"batching", "collate", "config", "data_tools", "seeds"},
    "train.engine": {"batching", "collate", "config", "run"},
    "train.loss": {"engine"},
    "train.models": {"collate", "config", "data_tools", "engine", "loss", "run", "seeds"},
    "train.memory": {"batching", "config", "engine", "loss", "models", "optim", "run"},
    "train.step": {"config", "data", "engine", "metrics", "models", "optim", "run", "seeds"},
    "train.validation": {"batching", "collate", "metrics", "step"},
    "train.track": {"config", "run"},
    "train.cli": {"config", "profiles", "run"},
    "train.audit_gate": {"config", "data", "data_tools", "run"},
    "train.assemble": {
        "batching",
        "collate",
        "config",
        "data",
        "engine",
        "memory",
        "models",
        "optim",
        "run",
        "step",
    },
    "train.checkpoints": {"batching", "config", "data", "models", "optim", "run", "step", "track"},
    "train.deliver": {"checkpoints", "data_tools", "models", "run"},
    "train.loop": {"checkpoints", "memory", "metrics", "run", "step", "track"},
    "train.attempt_record": {"checkpoints", "data_tools", "run", "step"},
    "train.banner": {"checkpoints", "config", "data_tools", "profiles", "run", "step"},
    "train.commands": {
        "assemble",
        "audit_gate",
        "batching",
        "cli",
        "config",
        "data",
        "data_tools",
        "engine",
        "memory",
        "models",
        "run",
        "step",
    },
}
# What is computed is stacked more strictly: each module of these may import only these, of the whole of ours.
ALLOWED_MODULES = {
    "train.run.exits": set(),
    "train.run.durable": set(),
    "train.run.json_lines": {"train.run.durable"},
    "train.run.folder": {"train.config", "train.run.durable", "train.run.exits"},
    "train.run.attempts": {
        "train.run.durable",
        "train.run.exits",
        "train.run.folder",
        "train.run.json_lines",
        "train.run.redact",
    },
    "train.run.redact": {"data_tools.terminal"},
    "train.run.signals": set(),
    "train.run.versions": set(),
    "train.run.launcher": {"train.run.exits", "train.run.signals"},
    "train.run.devices": {"train.run.exits"},
    "train.track.loss_watch": set(),
    "train.track.display": set(),
    "train.track.metrics_file": {"train.run.json_lines"},
    "train.track.isolated": {"train.run.redact", "train.track.metrics_file"},
    "train.engine.kernels": set(),
    "train.engine.copies": set(),
    "train.engine.plan": {"train.batching", "train.config"},
    "train.engine.operations": {"train.engine.kernels", "train.run.devices"},
    "train.engine.layers": set(),
    "train.engine.lora_linear": {"train.engine.layers", "train.engine.operations"},
    "train.engine.attention": {"train.collate", "train.config", "train.run.devices"},
    "train.engine.block": {
        "train.engine.attention",
        "train.engine.layers",
        "train.engine.lora_linear",
        "train.engine.operations",
    },
    "train.engine.families": {"train.engine.block", "train.engine.layers"},
    "train.engine.packed_weights": {"train.engine.layers"},
    "train.engine.host_stream": {
        "train.engine.copies",
        "train.engine.layers",
        "train.engine.packed_weights",
        "train.engine.plan",
    },
    "train.engine.packed_source": {"train.engine.copies", "train.engine.host_stream", "train.engine.layers"},
    "train.engine.weight_store": {"train.engine.block", "train.engine.packed_source"},
    "train.engine.hidden_store": {"train.engine.copies"},
    "train.engine.embedding": {"train.engine.copies", "train.engine.layers", "train.engine.operations"},
    "train.checkpoints.contents": {"train.run.exits"},
    "train.checkpoints.store": {
        "train.checkpoints.contents",
        "train.run.durable",
        "train.run.exits",
        "train.run.folder",
    },
    "train.memory.gpus": {"train.run.devices"},
    "train.memory.sizes": {
        "train.config",
        "train.engine.block",
        "train.engine.families",
        "train.engine.packed_weights",
        "train.loss",
        "train.optim",
    },
    "train.memory.candidate": {
        "train.batching",
        "train.config",
        "train.engine.plan",
        "train.memory.gpus",
        "train.memory.sizes",
        "train.run.devices",
    },
    "train.memory.cost": {
        "train.engine.copies",
        "train.engine.plan",
        "train.memory.candidate",
        "train.memory.sizes",
    },
    "train.memory.time": {"train.memory.candidate"},
    "train.memory.search": {
        "train.batching",
        "train.config",
        "train.engine.plan",
        "train.memory.candidate",
        "train.memory.cost",
        "train.memory.time",
    },
    "data_tools.readers": set(),
    "data_tools.terminal": set(),
    "data_tools.formats": set(),
    "data_tools.packing": set(),
    "data_tools.similarity": set(),
    "data_tools.records": {"data_tools.formats", "data_tools.readers", "data_tools.terminal"},
    "data_tools.render": {"data_tools.records"},
    "data_tools.truncation": {"data_tools.render"},
    "data_tools.prepare": {"data_tools.records", "data_tools.render", "data_tools.truncation"},
    "data_tools.preview": {"data_tools.render", "data_tools.terminal"},
    "data_tools.scan": {"data_tools.prepare", "data_tools.records", "data_tools.render", "data_tools.similarity"},
    "data_tools.audit": {"data_tools.prepare", "data_tools.scan", "data_tools.similarity", "data_tools.terminal"},
}


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path) for path in SOURCES}


def imports(path: Path) -> set[str]:
    """Modules that a file imports, also inside functions; of `from package import x` the module x, where it is one."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in full}
    return found


def room(name: str) -> str:
    """The package of train/, or the module directly in it, that a module is or is in; data_tools is one."""
    return "data_tools" if name.startswith("data_tools") else ".".join(name.split(".")[:2])


def test_the_arrows() -> None:
    """Packages import only what the table says, nobody imports main, and nothing imports in a circle."""
    ours = {module(path): imports(path) & MODULES for path in SOURCES}
    found: dict[str, set[str]] = {}
    for name, imported in ours.items():
        assert "train.main" not in imported, name
        beside = {room(other).removeprefix("train.") for other in imported if room(other) != room(name)}
        found[room(name)] = found.get(room(name), set()) | beside
    del found["train.main"]
    assert found == ALLOWED  # also what is allowed and not needed is gone from the table
    for name, allowed in ALLOWED_MODULES.items():
        assert ours[name] <= allowed, f"{name} imports {ours[name] - allowed}"
    graphlib.TopologicalSorter(ours).prepare()  # raises CycleError


def test_libraries_have_one_owner() -> None:
    """Only the named modules know peft, bitsandbytes, wandb and tyro; only runtime builds an Accelerator."""
    for path in SOURCES:
        for library, owners in LIBRARIES_WITH_ONE_OWNER.items():
            uses = any(name.split(".")[0] == library for name in imports(path))
            assert not uses or module(path) in owners, f"{module(path)} imports {library}"
        if module(path) != "train.run.accelerator":
            assert not re.search(r"\bAccelerator\(", path.read_text(encoding="utf-8")), path


def test_no_file_shadows_a_module() -> None:
    """`accelerate launch train/main.py` puts train/ first on sys.path, where profile.py would break cProfile."""
    taken = set(sys.stdlib_module_names) | set(packages_distributions())
    taken -= {"train", "data_tools"}
    own = {path.stem for path in (ROOT / "train").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert {"config", "run"} <= own  # a file and a folder
    assert not own & taken


def test_functions_fit_on_a_screen() -> None:
    """At most 60 lines and 6 parameters; a Triton kernel's are its tensors, strides and sizes, so it may have more."""
    functions = 0
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                functions += 1
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name}"
                names = [a.arg for a in (*node.args.args, *node.args.kwonlyargs) if a.arg != "self"]
                is_kernel = any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
                assert is_kernel or len(names) <= 6, f"{path.name}: {node.name}"
    assert functions > 80


PAIRS = {
    path.name: re.search(r"^launch (\S+\.yaml) (\S+)", path.read_text(encoding="utf-8"), re.MULTILINE)
    for path in sorted((ROOT / "launch").glob("*.sh"))
    if path.name not in ("_common.sh", "test.sh")
}


def test_every_profile_has_a_script_and_every_configuration_a_user() -> None:
    """The scripts in launch/ pair each profile with one accelerate configuration; none is left over."""
    assert all(PAIRS.values())
    matches = [match for match in PAIRS.values() if match]
    assert sorted(match[2] for match in matches) == sorted(PROFILES)
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


def test_test_command_is_what_ci_calls() -> None:
    """.ci/run calls exactly launch/test.sh, and README names both commands."""
    assert "exec bash launch/test.sh\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "bash launch/demo.sh" in readme
    assert "bash launch/test.sh" in readme


def test_readme_shows_the_tree() -> None:
    """README's *Read the code* names every package and module, and nothing that is not there."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    tree = readme.partition("## Read the code")[2].partition("```\n")[2].partition("```")[0]
    sections = dict(re.findall(r"^(\S+/) (.*(?:\n +.*)*)", tree, re.MULTILINE))
    packages = {f"train/{path.name}/" for path in (ROOT / "train").iterdir() if (path / "__init__.py").exists()}
    assert packages | {"data_tools/"} <= set(sections)
    for path in SOURCES:
        name = path.relative_to(ROOT).as_posix()
        if path.name == "__init__.py":
            continue
        if path.parent == ROOT / "train":
            assert name in tree, name
        else:
            words = re.findall(r"\w+", sections[f"{path.parent.relative_to(ROOT).as_posix()}/"])
            assert path.stem in words, name
    named = re.findall(r"(?<!\S)(?:train|data_tools)/\S+", tree)
    assert all((ROOT / name).exists() for name in named), named


def test_the_changelog_knows_the_version() -> None:
    """CHANGELOG has a section for the package's version, below the one for what is not released."""
    version = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"]
    sections = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sections[:2] == ["Unreleased", version]


def test_the_log_can_be_used() -> None:
    """Newest first, a verdict an idea; each constant's entry exists, and so does each file of standing results."""
    log = (ROOT / "docs" / "LOG.md").read_text(encoding="utf-8")
    dates = re.findall(r"^## (\d{4}-\d\d-\d\d)$", log, re.MULTILINE)
    assert len(dates) >= 4
    assert dates == sorted(dates, reverse=True)
    known = {"kept", "deleted", "failed", "not built", "mended", "measured", "superseded"}
    assert known <= set(re.findall(r"\*\*([a-z ]+)\*\* \(", log.partition("## Standing results")[0].replace("\n", " ")))
    headings = re.findall(r"^### (.+)$", log, re.MULTILINE)
    assert len(headings) > 50
    for heading in headings:
        assert heading.rpartition(": ")[2].partition(",")[0] in known, heading
    constants = log.partition("## Where the constants come from")[2].partition("\n## ")[0]
    entries = re.findall(r"\| \*(.+)\* \|$", constants, re.MULTILINE)
    assert len(entries) > 15
    for entry in entries:
        assert any(heading.startswith(entry) for heading in headings), entry
    standing = log.partition("## Standing results")[2].partition("\n## ")[0]
    files = set(re.findall(r"\w+\.json", standing))
    assert files == {path.name for path in (ROOT / "benchmarks" / "results").glob("*.json")}


def test_the_quick_tier_is_a_part_of_the_whole() -> None:
    """--quick runs some of the tests that the whole runs: all but the faults and the real command."""
    script = (ROOT / "launch" / "test.sh").read_text(encoding="utf-8")
    match = re.search(r"^quick=\((.+)\)$", script, re.MULTILINE)
    assert match is not None
    quick = [ROOT / name for name in match[1].split()]
    whole = {path for path in (ROOT / "tests").rglob("test_*.py") if not path.is_relative_to(ROOT / "tests" / "gpu")}
    chosen = {test for path in quick for test in ([path] if path.is_file() else path.rglob("test_*.py"))}
    assert all(path.exists() for path in quick)
    assert chosen < whole
    assert {test.parent.name for test in whole - chosen} == {"faults", "integration"}


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
    assert said("--quick", "-x") == [*checks, f"{suite} tests/test_project.py tests/unit tests/parity -x"]
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


def test_every_fault_has_a_test_and_a_row() -> None:
    """The faults that tests are marked with are those of the table in docs/RELIABILITY.md, T1 to T25."""
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "faults").glob("test_*.py")]
    marked = {number for source in sources for number in re.findall(r'pytest\.mark\.fault\("(T\d+)"\)', source)}
    assert marked == set(FAULTS) == {f"T{number}" for number in range(1, 26)}
    results = json.loads((ROOT / "benchmarks" / "results" / "faults.json").read_text(encoding="utf-8"))
    table = (ROOT / "docs" / "RELIABILITY.md").read_text(encoding="utf-8")
    for row in results["rows"]:
        assert f"| {row['test']} | {FAULTS[row['test']]} | {row['count']:,} | {row['failures']} |" in table


# Tests of what no single module has.
ACROSS_MODULES = {"test_loss_scale", "test_security", "test_chosen_plans"}


def test_unit_tests_mirror_the_tree() -> None:
    """Each file in tests/unit is named after the module that it tests, and lies where that module does."""
    files = sorted((ROOT / "tests" / "unit").rglob("test_*.py"))
    assert len(files) > 40
    for path in files:
        folder = path.parent.relative_to(ROOT / "tests" / "unit")
        base = ROOT if folder.as_posix() == "data_tools" else ROOT / "train"
        tested = base / folder / f"{path.stem.removeprefix('test_')}.py"
        assert tested.exists() or path.stem in ACROSS_MODULES, f"{path}: there is no {tested}"

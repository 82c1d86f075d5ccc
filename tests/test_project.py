"""The project's own rules: what imports what, how long functions are, what pairs with what."""

import ast
import json
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

from benchmarks.faults import FAULTS
from tests.conftest import ROOT
from train.profiles import PROFILES

SOURCES = sorted(path for folder in ("train", "data_tools") for path in (ROOT / folder).rglob("*.py"))
LIBRARIES_WITH_ONE_OWNER = {
    "peft": {"train.model"},
    "bitsandbytes": {
        "train.base",
        "train.model",
        "train.optim",
        "train.engine.lora_linear",
        "train.engine.packing",
        "train.engine.patch",
    },
    "triton": {"train.engine.kernels"},
    "wandb": {"train.trackers"},
    "tyro": {"train.cli"},
}
# Each may import of ours only what is named; what is not listed here is free of this table.
ALLOWED = {
    "train.config": set(),
    "train.exits": set(),
    "train.hardware": {"train.exits"},
    "train.scrub": set(),
    "train.signals": set(),
    "train.watch": set(),
    "train.launcher": {"train.exits", "train.signals"},
    "train.collate": set(),
    "train.engine.kernels": set(),
    "train.engine.operations": {"train.engine.kernels", "train.hardware"},
    "train.engine.lora_linear": {"train.engine.operations"},
    "train.engine.attention": {"train.collate", "train.config", "train.hardware"},
    "train.engine.block": {"train.engine.attention", "train.engine.lora_linear", "train.engine.operations"},
    "train.engine.copies": set(),
    "train.engine.packing": {"train.engine.copies"},
    "train.engine.hidden_store": {"train.engine.copies"},
    "train.engine.weight_store": {
        "train.engine.block",
        "train.engine.copies",
        "train.engine.packing",
        "train.plan",
    },
    "train.engine.stack": {
        "train.engine.block",
        "train.engine.hidden_store",
        "train.engine.operations",
        "train.engine.weight_store",
    },
    "train.engine.graphs": {
        "train.collate",
        "train.engine.attention",
        "train.engine.block",
        "train.engine.stack",
        "train.engine.weight_store",
        "train.plan",
    },
    "train.engine.embedding": {"train.engine.copies", "train.engine.operations"},
    "train.loss": {"train.engine.operations"},
    "train.cards": {"train.hardware"},
    "train.passes": set(),
    "train.plan": {"train.cards", "train.config", "train.engine.copies", "train.hardware", "train.passes"},
    "train.metrics": set(),
    "train.optim": {"train.config"},
    "train.profiles": {"train.config"},
    "train.cli": {"train.config", "train.exits", "train.profiles"},
    "train.checkpoint": {"train.exits"},
    "data_tools.similarity": set(),
    "data_tools.preview": {"data_tools.render"},
    "data_tools.scan": {"data_tools.prepare", "data_tools.records", "data_tools.render", "data_tools.similarity"},
    "data_tools.audit": {"data_tools.prepare", "data_tools.preview", "data_tools.scan", "data_tools.similarity"},
    "train.data": {
        "train.collate",
        "train.config",
        "data_tools.packing",
        "data_tools.prepare",
        "data_tools.records",
        "train.passes",
    },
    "data_tools.readers": set(),
    "data_tools.formats": set(),
    "data_tools.packing": set(),
    "data_tools.records": {"data_tools.formats", "data_tools.readers"},
    "data_tools.render": {"data_tools.records"},
    "data_tools.truncation": {"data_tools.render"},
    "data_tools.prepare": {"data_tools.records", "data_tools.render", "data_tools.truncation"},
}


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(path: Path) -> set[str]:
    """Modules that a file imports, also inside functions; `from train import x` counts as train.x."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            name = node.module or ""
            found |= (
                {f"{name}.{alias.name}" for alias in node.names}
                if name in ("train", "train.engine", "data_tools")
                else {name}
            )
    return found


def test_the_arrows() -> None:
    """Nobody imports main, data_tools knows nothing of train, and the inner modules import only what they may."""
    seen = {module(path): imports(path) for path in SOURCES}
    assert ALLOWED.keys() <= seen.keys()
    for name, imported in seen.items():
        ours = {other for other in imported if other.split(".")[0] in ("train", "data_tools")}
        assert "train.main" not in ours, name
        if name.startswith("data_tools"):
            assert not any(other.startswith("train") for other in ours), name
        if name in ALLOWED:
            assert ours <= ALLOWED[name], f"{name} imports {ours - ALLOWED[name]}"


def test_libraries_have_one_owner() -> None:
    """Only the named modules know peft, bitsandbytes, wandb and tyro; only runtime builds an Accelerator."""
    for path in SOURCES:
        for library, owners in LIBRARIES_WITH_ONE_OWNER.items():
            uses = any(name.split(".")[0] == library for name in imports(path))
            assert not uses or module(path) in owners, f"{module(path)} imports {library}"
        if module(path) != "train.runtime":
            assert not re.search(r"\bAccelerator\(", path.read_text(encoding="utf-8")), path


def test_no_file_shadows_a_module() -> None:
    """`accelerate launch train/main.py` puts train/ first on sys.path, where profile.py would break cProfile."""
    taken = set(sys.stdlib_module_names) | set(packages_distributions())
    taken -= {"train", "data_tools"}
    own = {path.stem for path in (ROOT / "train").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert "checkpoint" in own
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


def test_every_fault_has_a_test_and_a_row() -> None:
    """The faults that tests are marked with are those of the table in docs/RELIABILITY.md, T1 to T25."""
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests" / "faults").glob("test_*.py")]
    marked = {number for source in sources for number in re.findall(r'pytest\.mark\.fault\("(T\d+)"\)', source)}
    assert marked == set(FAULTS) == {f"T{number}" for number in range(1, 26)}
    results = json.loads((ROOT / "benchmarks" / "results" / "faults.json").read_text(encoding="utf-8"))
    table = (ROOT / "docs" / "RELIABILITY.md").read_text(encoding="utf-8")
    for row in results["rows"]:
        assert f"| {row['test']} | {FAULTS[row['test']]} | {row['count']:,} | {row['failures']} |" in table

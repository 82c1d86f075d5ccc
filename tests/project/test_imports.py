"""Who imports whom, and who owns which library."""

import ast
import graphlib
import re
import sys
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

from tests.conftest import ROOT
from tests.project.arrows import ALLOWED, ALLOWED_MODULES
from tests.project.sources import SOURCES

LIBRARIES_WITH_ONE_OWNER = {
    "peft": {"train.models.adapters", "train.models.language_model", "train.models.targets"},
    "bitsandbytes": {
        "train.engine.lora_linear",
        "train.engine.mxfp4",
        "train.engine.packed_weights",
        "train.engine.support",
        "train.models.base",
        "train.models.completeness",
        "train.models.experts",
        "train.models.held_weights",
        "train.models.language_model",
        "train.models.mxfp4",
        "train.models.parameters",
        "train.optim",
    },
    "triton": {
        "train.engine.dropout_kernels",
        "train.engine.fp8_kernels",
        "train.engine.grouped_gates",
        "train.engine.grouped_kernels",
        "train.engine.kernels",
        "train.optim_kernels",
    },
    "liger_kernel": {"train.models.liger"},
    "wandb": {"train.track.offline_records", "train.track.weights_and_biases"},
    "mlflow": {"train.track.mlflow_tracker"},
    "tensorboard": set(),  # torch's writer imports it, for train.track.tensorboard_tracker
    "fsspec": {"train.checkpoints.remote"},
    "tyro": {"train.cli"},
    "dotenv": {"train.run.hub_token"},
    "matplotlib": {"train.report.drawing"},
    "jinja2": {"data_tools.chat_template", "train.report.page"},
    "prompt_toolkit": {"train.commands.chat_screen"},
    "gguf": set(),  # train.deliver.optional imports it and llama_cpp by name
    "llama_cpp": set(),
}


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(path) for path in SOURCES}


@cache
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

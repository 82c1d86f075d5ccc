"""Who imports whom, and who owns which library."""

import ast
import graphlib
import re
import sys
from importlib.metadata import packages_distributions
from pathlib import Path

from tests.conftest import ROOT
from tests.project.sources import SOURCES

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
    "train.checkpoints": {"batching", "config", "data", "data_tools", "models", "optim", "run", "step", "track"},
    "train.deliver": {"checkpoints", "data_tools", "models", "run"},
    "train.loop": {"checkpoints", "memory", "metrics", "run", "step", "track"},
    "train.attempt_record": {"checkpoints", "data_tools", "run", "step"},
    "train.banner": {"checkpoints", "config", "data", "data_tools", "profiles", "run", "step"},
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
    "data_tools.abilities": {
        "data_tools.chat_template",
        "data_tools.messages",
        "data_tools.records",
        "data_tools.render",
    },
    "data_tools.audit": {
        "data_tools.data_lines",
        "data_tools.prepare",
        "data_tools.scan",
        "data_tools.similarity",
        "data_tools.terminal",
    },
    "data_tools.audit_report": {
        "data_tools.abilities",
        "data_tools.audit",
        "data_tools.data_lines",
        "data_tools.terminal",
    },
    "data_tools.chat_template": {"data_tools.messages"},
    "data_tools.data_lines": {"data_tools.prepare", "data_tools.terminal"},
    "data_tools.data_sets": {"data_tools.readers"},
    "data_tools.encode": set(),
    "data_tools.facts": {"data_tools.messages", "data_tools.records", "data_tools.similarity"},
    "data_tools.formats": {
        "data_tools.messages",
        "data_tools.strict_json",
        "data_tools.tool_calls",
        "data_tools.values",
    },
    "data_tools.glossary": {"data_tools.glossary_files", "data_tools.report"},
    "data_tools.glossary_files": {"data_tools.report"},
    "data_tools.locate": {"data_tools.messages"},
    "data_tools.making": {
        "data_tools.facts",
        "data_tools.records",
        "data_tools.render",
        "data_tools.report",
        "data_tools.truncation",
    },
    "data_tools.messages": {"data_tools.strict_json", "data_tools.tool_calls", "data_tools.values"},
    "data_tools.packing": set(),
    "data_tools.prepare": {
        "data_tools.chat_template",
        "data_tools.facts",
        "data_tools.making",
        "data_tools.progress",
        "data_tools.records",
        "data_tools.render",
        "data_tools.report",
        "data_tools.sources",
        "data_tools.truncation",
    },
    "data_tools.preview": {"data_tools.encode", "data_tools.terminal"},
    "data_tools.progress": set(),
    "data_tools.questions": {
        "data_tools.chat_template",
        "data_tools.locate",
        "data_tools.messages",
        "data_tools.records",
    },
    "data_tools.readers": {"data_tools.strict_json"},
    "data_tools.records": {
        "data_tools.data_sets",
        "data_tools.formats",
        "data_tools.messages",
        "data_tools.readers",
        "data_tools.report",
        "data_tools.sources",
    },
    "data_tools.render": {
        "data_tools.chat_template",
        "data_tools.encode",
        "data_tools.locate",
        "data_tools.questions",
        "data_tools.records",
        "data_tools.turns",
    },
    "data_tools.report": {"data_tools.terminal"},
    "data_tools.scan": {"data_tools.encode", "data_tools.prepare", "data_tools.similarity"},
    "data_tools.similarity": set(),
    "data_tools.sources": {"data_tools.data_sets", "data_tools.readers", "data_tools.report", "data_tools.terminal"},
    "data_tools.strict_json": set(),
    "data_tools.terminal": set(),
    "data_tools.tool_calls": {"data_tools.strict_json", "data_tools.values"},
    "data_tools.truncation": {"data_tools.render"},
    "data_tools.turns": {"data_tools.chat_template", "data_tools.encode", "data_tools.locate", "data_tools.messages"},
    "data_tools.values": {"data_tools.strict_json"},
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

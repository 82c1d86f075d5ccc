"""No source unpickles, or executes what it reads, and the scan that says so is tried itself."""

import ast
import builtins
import re

import pytest

from tests.conftest import ROOT
from tests.project.sources import files_in

SOURCES = files_in("train", "data_tools", "benchmarks", "demo")

# Modules that unpickle or execute their input, with all their submodules.
BANNED_MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve", "runpy"}
BANNED_MODULES |= {f"torch.{part}" for part in ("jit", "hub", "package", "serialization", "distributed.checkpoint")}
BANNED_NAMES = {"torch.load", "torch.save", "os.system", "os.popen", "numpy.load"}
BANNED_NAMES |= {f"yaml.{name}" for name in ("load", "load_all", "full_load", "unsafe_load", "Loader", "UnsafeLoader")}
BANNED_NAMES |= {f"builtins.{name}" for name in ("eval", "exec", "compile", "__import__")}
# last parts of names: accelerate's checkpoints, and collectives that pickle
BANNED_SUFFIXES = (
    "save_state",
    "load_state",
    "register_for_checkpointing",
    "to_pickle",
    "read_pickle",
    "add_safe_globals",
)
OBJECT_COLLECTIVE = re.compile(r"(broadcast|gather|scatter|send|recv|all_gather)_object(_list)?")
MUST_BE_FALSE = ("shell", "trust_remote_code", "allow_pickle", "use_gather_object")


def imported(tree: ast.Module) -> list[tuple[int, str, str]]:
    """(line, local name, full name) of every import."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.asname or alias.name, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [(node.lineno, alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names]
    return found


def full_name(node: ast.AST, aliases: dict[str, str]) -> str:
    """The full name of `a.b.c`, whatever alias it was imported under."""
    if isinstance(node, ast.Attribute):
        return f"{full_name(node.value, aliases)}.{node.attr}"
    if isinstance(node, ast.Name):
        return aliases.get(node.id, f"builtins.{node.id}" if hasattr(builtins, node.id) else f"?{node.id}")
    return "?"


def is_banned(name: str) -> bool:
    """Whether this full name unpickles or executes; our own functions may share names with accelerate's."""
    end = name.rpartition(".")[2]
    if name.startswith(("train.", "data_tools.")):
        return False
    of_module = any(name == module or name.startswith(f"{module}.") for module in BANNED_MODULES)
    return of_module or name in BANNED_NAMES or end in BANNED_SUFFIXES or bool(OBJECT_COLLECTIVE.fullmatch(end))


def is_unsafe_option(node: ast.AST, aliases: dict[str, str]) -> bool:
    """Whether an option that must be False may be something else, or getattr fetches a function from a module."""
    if isinstance(node, ast.keyword) and node.arg in MUST_BE_FALSE:
        return not (isinstance(node.value, ast.Constant) and node.value.value is False)
    if isinstance(node, ast.Constant):
        return node.value in MUST_BE_FALSE[1:]
    is_getattr = isinstance(node, ast.Call) and full_name(node.func, aliases) == "builtins.getattr"
    return is_getattr and isinstance(node.args[0], ast.Name) and node.args[0].id in aliases


def offences(source: str) -> list[str]:
    """The lines of a source that could execute what they read."""
    tree = ast.parse(source)
    imports = imported(tree)
    aliases = {local: name for _, local, name in imports if "." not in local}
    aliases |= {local.partition(".")[0]: local.partition(".")[0] for _, local, _ in imports if "." in local}
    found = [f"line {line}: {name}" for line, _, name in imports if is_banned(name)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute) and is_banned(full_name(node, aliases)):
            found.append(f"line {node.lineno}: {full_name(node, aliases)}")
        elif is_unsafe_option(node, aliases):
            found.append(f"line {getattr(node, 'lineno', 0)}: {ast.unparse(node)}")
    return found


EVASIONS = (
    "import pickle",
    "from pickle import loads as read",
    "import torch as t\nt.load('x')",
    "from torch import load\nload('x')",
    "from torch import save as keep",
    "import torch.distributed.checkpoint as dcp",
    "from torch.distributed import checkpoint",
    "from torch.jit import load",
    "import numpy as np\nnp.load('x', allow_pickle=True)",
    "import torch\ngetattr(torch, 'lo' + 'ad')('x')",
    "from yaml import load, Loader",
    "import yaml as y\ny.unsafe_load('x')",
    "eval('1')",
    "run = exec",
    "__import__('pickle')",
    "import subprocess\nsubprocess.run('ls', shell=True)",
    "import subprocess\nsubprocess.run('ls', shell=option)",
    "import os\nos.system('ls')",
    "AutoModel.from_pretrained('x', trust_remote_code=option)",
    "AutoModel.from_pretrained('x', **{'trust_remote_code': True})",
    "from accelerate.utils import broadcast_object_list as tell",
    "import torch.distributed as dist\ndist.all_gather_object(a, b)",
    "accelerator.gather_for_metrics(x, use_gather_object=True)",
    "accelerator.save_state('x')",
    "import marshal, shelve",
    "def f():\n    from joblib import load",
)
HARMLESS = (
    "from safetensors.torch import load, save\nload(b'')",
    "import safetensors.torch\nsafetensors.torch.load(b'')",
    "model.eval()",
    "AutoModel.from_pretrained('x', trust_remote_code=False)",
    "import json, yaml\nyaml.compose('x')\njson.load(file)",
    "import re\nre.compile('x')",
    "wrap(tokenizer_object=tokenizer)",
)


def test_nothing_unpickles_or_runs_foreign_code() -> None:
    """No source has pickle under any name, eval, a shell, remote code or object collectives."""
    assert len(SOURCES) > 40
    found = {str(path.relative_to(ROOT)): offences(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert {path: what for path, what in found.items() if what} == {}


@pytest.mark.parametrize("source", EVASIONS)
def test_the_scan_finds(source: str) -> None:
    """The scan finds each of these evasions."""
    assert offences(source)


@pytest.mark.parametrize("source", HARMLESS)
def test_the_scan_lets_pass(source: str) -> None:
    """The scan accepts harmless code that looks similar."""
    assert offences(source) == []


def test_every_load_of_a_base_forbids_its_code_and_its_pickles() -> None:
    """Each from_pretrained has trust_remote_code=False, and those of weights also use_safetensors=True."""
    calls = []
    for path in (p for p in SOURCES if p.relative_to(ROOT).parts[0] in ("train", "data_tools", "benchmarks", "demo")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and node.func.attr == "from_pretrained"
                and ast.unparse(node.func.value) != "GenerationConfig"  # reads only a JSON file
            ):
                given = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
                assert given.get("trust_remote_code") is False, f"{path.name}:{node.lineno}"
                if "Model" in ast.unparse(node.func) or ast.unparse(node.func) == "kind.from_pretrained":
                    assert given.get("use_safetensors") is True, f"{path.name}:{node.lineno}"
                calls.append(ast.unparse(node.func))
    assert {"AutoTokenizer.from_pretrained", "kind.from_pretrained"} <= set(calls)

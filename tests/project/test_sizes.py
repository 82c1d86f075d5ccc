"""Functions and files are short."""

import ast

from tests.conftest import ROOT
from tests.project.sources import SOURCES, files_in

LONG_FILES = {
    "demo/make_base.py": "half of it are the word lists of its grammar",
    "tests/power_cut.py": "one simulator of one disk",
    "tests/project/arrows.py": "the table of who may import whom",
    "train/config.py": "every option beside its docstring, in one place",
}


def test_functions_fit_on_a_screen() -> None:
    """At most 60 lines, and in the product 6 parameters.

    A Triton kernel's are its tensors, strides and sizes, so it may have more.
    """
    functions = 0
    for path in files_in("train", "data_tools", "tests", "benchmarks", "demo"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                functions += 1
                assert node.end_lineno is not None
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"
                names = [a.arg for a in (*node.args.args, *node.args.kwonlyargs) if a.arg != "self"]
                is_kernel = any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)
                assert path not in SOURCES or is_kernel or len(names) <= 6, f"{path}: {node.name}"
    assert functions > 1000


def test_files_are_short() -> None:
    """At most 300 lines, but for those in LONG_FILES, which are really longer."""
    paths = files_in("train", "data_tools", "tests", "benchmarks", "demo", "launch")
    long = {path.relative_to(ROOT).as_posix() for path in paths if path.read_text(encoding="utf-8").count("\n") > 300}
    assert len(paths) > 150
    assert long == set(LONG_FILES)

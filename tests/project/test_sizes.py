"""Functions and files are short."""

import ast

from tests.project.sources import SOURCES


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

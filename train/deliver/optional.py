"""Packages that only an export needs, and that are not installed with the others."""

import importlib
from types import ModuleType

from train.bundled import how_to_install
from train.run.exits import ExitCode, ExitWith

# as a shell takes it; llama.cpp is compiled, in three minutes on two cores
INSTALL = how_to_install("gguf")
COMPILES = "which compiles llama.cpp for some minutes"


def package(name: str) -> ModuleType:
    """`gguf`, or `llama_cpp`, which compiles llama.cpp; raises ExitWith(BAD_INPUT) with the way to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        reason = (
            f"the package {name} is needed, and cannot be imported ({error}).\nInstall it, {COMPILES}:\n  {INSTALL}"
        )
        raise ExitWith(ExitCode.BAD_INPUT, reason) from None

"""What train/main.py does before imports that take seconds, so that `--help` and refusals do not wait for them."""

import importlib
import os
import sys
from typing import TYPE_CHECKING

from train.run.packages import check_packages

if TYPE_CHECKING:
    from train.run.signals import StopRequest


LIBRARIES = ("HF_", "TORCH_", "ACCELERATE_", "TRANSFORMERS_", "BITSANDBYTES_", "BNB_")  # begin their variables' names


def begin(words: "list[str]") -> "StopRequest":
    """Listens for signals from now on; ends the process after `--help`, and where the command line is refused."""
    check_packages()
    from train.run.redact import print_redacted
    from train.run.signals import StopRequest, follow_launcher, leave_note
    from train.run.streams import guard_streams

    guard_streams()
    sys.excepthook = print_redacted
    stop = StopRequest()
    follow_launcher()
    from train.cli import parse
    from train.run.exits import ExitWith
    from train.run.last_words import say_end

    try:
        parse(words)
        _import_libraries()
    except ExitWith as end:
        say_end(end)
        sys.exit(end.code)
    except SystemExit:  # --help, --print-config
        leave_note(0)
        raise
    return stop


def _import_libraries() -> None:
    """Imports what the job needs; raises ExitWith(BAD_INPUT) where a library gives up on one of its variables."""
    from train.run.exits import ExitCode, ExitWith

    try:
        importlib.import_module("train.assemble")
    except Exception as error:
        said = str(error).strip() or type(error).__name__
        theirs = {name: value for name, value in os.environ.items() if name.startswith(LIBRARIES) and value}
        repeated = [name for name, value in theirs.items() if value.lower() in said.lower()]
        if not repeated:
            raise
        name = max(repeated, key=lambda each: len(theirs[each]))
        variable, told = f"{name}={theirs[name]}", said.splitlines()[0]
        reason = f"the environment variable {variable} ends an import: {told}; correct it, or leave it out"
        raise ExitWith(ExitCode.BAD_INPUT, reason) from None

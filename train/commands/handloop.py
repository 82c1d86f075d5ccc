"""The `handloop` command: every tool except training."""

import difflib
import importlib
import io
import os
import sys
from collections.abc import Sequence

from data_tools.report import DataError
from train.run.exits import ExitCode, ExitWith
from train.run.hub_token import take_token
from train.run.redact import redact

# Each command is the module of its name in this package; its `main` takes the remaining words, returns the exit code.
COMMANDS = {
    "preview": "show the samples token by token, trained and masked",
    "audit": "audit the data before training; exit 78 if it should not be trained on",
    "glossary": "turn a glossary into prompt/response JSONL",
    "plan": "predict memory and speed before any weights are read",
}
_LINES = "\n".join(f"  {name:9} {what}" for name, what in COMMANDS.items())
USAGE = f"usage: handloop COMMAND [options]\n\n{_LINES}\n\nhandloop COMMAND --help lists its options"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code; an error becomes one message on stderr."""
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for terminals without UTF-8
    take_token()
    try:
        return _run(words)
    except ExitWith as end:
        code, reason = end.code, end.reason
    except (DataError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # the reader, such as head, has closed the pipe
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        code, reason = ExitCode.BAD_INPUT, str(error)
    print(f"\nhandloop: {redact(reason)}", file=sys.stderr, flush=True)
    return int(code)


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if words[0] in COMMANDS:
        return importlib.import_module(f"train.commands.{words[0]}").main(words[1:])
    near = difflib.get_close_matches(words[0], COMMANDS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ExitWith(ExitCode.BAD_INPUT, f"unknown command {words[0]!r}{hint}\n{USAGE}")

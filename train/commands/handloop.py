"""The `handloop` command: tools that are not the training itself."""

import difflib
import importlib
import io
import os
import sys
from collections.abc import Sequence

from data_tools.records import DataError
from train.run.exits import ExitCode, ExitWith
from train.run.redact import redact

# Each is the module of that name beside this one, whose `main` takes the words behind it and returns the exit code.
COMMANDS = {
    "preview": "show, token by token, what is trained on",
    "audit": "judge the data before it is trained on; exit 78 where it must not be",
    "glossary": "turn a glossary into prompt/response JSONL",
    "plan": "memory and speed before a byte of weights is read",
}
_LINES = "\n".join(f"  {name:9} {what}" for name, what in COMMANDS.items())
USAGE = f"usage: handloop COMMAND [options]\n\n{_LINES}\n\nhandloop COMMAND --help tells the options of one"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; whatever ends it early is said in one message. Returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal without UTF-8 still shows all of it
    try:
        return _run(words)
    except ExitWith as end:
        code, reason = end.code, end.reason
    except (DataError, OSError) as error:
        if isinstance(error, BrokenPipeError):  # the reader, such as head, has seen enough
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
    raise ExitWith(ExitCode.BAD_INPUT, f"no command {words[0]!r}{hint}\n{USAGE}")

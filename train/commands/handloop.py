"""The `handloop` command."""

import importlib
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import FrameType

from data_tools.report import DataError
from data_tools.spelling import nearest
from data_tools.terminal import fitted
from train.run.defects import print_defect
from train.run.exits import ExitCode, ExitWith
from train.run.hub_token import take_token
from train.run.packages import check_docstrings
from train.run.redact import redact
from train.run.streams import guard_messages, lead_to_null
from train.run.versions import package_version

# Each command is the module of its name in this package, _ for -; its `main` takes the remaining words, returns the
# exit code.
COMMANDS = {
    "train": "train with a profile, or go on with an interrupted run",
    "preview": "show the samples token by token, trained and masked",
    "audit": "judge the data before training; exit 78 if it is bad",
    "glossary": "turn a glossary into prompt/response JSONL",
    "chat": "talk to a run's model, or to any model",
    "compare": "ask base and tuned model the same: what was learnt, what lost",
    "import-config": "another trainer's configuration file -> our command",
    "plan": "predict memory and speed before any weights are read",
    "merge": "add a run's adapters to its base's weights, with a receipt",
    "report": "write a page on runs: curves, answers, options, memory",
    "runs": "list runs, or compare some: options, results",
    "sync": "upload to Weights & Biases what was recorded offline",
    "export": "write adapter, merged model, GGUF or for Ollama; send to the hub",
}
_LINES = "\n".join(f"  {name:13} {what}" for name, what in COMMANDS.items())
LESS_MEMORY = (
    "the GPU has not enough free memory: --memory.budget below what is free leaves more of the model in host memory, "
    "--run.device cpu needs no GPU; shorter answers need less (compare and chat: fewer new tokens)"
)
_MORE = "handloop COMMAND --help lists its options, --version says which this is"
USAGE = f"usage: handloop COMMAND [options]\n\n{_LINES}\n\n{_MORE}"


class Terminated(BaseException):
    """SIGTERM or SIGHUP: the command unwinds, so that what it has written by halves is removed."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code; an error becomes one message on stderr."""
    if argv is None:  # the script, whose streams are the process's own
        guard_messages()
        check_docstrings()
    words = list(sys.argv[1:] if argv is None else argv)
    take_token()
    try:
        if argv is None:
            _unwind_on_signals()
        code = _run(words)
        sys.stdout.flush()
        return code
    except SystemExit as leaving:  # after --help, or by rich, which hides a broken pipe so
        if not isinstance(leaving.__context__, BrokenPipeError):
            raise
        code, reason = 0, ""
    except BaseException as error:
        code, reason = _end_by(error, words)
    if reason:
        print(fitted(f"\nhandloop: {redact(reason)}", sys.stderr), file=sys.stderr, flush=True)
    return code


def _end_by(error: BaseException, words: Sequence[str]) -> tuple[int, str]:
    """Exit code and message; without a message if whoever has called the command knows why it ends."""
    if isinstance(error, ExitWith):
        return error.code, error.reason
    if isinstance(error, KeyboardInterrupt):
        return 128 + signal.SIGINT, ""
    if isinstance(error, Terminated):
        return 128 + error.number, ""
    if isinstance(error, OSError):
        with suppress(OSError, ValueError):  # what is left in the buffer would be tried again at the end
            lead_to_null(sys.stdout.fileno())
        # the reader, such as head, has closed the pipe
        return (0, "") if isinstance(error, BrokenPipeError) else (ExitCode.BAD_INPUT, str(error))
    if isinstance(error, DataError | MemoryError):
        return ExitCode.BAD_INPUT, str(error) or "out of memory"
    torch = sys.modules.get("torch")  # not imported for this: it takes seconds
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return ExitCode.BAD_INPUT, f"{str(error).partition(chr(10))[0]}\n{LESS_MEMORY}"
    return ExitCode.DEFECT, print_defect(error, f"running handloop {' '.join(words[:1])}", words)


def _unwind_on_signals() -> None:
    """Raises Terminated at the first SIGTERM or SIGHUP and ignores further ones, which would cut the removal short.

    One that this process was started to ignore (nohup: SIGHUP) stays ignored.
    """
    numbers = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) != signal.SIG_IGN]

    def end(number: int, frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise Terminated(number)

    for number in numbers:
        signal.signal(number, end)


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(USAGE)
        return 0
    if words[0] == "--version":
        print(f"handloop {package_version('handloop')}")
        return 0
    if words[0] in COMMANDS:
        module = words[0].replace("-", "_")
        return importlib.import_module(f"train.commands.{module}").main(words[1:])
    near = nearest(words[0], COMMANDS)
    hint = f"; did you mean {near}?" if near else ""
    raise ExitWith(ExitCode.BAD_INPUT, f"unknown command {words[0]!r}{hint}\n{USAGE}")


if __name__ == "__main__":
    sys.exit(main())

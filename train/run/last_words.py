"""What launcher and user are told when a run ends. Imports nothing heavy: a refused command line ends so, too."""

import os
import sys
from contextlib import suppress
from pathlib import Path

from train.run.durable import write_atomically
from train.run.environment import is_first_process
from train.run.exits import ExitCode, ExitWith, OwnEnd
from train.run.redact import redact
from train.run.signals import leave_note


def say_end(end: ExitWith) -> None:
    """Tells the launcher and, unless all went well, the user; nothing comes after it."""
    launcher = os.environ.get("HANDLOOP_LAUNCHER")
    if launcher and is_recorder(end, Path(launcher) / "exit"):
        with suppress(OSError):
            # two processes may end at the same moment
            write_atomically(Path(launcher) / "exit", f"{int(end.code)}\n", replaces=end.code != ExitCode.PEER_FAILURE)
    leave_note(end.code, redact(end.reason))
    is_own_matter = end.code in (ExitCode.PEER_FAILURE, ExitCode.DEFECT) or isinstance(end, OwnEnd)
    if end.code != ExitCode.FINISHED and (is_first_process() or is_own_matter):
        with suppress(OSError):  # a terminal that is gone
            print(f"\nhandloop: {redact(end.reason)}", file=sys.stderr, flush=True)


def is_recorder(end: ExitWith, record: Path) -> bool:
    """Whether this process records how the run ended.

    The first one does. Another one does where it is the cause, or where the first may be dead; a peer failure, which is
    only the consequence, replaces no record.
    """
    if end.code == ExitCode.PEER_FAILURE:
        return not record.exists()
    return is_first_process() or end.code == ExitCode.DEFECT or isinstance(end, OwnEnd)

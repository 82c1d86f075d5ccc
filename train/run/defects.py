"""What is kept of a defect: what was being done, the traceback, the versions, the command; without secrets."""

import shlex
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from train.run.durable import make_folder, write_atomically
from train.run.redact import redact
from train.run.signals import tell_doing
from train.run.versions import code_version, versions


class Doing:
    """What this process is doing, in words; exit.json and the report of a defect say it.

    The launcher is told as well, because a process that is killed cannot say it.
    """

    def __init__(self) -> None:
        self.now = "reading the command line"

    @property
    def now(self) -> str:
        """What it is doing, such as `training, step 12`."""
        return self._now

    @now.setter
    def now(self, what: str) -> None:
        self._now = what
        tell_doing(what)


def report_defect(path: Path, error: BaseException, doing: str, argv: Sequence[str]) -> str:
    """Writes the report to `path`, or to stderr where that fails; returns what a user should know."""
    try:
        make_folder(path.parent)
        write_atomically(path, _report(error, doing, argv))
    except OSError:
        return print_defect(error, doing, argv)
    return _told(error, doing, f"in {path}")


def print_defect(error: BaseException, doing: str, argv: Sequence[str]) -> str:
    """The same with the report on stderr."""
    print(_report(error, doing, argv), file=sys.stderr, flush=True)
    return _told(error, doing, "above")


def _told(error: BaseException, doing: str, where: str) -> str:
    lines = str(error).strip().splitlines() or ["without a message"]
    return (
        f"a defect of Handloop, while {doing}: {type(error).__name__}: {lines[0]}\n"
        f"the report is {where}; please send it to Handloop's developers"
    )


def _report(error: BaseException, doing: str, argv: Sequence[str]) -> str:
    numbers = ", ".join(f"{name} {number}" for name, number in versions().items())
    heading = f"doing     {doing}\ncommand   {shlex.join(argv)}\ncode      {code_version()}\nversions  {numbers}\n"
    return redact(heading + "\n" + "".join(traceback.format_exception(error)))

"""What train/main.py does before imports that take seconds, so that `--help` and refusals do not wait for them."""

import sys
from typing import TYPE_CHECKING

from train.run.packages import check_packages

if TYPE_CHECKING:
    from train.run.signals import StopRequest


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
    except ExitWith as end:
        say_end(end)
        sys.exit(end.code)
    except SystemExit:  # --help, --print-config
        leave_note(0)
        raise
    return stop

"""Stop signals. Imports nothing heavy: main installs the handlers before imports that take seconds."""

import ctypes
import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import FrameType

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
PR_SET_PDEATHSIG = 1

Handler = Callable[[int, FrameType | None], None]


def listen(handler: Handler) -> None:
    """Calls `handler` on every stop signal, except those that this process was started to ignore (nohup: SIGHUP)."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN or number == signal.SIGINT:
            signal.signal(number, handler)


class StopRequest:
    """Remembers the first stop signal; training stops at the next step boundary, never in the handler.

    Launchers and schedulers send SIGTERM and SIGUSR1 more than once, so the process ends at once only on a Ctrl-C that
    comes more than a second after the first signal.
    """

    def __init__(self) -> None:
        self.received = ""
        self.received_at = 0.0  # time.monotonic()
        listen(self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self.received and now - self.received_at > 1:
            os._exit(128 + number)
        if not self.received:
            self.received, self.received_at = signal.Signals(number).name, now
            with suppress(OSError):  # the terminal may be closed
                os.write(2, b"\nstopping at the next step; Ctrl-C again ends at once, without saving\n")

    def is_received(self) -> bool:
        """Whether this process was asked to stop."""
        return bool(self.received)


def follow_launcher() -> None:
    """Registers this process with Handloop's launcher, and asks for a SIGTERM when accelerate or torchrun dies.

    accelerate's single-process launcher dies of SIGTERM without forwarding it; the kernel then sends it instead.
    """
    folder = os.environ.get("HANDLOOP_LAUNCHER")
    if folder:
        with suppress(OSError):
            (Path(folder) / f"pid-{os.getpid()}").touch()
    if "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        parent = os.getppid()
        stop_with_parent()
        if os.getppid() != parent:  # it died before stop_with_parent()
            os.kill(os.getpid(), signal.SIGTERM)


def stop_with_parent() -> None:
    """Asks the kernel for a SIGTERM when the parent process ends; does nothing except on Linux."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

"""Stop signals, and what the launcher is told. Imports nothing heavy: main does this before imports that take seconds.

In the folder HANDLOOP_LAUNCHER every trainer process has a file `pid-N`, which holds its rank, `doing-N`, and at its
end, whatever end that is, a note `end-N` with its exit code, and why in `reason-N`. A process that is gone without a
note has crashed, which `crash-N` says, or was killed. The first process names the run folder in `run`, and leaves the
exit code in `exit`.
"""

import atexit
import ctypes
import faulthandler
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
PR_SET_PDEATHSIG = 1

Handler = Callable[[int, FrameType | None], None]


def listen(handler: Handler) -> dict[signal.Signals, Any]:
    """Calls `handler` on every stop signal, except those that this process was started to ignore (nohup: SIGHUP).

    Returns the handlers that were there before.
    """
    before = {}
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN or number == signal.SIGINT:
            before[number] = signal.signal(number, handler)
    return before


class StopRequest:
    """Remembers the first stop signal; training stops after the micro-batch under way, never in the handler.

    Launchers and schedulers send SIGTERM and SIGUSR1 more than once, so the process ends at once only on a Ctrl-C that
    comes more than a second after the first signal.
    """

    def __init__(self, listens: bool = True) -> None:
        """Listens from now on; otherwise only within `listening`."""
        self.received = ""
        self.received_at = 0.0  # time.monotonic()
        if listens:
            listen(self._receive)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listens while entered; in a thread other than the main one Python has no signals, and `request` stops."""
        before = listen(self._receive) if threading.current_thread() is threading.main_thread() else {}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def request(self, who: str) -> None:
        """Asks the run to stop, as a signal does; the first request stands."""
        if not self.received:
            self.received, self.received_at = who, time.monotonic()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if number == signal.SIGINT and self.received and now - self.received_at > 1:
            leave_note(128 + number)
            os._exit(128 + number)
        if not self.received:
            self.request(signal.Signals(number).name)
            with suppress(OSError):  # the terminal may be closed
                os.write(2, b"\nstopping after this micro-batch; Ctrl-C again ends at once, without saving\n")

    def is_received(self) -> bool:
        """Whether this process was asked to stop."""
        return bool(self.received)

    def seconds(self) -> float:
        """Seconds since it was asked."""
        return time.monotonic() - self.received_at


def follow_launcher() -> None:
    """Registers this process with Handloop's launcher, and asks for a SIGTERM when accelerate or torchrun dies.

    accelerate's single-process launcher dies of SIGTERM without forwarding it; the kernel then sends it instead.
    """
    folder = os.environ.get("HANDLOOP_LAUNCHER")
    if folder:
        with suppress(OSError):
            faulthandler.enable((Path(folder) / f"crash-{os.getpid()}").open("w"))
            write_whole(Path(folder) / f"pid-{os.getpid()}", os.environ.get("RANK", "0"))
        atexit.register(leave_note, 1)
    if "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        parent = os.getppid()
        stop_with_parent()
        if os.getppid() != parent:  # it died before stop_with_parent()
            os.kill(os.getpid(), signal.SIGTERM)


def leave_note(code: int, reason: str = "") -> None:
    """Tells Handloop's launcher, if there is one, that this process ends by itself and why; the first note stands."""
    folder = os.environ.get("HANDLOOP_LAUNCHER")
    note = Path(folder or "") / f"end-{os.getpid()}"
    if folder and not note.exists():
        with suppress(OSError):
            write_whole(note.with_name(f"reason-{os.getpid()}"), reason)
            write_whole(note, f"{int(code)}")


def tell_doing(what: str) -> None:
    """Tells Handloop's launcher, if there is one, what this process is doing."""
    folder = os.environ.get("HANDLOOP_LAUNCHER")
    if folder:
        with suppress(OSError):
            write_whole(Path(folder) / f"doing-{os.getpid()}", what)


def tell_launcher(run_dir: str, timeout_minutes: float) -> None:
    """Tells Handloop's launcher, if there is one, where the run is and how long its processes wait for one another."""
    folder = os.environ.get("HANDLOOP_LAUNCHER")
    if folder:
        with suppress(OSError):
            told = {"dir": os.path.abspath(run_dir), "timeout_seconds": 60 * timeout_minutes}
            write_whole(Path(folder) / "run", json.dumps(told))


def write_whole(path: Path, text: str) -> None:
    """Writes a small file that another process may read at any moment; raises OSError."""
    temporary = path.with_name(f".{path.name}")
    temporary.write_text(text)
    os.replace(temporary, path)


def stop_with_parent() -> None:
    """Asks the kernel for a SIGTERM when the parent process ends; does nothing except on Linux."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

"""Who is told about a run: metrics.jsonl always, the terminal, Weights & Biases. None of them can stop training."""

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from train.track.metrics_file import MetricsFile


class Tracker(Protocol):
    """A listener."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Takes one row of metrics, at a step's boundary."""
        ...

    def answers(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Takes the answers of the finished model."""
        ...

    def finish(self) -> None:
        """Ends; nothing comes after it."""
        ...


class Trackers:
    """All listeners of a run; processes other than the first have none. One that fails is dropped, and that is said."""

    def __init__(self, members: Sequence[Tracker]) -> None:
        self.members = list(members)
        self.files = [member for member in members if isinstance(member, MetricsFile)]  # also once they failed

    def log(self, row: Mapping[str, Any]) -> None:
        """Tells all of them."""
        self._each(lambda member: member.log(row))

    def answers(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Tells all of them."""
        self._each(lambda member: member.answers(name, rows))

    def finish(self) -> None:
        """Ends all of them."""
        self._each(lambda member: member.finish())

    def metrics_bytes(self) -> int:
        """Length of metrics.jsonl, made durable; 0 in a process that writes none. Raises OSError."""
        return sum(file.durable_bytes() for file in self.files)

    def _each(self, tell: Callable[[Tracker], None]) -> None:
        for member in list(self.members):
            try:
                tell(member)
            except Exception as error:  # whatever it is, it must not reach training
                self.members.remove(member)
                with contextlib.suppress(OSError):
                    print(f"{type(member).__name__} is left out from now on: {error}", file=sys.stderr, flush=True)

"""Listeners that note what they are told."""

from collections.abc import Callable, Sequence
from typing import Any

from train.track.isolated import Listener


class Minimal(Listener):
    """No more than a listener must have."""

    name = "Minimal"

    def __init__(self, has: int = -1) -> None:
        self.has = has
        self.rows: list[Any] = []

    def start(self, run_uid: str) -> int:
        return self.has

    def log(self, row: Any) -> None:
        self.rows.append(dict(row))

    def finish(self) -> str:
        return ""


class Fake(Minimal):
    """Notes every call, and calls `acts[method]` in it."""

    name = "Fake"

    def __init__(self, has: int = -1, acts: dict[str, Callable[[], object]] | None = None) -> None:
        super().__init__(has)
        self.acts = acts or {}
        self.calls: list[str] = []

    def _act(self, method: str) -> None:
        self.calls.append(method)
        self.acts.get(method, lambda: None)()

    def start(self, run_uid: str) -> int:
        assert run_uid == "uid"
        self._act("start")
        return super().start(run_uid)

    def catch_up(self, rows: Sequence[Any], answers: Any) -> None:
        self._act("catch_up")
        super().catch_up(rows, answers)

    def log(self, row: Any) -> None:
        self._act("log")
        super().log(row)

    def table(self, name: str, rows: Sequence[Any]) -> None:
        self._act("table")
        self.rows.append((name, rows))

    def finish(self) -> str:
        self._act("finish")
        return "Fake is at rest"

    def abandon(self) -> None:
        self._act("abandon")

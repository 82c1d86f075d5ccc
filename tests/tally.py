"""How often a fault is made, and what became of it.

Every test in tests/faults takes the fixture `tally`, asks it how many times to try (`tally.times(short, full)`) and
reports every try. The short counts run with the suite; `bash launch/test.sh --faults full` sets HANDLOOP_FAULTS=full,
and HANDLOOP_TALLY, a file that gets one JSON line a test, which docs/RELIABILITY.md's table is made from.
"""

import os


class Tally:
    """The tries of one test."""

    def __init__(self, name: str) -> None:
        self.name = name  # the fault's number in docs/RELIABILITY.md, T1 to T25
        self.count = 0
        self.tries: set[str] = set()
        self.failures: list[str] = []
        self.full = os.environ.get("HANDLOOP_FAULTS") == "full"

    def times(self, short: int, full: int) -> int:
        """How many tries this run makes."""
        return full if self.full else short

    def check(self, passed: object, label: str) -> None:
        """One check; what was tried stands in `label` before its colon. Failures are shown together at the end."""
        self.count += 1
        self.tries.add(label.partition(": ")[0])
        if not passed:
            self.failures.append(label)

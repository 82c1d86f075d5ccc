"""Counts how often each fault is tried, and its failures.

A test in tests/faults takes the fixture `tally`, asks it how often to try (`tally.times(short, full)`) and reports
every try; one that takes none is one try itself. The suite uses the short counts; `bash launch/test.sh --faults full`
sets HANDLOOP_FAULTS=full, and HANDLOOP_TALLY to a file that gets one JSON line per test. The table in
docs/RELIABILITY.md is made from that file.
"""

import os


class Tally:
    """The tries of one test."""

    def __init__(self, name: str) -> None:
        self.name = name  # the fault's number in docs/RELIABILITY.md, T1 to T30
        self.count = 0
        self.tries: set[str] = set()
        self.failures: list[str] = []
        self.full = os.environ.get("HANDLOOP_FAULTS") == "full"

    def times(self, short: int, full: int) -> int:
        """The number of tries in this session."""
        return full if self.full else short

    def check(self, passed: object, label: str) -> None:
        """Records a check; `label` up to its colon names the try. Failures are reported together at the end."""
        self.count += 1
        self.tries.add(label.partition(": ")[0])
        if not passed:
            self.failures.append(label)

"""The exit code that processes of one run leave for the launcher."""

from pathlib import Path

import pytest

from train.run import last_words
from train.run.exits import ExitCode, ExitWith


def test_a_peer_failure_replaces_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even one that another process has left since this one looked; a defect replaces a peer failure."""
    monkeypatch.setenv("HANDLOOP_LAUNCHER", str(tmp_path))
    monkeypatch.setattr(last_words, "is_recorder", lambda end, record: True)
    left = []
    for code in (ExitCode.PEER_FAILURE, ExitCode.DEFECT, ExitCode.PEER_FAILURE):
        last_words.say_end(ExitWith(code, "a reason"))
        left.append(int((tmp_path / "exit").read_text()))
    assert left == [ExitCode.PEER_FAILURE, ExitCode.DEFECT, ExitCode.DEFECT]

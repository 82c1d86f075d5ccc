"""Folders that are published whole: what an interruption restores, and what is swept of a killed process."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT
from train.run.durable import aside_name, name_before, publish

WRITER = """
import sys, time
from pathlib import Path
from train.run.durable import publish
with publish(Path(sys.argv[1])) as folder:
    (folder / "file").write_text("half")
    print(folder.name, flush=True)
    time.sleep(60)
"""


def write_in(folder: Path, text: str) -> None:
    with publish(folder) as temporary:
        (temporary / "file").write_text(text)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("number", [1, 2])
def test_ctrl_c_at_a_rename_leaves_one_edition(
    moment: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A KeyboardInterrupt before or after either rename leaves the old folder or the new one, by its name."""
    target, real, calls = tmp_path / "final", os.rename, 0
    write_in(target, "old")

    def interrupted(*paths: Any) -> None:
        nonlocal calls
        calls += 1
        if moment == "after":
            real(*paths)
        if calls == number:
            raise KeyboardInterrupt
        if moment == "before":
            real(*paths)

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_in(target, "new")
    monkeypatch.undo()
    is_published = (moment, number) == ("after", 2)
    assert (target / "file").read_text() == ("new" if is_published else "old")
    assert not list(tmp_path.glob(".tmp-*"))
    write_in(target, "newer")
    assert names_in(tmp_path) == ["final"]


def test_what_a_kill_left_is_swept(tmp_path: Path) -> None:
    """The next publish of the same target removes what a killed process wrote, never what a living one is writing."""
    target = tmp_path / "merged"
    others = [".tmp-merged-original-0123abcd", ".tmp-merged-notes", ".trash-merged-0123abcd"]
    for name in others:
        (tmp_path / name).mkdir()
    command = [sys.executable, "-c", WRITER, str(target)]
    writer = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE)
    try:
        assert writer.stdout is not None
        half = writer.stdout.readline().decode().strip()
        assert half in names_in(tmp_path)
        write_in(target, "whole")
        assert names_in(tmp_path) == sorted([*others, half, "merged"])  # what was replaced may be the only copy
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
    write_in(target, "again")
    assert names_in(tmp_path) == sorted([*others[:2], "merged"])


@pytest.mark.parametrize("kind", ["trash", "quarantine", "superseded"])
def test_what_is_set_aside_tells_its_name(tmp_path: Path, kind: str) -> None:
    """Each time under another, from which the one before can be read."""
    folder = tmp_path / "step-00000012"
    first, second = aside_name(folder, kind), aside_name(folder, kind)
    assert first != second
    assert first.parent == folder.parent
    assert name_before(first) == name_before(second) == folder.name

"""A run folder that need not exist."""

from pathlib import Path

import pytest

from train.run.folder import RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")

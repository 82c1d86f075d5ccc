"""A finished run to export, and what an export needs to be quick."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import BUNDLED_BASE
from tests.finished_runs import finish
from train.config import Config, ModelConfig
from train.deliver import export, receipt


@pytest.fixture
def run(config: Config, tmp_path: Path) -> Path:
    """A finished run on a copy of the bundled base, which is held in fp32."""
    base = tmp_path / "a private place" / "base"
    shutil.copytree(BUNDLED_BASE, base)
    model = ModelConfig(name_or_path=str(base), quantization="none", dtype="fp32")
    return finish(replace(config, model=model), tmp_path / "my run")


@pytest.fixture
def short_receipts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compares less than a user's export does."""
    monkeypatch.setattr(receipt, "MAX_ROWS", 6)
    monkeypatch.setattr(receipt, "NUM_QUESTIONS", 2)


@pytest.fixture
def without_llama_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine where it is not installed."""
    monkeypatch.setattr(export, "find_spec", lambda name: None)

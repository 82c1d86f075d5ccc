"""The Python files of the project, for the tests that read them."""

from pathlib import Path

from tests.conftest import ROOT


def files_in(*folders: str) -> list[Path]:
    """The Python files of these folders of the project."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


SOURCES = files_in("train", "data_tools")

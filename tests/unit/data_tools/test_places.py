"""A path that is not found: where it was looked for, and where it may be."""

from pathlib import Path

import pytest

from data_tools.places import PROJECT, not_found
from data_tools.report import DataError
from data_tools.sources import survey


def test_where_it_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path is said whole, with the same one in the project's folder, or a like name beside it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").touch()
    assert not_found("gone.txt") == f"no such file or folder; looked for {tmp_path / 'gone.txt'}"
    assert not_found("/gone/x.txt") == "no such file or folder"
    assert not_found("pair.jsonl").endswith("; did you mean pairs.jsonl?")
    wanted = "demo/glossary.jsonl"
    assert not_found(wanted).endswith(f"; there is one in the project's folder: {PROJECT / wanted}")
    with pytest.raises(DataError, match="there is one in the project's folder"):
        survey([wanted], "auto")

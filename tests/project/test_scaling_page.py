"""docs/DISTRIBUTED.md and docs/scaling.svg say what benchmarks/results has. After a change there:

python -m benchmarks.scaling_table --picture docs/scaling.svg, and the command above the page's table
"""

import re
import shlex
import sys
from pathlib import Path

import pytest

from benchmarks import scaling_table
from tests.conftest import ROOT

PAGE = ROOT / "docs" / "DISTRIBUTED.md"


def test_the_table_of_the_page_is_what_the_script_prints(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every row, of all three files of results, in the script's order."""
    text = PAGE.read_text(encoding="utf-8")
    found = re.search(r"<!-- table: python -m benchmarks\.scaling_table (.*) -->\n\n((?:\|.*\n)+)", text)
    assert found
    monkeypatch.setattr(sys, "argv", ["scaling_table", *shlex.split(found[1])])
    scaling_table.main()
    assert found[2] == capsys.readouterr().out


def test_the_picture_is_what_the_script_draws(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """To the byte."""
    monkeypatch.setattr(sys, "argv", ["scaling_table", "--picture", str(tmp_path / "scaling.svg")])
    scaling_table.main()
    assert (tmp_path / "scaling.svg").read_bytes() == (ROOT / "docs" / "scaling.svg").read_bytes()

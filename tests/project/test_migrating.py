"""docs/MIGRATING.md shows the table of train/foreign/names.py."""

import re

from tests.conftest import ROOT
from tests.unit.test_advice import OPTIONS
from train.foreign.names import ROWS, TRAINERS

PAGE = ROOT / "docs" / "MIGRATING.md"


def table() -> str:
    """The rows of the table that belong to an option, put together: ours, and what each trainer calls it."""
    lines = [f"| here | {' | '.join(TRAINERS)} |", "|---" * (len(TRAINERS) + 1) + "|"]
    for option in dict.fromkeys(row.option for row in ROWS):
        cells = []
        for trainer in TRAINERS:
            names = dict.fromkeys(name for row in ROWS if row.option == option for name in row.names(trainer))
            cells.append(", ".join(f"`{name}`" for name in names))
        if any(cells):
            lines.append(f"| `--{option}` | {' | '.join(cells)} |")
    return "\n".join(lines)


def test_the_page_shows_the_table() -> None:
    """The table on the page is made of the one in the code; after a change the message has what to paste."""
    assert table() in PAGE.read_text(encoding="utf-8"), f"paste this into docs/MIGRATING.md:\n{table()}"


def test_options_on_the_page_exist() -> None:
    """Every option that its text names is one."""
    text = PAGE.read_text(encoding="utf-8").partition("| here |")[0]
    sections = {option.split(".")[0] for option in OPTIONS}
    named = {f"{a}.{b}" for a, b in re.findall(r"(?<![\w/])(\w+)\.(\w+)", text) if a in sections}
    assert len(named) > 10
    assert named <= OPTIONS

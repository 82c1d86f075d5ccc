"""The last step of a file of rows, whatever its end looks like."""

from pathlib import Path

import pytest

from train.run.json_lines import last_step


@pytest.mark.parametrize(
    ("content", "step"),
    [
        ("", 0),
        ('{"step": 7}\n', 7),
        ('{"step": 7}\n{"step": 8, "tr', 7),
        ('{"st', 0),
        ("[1]\n", 0),
        ('{"step": 7}\n{"step": 1e999}\n', 7),
        ('{"step": 7}\n' + "[" * 100_000, 7),
    ],
)
def test_the_last_step_is_read_from_the_end(content: str, step: int, tmp_path: Path) -> None:
    """Of whole rows; a torn or hostile last line, or a file that is not there, is no error."""
    rows = tmp_path / "metrics.jsonl"
    rows.write_text(content)
    assert last_step(rows) == step
    assert last_step(tmp_path / "none") == 0

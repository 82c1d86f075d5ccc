"""The last step of a metrics file, whatever its end looks like."""

from pathlib import Path

import pytest

from train.track.metrics_file import last_step


@pytest.mark.parametrize(
    ("content", "step"), [("", 0), ('{"step": 7}\n', 7), ('{"step": 7}\n{"step": 8, "tr', 7), ('{"st', 0), ("[1]\n", 0)]
)
def test_the_last_step_is_read_from_the_end(content: str, step: int, metrics: Path) -> None:
    """Of whole rows; a torn last line, or a file that is not there, is no error."""
    metrics.write_text(content)
    assert last_step(metrics) == step
    assert last_step(metrics.with_name("none")) == 0

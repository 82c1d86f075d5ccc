"""benchmarks.first_step: the parts of a start are its whole, each counted once."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import first_step
from benchmarks.first_step import PARTS, Clock, started, table
from tests.conftest import thorough

WORDS = ["--profile", "demo", "--run.device", "cpu", "--track.wandb", "off"]


@thorough
def test_parts_of_a_real_start_add_up() -> None:
    """Within the rounding of each; every part that a fresh run has was met, none is negative."""
    row = started(WORDS)
    parts = {name: row[name] for name in ("packages", "others", *PARTS.values())}
    assert sum(parts.values()) == pytest.approx(row["seconds"], abs=0.01 * len(parts))
    assert min(parts.values()) >= 0
    assert all(parts[name] > 0 for name in ("packages", "base", "agreement with transformers", "first step"))
    assert parts["first step"] < row["from_loading"] < row["seconds"] - parts["packages"]


def test_a_part_within_another_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 7.0, 15.0])
    monkeypatch.setattr(first_step.time, "perf_counter", lambda: next(now))
    clock = Clock()
    inner = clock.timed("inner", lambda: "made")
    assert clock.timed("outer", inner)() == "made"
    assert clock.seconds == {"others": 1.0, "outer": 2.0 + 8.0, "inner": 4.0}


def test_a_start_is_noted_twice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    """A first one and another; what fails is raised with what it said."""
    out = tmp_path / "out.json"
    given: list[list[str]] = []

    def once(words: list[str]) -> dict[str, float]:
        given.append(words)
        return {"seconds": 3.0, "from_loading": 1.5, "base": 1.25, "audit": 0.001}

    monkeypatch.setattr(first_step, "started", once)
    monkeypatch.setattr(sys, "argv", ["first_step", "tiny", "--out", str(out), "--", *WORDS])
    first_step.main()
    assert given == [WORDS, WORDS]
    assert [row["run"] for row in json.loads(out.read_text())["tiny"]["rows"]] == ["first", "again"]
    assert table({"run": "first", **once(WORDS)}) in capsys.readouterr().out
    assert "audit" not in table({"run": "first", **once(WORDS)})
    with pytest.raises(RuntimeError, match="no_such_profile"):
        started(["--profile", "no_such_profile"])

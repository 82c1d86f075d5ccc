"""benchmarks.fp8_quality keeps the runs that it has, joins files and compares equal seeds."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from benchmarks import fp8_quality
from benchmarks.fp8_quality import without
from tests.conftest import thorough
from train.run.exits import ExitCode

Call = Callable[..., dict[str, Any]]


@pytest.fixture
def call(pairs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Call:
    """A call of the script: what it wrote to the file that it is given, out.json otherwise."""

    def call(*words: str) -> dict[str, Any]:
        own = ["--data", str(pairs), "--held-out", str(pairs), "--out", str(tmp_path / "out.json")]
        monkeypatch.setattr(sys, "argv", ["fp8_quality", *own, *words])
        fp8_quality.main()
        out = words[words.index("--out") + 1] if "--out" in words else str(tmp_path / "out.json")
        return json.loads(Path(out).read_text())

    return call


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Way and seed of each run that was started, without the job: its losses are of way and seed alone."""
    runs: list[tuple[str, int]] = []

    def measured(way: str, seed: int, words: list[str], scratch: Path) -> dict[str, Any]:
        runs.append((way, seed))
        if seed == 13:
            raise RuntimeError(f"{way} ended with 70")
        losses = [(1.0 + seed) * (1.01 if way == "fp8" else 1.0), None]
        held_out = {"held_out_losses": losses[:1], "held_out_loss_in_16_bits": 1.0 + seed}
        return {"losses": losses, "last_loss": losses[0], "exact": {}, "tokens_per_second": 9.0, **held_out}

    monkeypatch.setattr(fp8_quality, "measured", measured)
    return runs


def keys(found: dict[str, Any]) -> list[tuple[str, int]]:
    """Way and seed of the file's runs."""
    return [(row["way"], row["seed"]) for row in found["rows"]]


def test_runs_that_are_there_are_kept(
    call: Call, started: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One more run is added with its own commit; none is repeated unless it is asked for again."""
    monkeypatch.setenv("HANDLOOP_COMMIT", "first")
    call("--ways", "bf16", "--seeds", "1", "0")
    monkeypatch.setenv("HANDLOOP_COMMIT", "second")
    found = call("--ways", "bf16", "fp8", "--seeds", "1")
    assert keys(found) == [("bf16", 0), ("bf16", 1), ("fp8", 1)]
    assert [row["commit"] for row in found["rows"]] == ["first", "first", "second"]
    assert all(row["device"] and row["versions"] and row["at_once"] == 1 for row in found["rows"])
    assert started == [("bf16", 1), ("bf16", 0), ("fp8", 1)]
    again = call("--ways", "bf16", "--seeds", "1", "--again")
    assert [row["commit"] for row in again["rows"]] == ["first", "second", "second"]
    assert started[3:] == [("bf16", 1)]


@pytest.mark.parametrize("change", [("--epochs", "5"), ("--base", "other"), ("--", "--optim.lr", "1")])
def test_runs_of_another_job_are_refused(
    change: tuple[str, ...],
    call: Call,
    started: list[tuple[str, int]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """78 before anything runs, and the file stays; so with data of the same name and another content."""
    call("--seeds", "0")
    before = (tmp_path / "out.json").read_bytes()
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    for words in (change, ("--data", str(tmp_path / "pairs.jsonl"))):
        with pytest.raises(SystemExit) as refused:
            call("--seeds", "1", *words)
        assert refused.value.code == ExitCode.BAD_INPUT
        assert "out.json has runs of another job" in capsys.readouterr().err
    assert (tmp_path / "out.json").read_bytes() == before
    assert len(started) == 2


def test_joined_files_have_all_runs_and_equal_seeds_are_compared(
    call: Call, started: list[tuple[str, int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever their order and number; a seed without its run in 16 bits has none to be compared with."""
    one, two, three = (str(tmp_path / f"{name}.json") for name in ("one", "two", "three"))
    call("--ways", "bf16", "--seeds", "2", "0", "--out", one)
    call("--ways", "fp8", "--seeds", "1", "2", "--out", two)
    num_runs = len(started)
    capsys.readouterr()
    found = call("--join", two, one)
    assert keys(found) == [("bf16", 0), ("bf16", 2), ("fp8", 1), ("fp8", 2)]
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  beside")]
    assert told == ["  beside bf16, seed 2: +1.000% +- 0.000% a step, held-out +0.0300, in 16 bits +0.0000"]
    assert "rows" in call("--ways", "bf16", "--seeds", "1", "--out", three)
    assert keys(call("--join", three)) == [("bf16", 0), ("bf16", 1), ("bf16", 2), ("fp8", 1), ("fp8", 2)]
    assert len(started) == num_runs + 1
    call("--ways", "bf16", "--seeds", "1", "--epochs", "5", "--out", str(tmp_path / "other.json"))
    with pytest.raises(SystemExit) as refused:
        call("--join", str(tmp_path / "other.json"))
    assert refused.value.code == ExitCode.BAD_INPUT


def test_a_run_that_fails_ends_none_of_the_others(call: Call, started: list[tuple[str, int]], tmp_path: Path) -> None:
    """They are written; then its end is told."""
    with pytest.raises(SystemExit, match="seed 13, bf16 ended with 70\nseed 13, fp8 ended with 70"):
        call("--seeds", "13", "0")
    assert keys(json.loads((tmp_path / "out.json").read_text())) == [("bf16", 0), ("fp8", 0)]


def test_runs_at_once(call: Call, started: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both have begun before either ends."""
    both, alone = Barrier(2, timeout=60), fp8_quality.measured

    def measured(*arguments: Any) -> dict[str, Any]:
        both.wait()
        return alone(*arguments)

    monkeypatch.setattr(fp8_quality, "measured", measured)
    found = call("--seeds", "0", "--at-once", "2")
    assert keys(found) == [("bf16", 0), ("fp8", 0)]
    assert [row["at_once"] for row in found["rows"]] == [2, 2]


def test_options_are_left_out_in_both_spellings() -> None:
    """With all their values; a negative number is one."""
    words = ["--run.dir=a", "--optim.lr", "-1", "--data.path", "b", "c", "--run.dir", "d", "--lora.r=4"]
    assert without(words, "--run.dir", "--data.path") == ["--optim.lr", "-1", "--lora.r=4"]
    assert without(words, "--optim.lr", "--lora") == [*words[:1], *words[3:]]


@thorough
@pytest.mark.slow
@pytest.mark.parametrize("way", ["fp8", "bf16"])
def test_a_run_of_the_real_job(way: str, call: Call, shape: Path) -> None:
    """In 16 bits the adapters' loss is that of the run itself; those of fp8 have another one with its products."""
    words = ["--model.random_init", "true", "--data.gate", "warn", "--data.max_length", "128"]
    words += ["--compare.num_questions=0", "--train.max_steps=2"]
    (row,) = call("--ways", way, "--seeds", "0", "--base", str(shape), "--", *words)["rows"]
    assert (row["way"], row["seed"], len(row["losses"])) == (way, 0, 2)
    apart = row["held_out_losses"][-1] / row["held_out_loss_in_16_bits"] - 1
    assert (1e-6 < abs(apart) < 0.02) if way == "fp8" else abs(apart) < 1e-6

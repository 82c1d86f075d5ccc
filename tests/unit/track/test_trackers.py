"""Whoever fails is left out, the others are told everything, and all listeners share one patience."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.unit.track.listeners import Fake
from train.cli import PATHS
from train.config import Config
from train.track import isolated
from train.track.isolated import Isolated
from train.track.metrics_file import MetricsFile, read_metrics
from train.track.shared import shared_config
from train.track.trackers import Trackers


def test_listeners_share_one_patience(
    metrics: Path, hang: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three that hang cost as much as one."""
    monkeypatch.setattr(isolated, "PATIENCE_SECONDS", 1.0)
    fakes = [Fake(acts={"start": hang}) for _ in range(3)]
    trackers = Trackers(listeners=[Isolated(fake, "uid", metrics) for fake in fakes])
    began = time.monotonic()
    trackers.finish()
    assert 1.0 <= time.monotonic() - began < 2.5
    assert all(fake.calls == ["start", "abandon"] for fake in fakes)


class Screen:
    """A display that fails at the second row, or at its end."""

    def __init__(self, failing: str) -> None:
        self.failing = failing
        self.rows: list[Any] = []

    def log(self, row: Any) -> None:
        if self.failing == "log" and self.rows:
            raise ValueError("no such colour")
        self.rows.append(row)

    def rest(self) -> None:
        self.rows.append("rest")

    def finish(self) -> None:
        if self.failing == "finish":
            raise ValueError("no such colour")


@pytest.mark.parametrize("failing", ["log", "finish"])
def test_what_fails_is_left_out_and_the_others_go_on(
    failing: str, metrics: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A display that raises is told nothing more; the metrics file and the listener get every row."""
    screen, fake = Screen(failing), Fake()
    trackers = Trackers(MetricsFile(metrics, 0), screen, [Isolated(fake, "uid", metrics)])
    for step in (1, 2, 3):
        trackers.log({"step": step})
    trackers.rest()
    trackers.table("answers", [{"question": "q"}])
    assert trackers.metrics_bytes() == metrics.stat().st_size > 0
    trackers.finish()
    assert [row["step"] for row in read_metrics(metrics)] == [1, 2, 3]
    assert [row["step"] for row in fake.rows[:3]] == [1, 2, 3]
    assert len(screen.rows) == (1 if failing == "log" else 4)
    assert (screen.rows[-1] == "rest") == (failing == "finish")
    assert capsys.readouterr().err == "Screen is left out from now on: no such colour\n"


def test_a_process_that_tells_nobody() -> None:
    """All but the first process of a run: nothing is written, nothing fails."""
    trackers = Trackers()
    trackers.log({"step": 1})
    trackers.rest()
    trackers.table("answers", [])
    trackers.finish()
    assert trackers.metrics_bytes() == 0


def test_no_path_and_no_word_of_the_data_is_sent(config: Config) -> None:
    """Of the options that Weights & Biases gets none names a file or a token, whatever options there will be."""
    lora = replace(config.lora, init_from="/secret/folder", trainable_tokens=("secret",))
    checkpoint = replace(config.checkpoint, mirror="s3://secret/run")
    sent = shared_config(replace(config, lora=lora, checkpoint=checkpoint))
    names = {f"{section}.{name}" for section, fields in sent.items() for name in fields}
    assert {"lora.r", "optim.lora_plus_ratio", "train.method"} <= names
    assert names.isdisjoint(PATHS)
    assert "secret" not in str(sent)

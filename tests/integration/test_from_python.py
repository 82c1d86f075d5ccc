"""A run from a script: started, watched, stopped, resumed, refused, in a process that lives on."""

import os
import re
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from tests.compare_runs import result_of
from tests.conftest import ROOT
from train.config import Config, RunConfig
from train.main import run
from train.run.exits import ExitCode, ExitWith
from train.run.signals import StopRequest
from train.track.isolated import Row


def at(config: Config, folder: Path) -> Config:
    return replace(config, run=RunConfig(dir=str(folder), device="cpu"))


def test_stopped_and_gone_on_with(config: Config, tmp_path: Path) -> None:
    """Stopped from its own watcher, by Ctrl-C and from another thread, it ends in the bits of a run without stops."""
    rows: list[int] = []
    mine = signal.getsignal(signal.SIGINT)
    assert run(at(config, tmp_path / "whole"), lambda row: rows.append(row["step"])).is_finished
    assert rows == list(range(1, rows[-1] + 1))
    recipe, seen = at(config, tmp_path / "parts"), []
    first, second, third = (StopRequest(listens=False) for _ in range(3))

    def watch(row: Row) -> None:
        seen.append(row["step"])
        if row["step"] == 1:
            first.request("a script")
        if row["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)
        if row["step"] == 3:
            asking = threading.Thread(target=third.request, args=("a thread",))
            asking.start()
            asking.join()

    for stop, who in ((first, "a script"), (second, "SIGINT"), (third, "a thread")):
        outcome = run(recipe, watch, stop)
        assert not outcome.is_finished
        assert f"stopped by {who}" in outcome.reason
        assert signal.getsignal(signal.SIGINT) is mine
    assert run(recipe, watch).is_finished
    assert seen == rows
    assert result_of(tmp_path / "parts") == result_of(tmp_path / "whole")


def test_other_ends_are_raised(config: Config, tmp_path: Path) -> None:
    """What cannot be run raises ExitWith with all its reasons, also outside the main thread; so does bad data."""
    with pytest.raises(ExitWith, match=r"(?s)lora\.r 0.*optim\.lr -1") as ended:
        run(replace(at(config, tmp_path / "a"), lora=replace(config.lora, r=0), optim=replace(config.optim, lr=-1)))
    assert ended.value.code == ExitCode.BAD_INPUT
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": 1}\n')
    caught: list[ExitWith] = []

    def elsewhere() -> None:
        try:
            run(replace(at(config, tmp_path / "b"), data=replace(config.data, path=(str(bad),))))
        except ExitWith as end:
            caught.append(end)

    thread = threading.Thread(target=elsewhere)
    thread.start()
    thread.join()
    assert caught[0].code == ExitCode.BAD_INPUT
    assert "bad.jsonl:1" in caught[0].reason


def test_a_watcher_that_fails_is_left_out(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Training goes on without it, and that is said."""

    def watch(row: Row) -> None:
        raise ValueError("no figure today")

    assert run(at(config, tmp_path / "run"), watch).is_finished
    assert capsys.readouterr().err.count("no figure today") == 1


@pytest.mark.slow
def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples in docs/PYTHON.md, as they stand."""
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "PYTHON.md").read_text(), re.DOTALL)
    assert len(examples) == 2
    monkeypatch.chdir(tmp_path)
    for example in examples:
        exec(compile(example, "docs/PYTHON.md", "exec"), {})
    assert (tmp_path / "runs" / "from_python" / "final" / "adapter_model.safetensors").exists()

"""Offline records of runs are uploaded once, those that are not superseded, and what cannot be is said."""

import fcntl
from dataclasses import replace
from pathlib import Path

import pytest

from tests import told
from tests.fake_wandb import FakeServer, environment
from train.commands import handloop
from train.config import Config, TrackConfig
from train.run.exits import ExitCode


@pytest.fixture
def run(config: Config) -> Config:
    return replace(config, track=TrackConfig(wandb="offline"))


def account(monkeypatch: pytest.MonkeyPatch, url: str, key: str = "") -> None:
    """Makes this process one with a key for the server, or with none."""
    settings = environment(url, key) if key else environment(url)
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
        if not value:
            monkeypatch.delenv(name)


def attempt(config: Config, first: int, last: int, ends: str) -> None:
    told.attempt(config, first, last, ends, **environment("", key=""))


@pytest.mark.slow
def test_a_record_is_uploaded_whole_and_once(
    run: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Saved and uploaded, resumed and uploaded again: one run with every step once; a third time nothing is sent."""
    folder = run.run.dir
    with FakeServer() as server:
        account(monkeypatch, server.url)
        attempt(run, 0, 4, "saved")
        assert handloop.main(["sync", "--dry-run", folder]) == 0
        assert server.bodies == []
        assert "would upload offline-run-" in capsys.readouterr().out
        assert handloop.main(["sync", folder]) == 0
        assert [row["step"] for row in server.rows] == list(range(5))
        attempt(run, 5, 7, "finished")
        assert handloop.main(["sync", folder]) == 0
        said = capsys.readouterr().out
        assert f"{folder}: uploaded offline-run-" in said
        assert ", steps up to 7\n" in said
        assert [row["step"] for row in server.rows] == list(range(8))
        assert len(server.names) == 1
        sent = len(server.bodies)
        assert handloop.main(["sync", folder]) == 0
        assert "uploaded already" in capsys.readouterr().out
        assert len(server.bodies) == sent


def test_what_cannot_be_uploaded_is_said(
    run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No folder, no record, no key, a run that goes on, a file that is none, no server: 78 and a reason each."""

    def refused(*words: str) -> str:
        assert handloop.main(["sync", *words]) == ExitCode.BAD_INPUT
        return capsys.readouterr().err

    monkeypatch.setenv("HOME", str(tmp_path))
    account(monkeypatch, "http://127.0.0.1:9")
    assert "RUN" in refused()
    assert "there is no such folder" in refused(str(tmp_path / "none"))
    assert "no offline record" in refused(str(tmp_path))
    attempt(run, 0, 3, "killed")
    attempt(run, 2, 3, "saved")
    folder = Path(run.run.dir)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "the run goes on" in refused(str(folder))
    monkeypatch.delenv("WANDB_API_KEY")
    assert "there is no key" in refused(str(folder))
    with FakeServer(401) as server:
        account(monkeypatch, server.url)
        assert "could not be uploaded; it stays" in refused(str(folder))
    (record,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    record.write_bytes(record.read_bytes()[:7])  # begun, and no more
    assert "it has no step, because the run ended before it had begun" in refused(str(folder))
    record.write_bytes(b"something else")
    assert "it is no record of Weights & Biases" in refused(str(folder))

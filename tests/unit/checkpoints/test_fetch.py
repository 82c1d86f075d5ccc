"""A machine with nothing, or with less than the mirror, takes what is whole there."""

from pathlib import Path

import pytest

from tests.faults.saves import is_what_was_saved, save
from tests.unit.checkpoints.test_mirror import put, store_at, url_of
from train.checkpoints.fetch import fetch_newer
from train.checkpoints.mirror import Mirror
from train.checkpoints.remote import Remote
from train.checkpoints.store import CheckpointStore
from train.run.exits import ExitCode, ExitWith
from train.run.folder import RunFolder


@pytest.fixture
def mirror(tmp_path: Path) -> Mirror:
    """A mirror with the checkpoints of steps 1 and 2 of a run that is in `run`."""
    store, mirror = store_at(tmp_path / "run"), Mirror(Remote(url_of(tmp_path)))
    put(mirror, store, 1)
    put(mirror, store, 2)
    return mirror


def flip(mirror: Mirror, step: int, name: str) -> None:
    """Flips a bit of a file of a step's copy."""
    (copy,) = [copy for copy in mirror.copies() if copy.step == step]
    path = Path(mirror.remote.root) / copy.folder / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


def at(path: Path) -> CheckpointStore:
    return CheckpointStore(RunFolder(path), keep=2)


def test_a_new_machine_has_all_that_it_needs(mirror: Mirror, tmp_path: Path) -> None:
    """The newest checkpoint, the run's identity and its metrics up to the step; it is not fetched twice."""
    store = at(tmp_path / "new")
    assert fetch_newer(mirror, store, 0)
    found = store.latest()
    assert found is not None
    assert found.state.step == 2
    assert is_what_was_saved(found)
    assert store.run_uid() == at(tmp_path / "run").run_uid()
    assert store.folder.metrics.read_bytes() == b'{"step": 1}        \n'
    assert not fetch_newer(mirror, store, 2)
    assert [path.name for path in store.root.iterdir() if not path.name.startswith("step-")] == []


def test_a_flipped_bit_costs_one_checkpoint(mirror: Mirror, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In any file: it is said, the copy before it is taken, nothing is left of the damaged one, and it is replaced."""
    for number, name in enumerate(
        ("checkpoint/optimizer.safetensors", "checkpoint/manifest.json", "run/metrics.jsonl")
    ):
        fresh = Mirror(Remote(mirror.url))
        flip(fresh, 2, name)
        store = at(tmp_path / f"new-{number}")
        assert fetch_newer(fresh, store, 0)
        assert f"is not usable: {name} is damaged" in capsys.readouterr().out
        found = store.latest()
        assert found is not None
        assert is_what_was_saved(found)
        assert (found.state.step, [path.name for path in store.root.iterdir()]) == (1, ["step-0000000001"])
        put(fresh, at(tmp_path / "run"), 2)  # as the run does when it is there again
        assert fetch_newer(Mirror(Remote(mirror.url)), at(tmp_path / f"healed-{number}"), 1)


def test_where_all_is_damaged_nothing_starts_again(mirror: Mirror, tmp_path: Path) -> None:
    """Exit 80 where nothing is here; what is here stays the newest otherwise, with its own metrics."""
    for step in (1, 2):
        flip(mirror, step, "checkpoint/optimizer.safetensors")
    with pytest.raises(ExitWith) as end:
        fetch_newer(mirror, at(tmp_path / "new"), 0)
    assert end.value.code == ExitCode.NO_VALID_CHECKPOINT
    fresh = Mirror(Remote(mirror.url))
    own = at(tmp_path / "run")
    own.folder.metrics.write_bytes(b"mine\n")
    assert not fetch_newer(fresh, own, 1)
    assert own.folder.metrics.read_bytes() == b"mine\n"


def test_another_run_is_left_alone(mirror: Mirror, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run folder with an identity takes its own copies alone, and says that there are others."""
    other = at(tmp_path / "other")
    other.run_uid()
    assert not fetch_newer(mirror, other, 0)
    assert "has checkpoints of another run, up to step 2" in capsys.readouterr().out
    save(other, 1)
    put(mirror, other, 1)
    new = at(tmp_path / "new")  # of several runs the one that was copied last
    assert fetch_newer(mirror, new, 0)
    assert new.run_uid() == other.run_uid()


def test_a_line_that_fails_is_no_reason_to_start_again(
    mirror: Mirror, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error while it is fetched ends the run with 78, and leaves nothing that a later start would take."""

    def fails(remote: Remote, name: str) -> None:
        raise ConnectionError("the line is dead")

    with monkeypatch.context() as patched:
        original = Remote.chunks
        patched.setattr(
            Remote,
            "chunks",
            lambda remote, name: fails(remote, name) if name.endswith("trainer_state.json") else original(remote, name),
        )
        with pytest.raises(ExitWith, match="ConnectionError: the line is dead; run the same command again") as end:
            fetch_newer(mirror, at(tmp_path / "new"), 0)
    assert end.value.code == ExitCode.BAD_INPUT
    assert list((tmp_path / "new" / "checkpoints").iterdir()) == []
    assert fetch_newer(mirror, at(tmp_path / "new"), 0)

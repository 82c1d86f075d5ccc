"""What is at the mirror: whole copies alone, whatever a writer left or a store does to them."""

import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import fsspec
import pytest

from tests.faults.saves import save
from train.checkpoints.mirror import COMPLETE, DamagedCopyError, Mirror, _sealed, mirror_of, start_date
from train.checkpoints.remote import Remote
from train.checkpoints.source import Source
from train.checkpoints.store import CheckpointStore
from train.config import CheckpointConfig, Config
from train.run.exits import ExitCode, ExitWith
from train.run.folder import RunFolder


class Killed(BaseException):
    """Stands for the end of the process."""


class Counting(Remote):
    """Counts every read, write and removal, and dies at one of them, a write by halves."""

    def __init__(self, url: str, last: float = float("inf")) -> None:
        super().__init__(url)
        self.count, self.last = 0, last

    def write(self, name: str, chunks: Iterable[bytes], size: int) -> None:
        self._act(lambda: Remote.write(self, name, [b"".join(chunks)[: size // 2]], size))
        super().write(name, chunks, size)

    def remove(self, names: Iterable[str]) -> None:
        for name in names:
            self._act()
            super().remove([name])

    def chunks(self, name: str) -> Iterator[bytes]:
        self._act()
        yield from super().chunks(name)

    def _act(self, half: Callable[[], None] = lambda: None) -> None:
        self.count += 1
        if self.count > self.last:
            half()
            raise Killed


def store_at(path: Path, steps: Iterable[int] = (1, 2)) -> CheckpointStore:
    """A run folder with checkpoints, and a metrics.jsonl of twenty bytes a step."""
    store = CheckpointStore(RunFolder(path), keep=9)
    for step in steps:
        save(store, step)
    store.folder.metrics.write_bytes(b'{"step": 1}        \n' * 9)
    return store


def put(mirror: Mirror, store: CheckpointStore, step: int) -> None:
    source = Source.of(store.path_of(step), store.folder)
    try:
        mirror.put(source)
    finally:
        source.close()


def url_of(tmp_path: Path) -> str:
    return f"file://{tmp_path}/mirror/run"


def steps_at(url: str) -> list[int]:
    """As a machine sees it that starts with nothing."""
    return [copy.step for copy in Mirror(Remote(url)).copies()]


def test_a_copy_is_whole_or_absent_at_every_moment(tmp_path: Path) -> None:
    """Killed at every read, write and removal of a copy and of what follows: the older one, or the newer, is whole."""
    store, seen = store_at(tmp_path / "run"), set()
    for moment in range(99):
        shutil.rmtree(tmp_path / "mirror", ignore_errors=True)
        put(Mirror(Remote(url_of(tmp_path))), store, 1)
        remote = Counting(url_of(tmp_path), last=moment)
        mirror = Mirror(remote)
        try:
            put(mirror, store, 2)
            mirror.prune(store.run_uid(), keep=1, best=0)
        except Killed:
            seen.add(tuple(steps_at(url_of(tmp_path))))
            continue
        break
    assert moment > 25
    assert seen == {(1,), (2, 1), (2,)}
    assert steps_at(url_of(tmp_path)) == [2]
    # whatever was left, the next try is as good as the first
    put(Mirror(Remote(url_of(tmp_path))), store, 2)
    assert steps_at(url_of(tmp_path)) == [2]


@pytest.mark.parametrize("what", ["cut", "gone", "record", "forged", "strange"])
def test_what_does_not_agree_with_its_record_is_passed_over(what: str, tmp_path: Path) -> None:
    """A file cut short or missing, a record of half a file or changed, a record that names other files."""
    store, mirror = store_at(tmp_path / "run"), Mirror(Remote(url_of(tmp_path)))
    put(mirror, store, 1)
    put(mirror, store, 2)
    folder = Path(mirror.remote.root) / mirror.copies()[0].folder
    record = folder / COMPLETE
    if what == "cut":
        path = folder / "checkpoint" / "optimizer.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    elif what == "gone":
        (folder / "checkpoint" / "adapter_config.json").unlink()
    elif what == "record":
        record.write_bytes(record.read_bytes()[:200])
    elif what == "forged":
        record.write_text(record.read_text().replace('"step": 2', '"step": 9'))
    else:
        content = json.loads(record.read_text())
        del content["record_sha256"]
        (folder / "escape").write_bytes(b"x")
        content["files"]["escape"] = {"bytes": 1, "sha256": "0"}
        record.write_bytes(_sealed(content))  # by somebody who knows how
    assert steps_at(url_of(tmp_path)) == [1]


def test_a_store_that_changes_what_it_takes_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bit that flips on the way ends the copy before its record; the next try heals it."""
    store, mirror = store_at(tmp_path / "run"), Mirror(Remote(url_of(tmp_path)))
    write = Remote.write

    def flips(remote: Remote, name: str, chunks: Iterable[bytes], size: int) -> None:
        content = bytearray(b"".join(chunks))
        content[len(content) // 2] ^= name.endswith("optimizer.safetensors")
        write(remote, name, [bytes(content)], size)

    with monkeypatch.context() as patched:
        patched.setattr(Remote, "write", flips)
        with pytest.raises(DamagedCopyError, match=r"optimizer\.safetensors does not read back"):
            put(mirror, store, 1)
    assert steps_at(url_of(tmp_path)) == []
    assert mirror.remote.sizes() == {}  # no half of it takes room
    put(mirror, store, 1)
    assert steps_at(url_of(tmp_path)) == [1]


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    """As here: the newest `keep`, the best, and nothing of what was never finished; other runs' copies stay."""
    store, other = store_at(tmp_path / "run", range(1, 7)), store_at(tmp_path / "other", [3])
    mirror = Mirror(Remote(url_of(tmp_path)))
    put(mirror, other, 3)
    for step in range(1, 7):
        put(mirror, store, step)
    unfinished = Path(mirror.remote.root) / store.run_uid() / "step-0000000004-00000000" / "checkpoint"
    unfinished.mkdir(parents=True)
    (unfinished / "optimizer.safetensors").write_bytes(b"half")
    mirror.prune(store.run_uid(), keep=2, best=1)
    assert [(copy.step, copy.run_uid == store.run_uid()) for copy in mirror.copies()] == [
        (6, True),
        (5, True),
        (3, False),
        (1, True),
    ]
    assert len(list((Path(mirror.remote.root) / store.run_uid()).iterdir())) == 3


def test_what_a_run_had_written_up_to_the_step_is_in_its_copy(tmp_path: Path) -> None:
    """metrics.jsonl as long as at the checkpoint, though the run has written more since, and its identity."""
    store, mirror = store_at(tmp_path / "run"), Mirror(Remote(url_of(tmp_path)))
    put(mirror, store, 2)
    (copy,) = mirror.copies()
    assert mirror.remote.read(f"{copy.folder}/run/metrics.jsonl", 99) == b'{"step": 1}        \n'
    assert json.loads(mirror.remote.read(f"{copy.folder}/run/run.json", 99))["run_uid"] == store.run_uid()
    store.folder.keep_start_date(date(2026, 1, 31))
    put(mirror, store, 1)
    fresh = RunFolder(tmp_path / "fresh")
    assert start_date(mirror, fresh, "auto") == date.today()  # that of step 2, which knew of none
    mirror.withdraw(store.run_uid(), after=1)
    assert start_date(mirror, fresh, "auto") == date(2026, 1, 31)
    assert start_date(mirror, fresh, "never") == date.today()
    assert start_date(None, store.folder, "auto") == date(2026, 1, 31)


def test_a_mirror_that_cannot_be_used_is_refused(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing package with the pip command, a disk that is not mounted, one that answers too late, one read-only."""

    def refused(url: str) -> str:
        def start() -> None:
            found = mirror_of(replace(config, checkpoint=CheckpointConfig(mirror=url)))
            assert found is not None
            found.check()

        with pytest.raises(ExitWith) as end:
            start()
        assert end.value.code == ExitCode.BAD_INPUT
        return end.value.reason

    assert f"there is no folder {tmp_path}/absent" in refused(f"file://{tmp_path}/absent/run")

    def get(name: str) -> Any:
        raise ImportError(f"Install {name}fs to access it")

    with monkeypatch.context() as patched:
        patched.setattr(fsspec, "get_filesystem_class", get)
        assert "pip install -c constraints.txt s3fs" in refused("s3://bucket/run")
        assert "pip install -c constraints.txt gcsfs" in refused("gs://bucket/run")
    with monkeypatch.context() as patched:
        patched.setattr("train.checkpoints.remote.PATIENCE_SECONDS", 0.1)
        patched.setattr(Remote, "sizes", lambda remote: time.sleep(1))
        assert "no answer within 0.1 s" in refused(f"file://{tmp_path}/run")
    with monkeypatch.context() as patched:

        def write(remote: Remote, name: str, chunks: Iterable[bytes], size: int) -> None:
            raise PermissionError("Access Denied")

        patched.setattr(Remote, "write", write)
        assert "PermissionError: Access Denied" in refused(f"file://{tmp_path}/run")

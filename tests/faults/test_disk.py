"""A full, failing or slow disk: training continues, older checkpoints stay, and no temporary files are left."""

import errno
import re
import shutil
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest

from tests.compare_runs import at, known_reference, result_of
from tests.conftest import arguments, run_command
from tests.injections import DiskError, LittleSpace
from tests.tally import Tally
from train.config import CheckpointConfig, Config


@pytest.fixture
def often(config: Config) -> Config:
    """A checkpoint after each of six steps."""
    return replace(config, checkpoint=CheckpointConfig(every=1))


def leftovers(run_dir: Path) -> list[str]:
    return [path.name for path in (run_dir / "checkpoints").iterdir() if not path.name.startswith("step-")]


@pytest.mark.fault("T8")
def test_no_space_at_any_write(often: Config, tmp_path: Path, tally: Tally) -> None:
    """ENOSPC at any of a save's five files is reported; the older checkpoint stays, and the next save succeeds."""
    expected = known_reference(often)
    for number in range(tally.times(2, 10)):
        first = 6 + number  # the second save's files and the third's
        run_dir = tmp_path / f"full-{number}"
        outcome = run_command(arguments(at(often, run_dir)), DiskError(first, first))
        tally.check(outcome.returncode == 0, f"write {first}: {outcome.stderr[-300:]}")
        tally.check("No space left on device" in outcome.stdout, f"write {first}: it was not said")
        stands = 1 if number < 5 else 2
        tally.check(f"training goes on, step {stands} is the newest" in outcome.stdout, f"write {first}: which")
        tally.check(result_of(run_dir) == expected, f"write {first}: another result")
        tally.check(leftovers(run_dir) == [], f"write {first}: {leftovers(run_dir)}")


@pytest.mark.fault("T8")
def test_a_disk_that_stays_full_ends_the_run(often: Config, tmp_path: Path, tally: Tally) -> None:
    """Four failures in a row end the run with 76; with space again, it resumes from the checkpoint before them."""
    expected = known_reference(often)
    words = arguments(at(often, tmp_path / "run"))
    outcome = run_command(words, DiskError(6, 99))
    tally.check(outcome.returncode == 76, outcome.stderr[-300:])
    tally.check([p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-0000000001"], "step 1")
    again = run_command(words)
    tally.check("continues after step 1" in again.stdout, again.stdout[-300:])
    tally.check(result_of(tmp_path / "run") == expected, "another result")


@pytest.mark.fault("T8")
def test_space_is_looked_at_before(often: Config, tmp_path: Path, tally: Tally) -> None:
    """No space for one checkpoint is exit 78 before the first step; if space runs out later, that save is skipped."""
    none = run_command(arguments(at(often, tmp_path / "none")), LittleSpace((1000,)))
    tally.check(none.returncode == 78 and "not enough for one" in none.stderr, none.stderr[-300:])
    tally.check(not (tmp_path / "none" / "metrics.jsonl").exists(), "it began to train")
    later = run_command(arguments(at(often, tmp_path / "later")), LittleSpace((10**12, 10**12, 1000)))
    tally.check(later.returncode == 0, later.stderr[-300:])
    tally.check("MiB are free" in later.stdout and "training goes on" in later.stdout, later.stdout[-500:])
    tally.check("MiB, " in later.stdout and "GiB free in" in later.stdout, "the sizes at the start")


def can_mount() -> bool:
    """Whether this process may mount file systems."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", folder]
        is_mounted = shutil.which("mount") is not None and subprocess.run(command, check=False).returncode == 0
        if is_mounted:
            subprocess.run(["umount", folder], check=True)
    return is_mounted


@pytest.mark.fault("T8")
@pytest.mark.skipif(not can_mount(), reason="mounting needs root; injected errors stand for it")
def test_a_real_disk_that_is_too_small(often: Config, tmp_path: Path, tally: Tally) -> None:
    """On a file system of 600 KiB to 2 MiB the run ends with an expected code and leaves no temporary files."""
    expected = known_reference(often)
    for size in (600, 800, 1200, 2000)[: tally.times(1, 4)]:
        disk = tmp_path / f"disk-{size}"
        disk.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", str(disk)], check=True)
        try:
            words = arguments(at(often, disk / "run"))
            outcome = run_command(words)
            tally.check(outcome.returncode in (0, 76, 78), f"{size} KiB: {outcome.returncode} {outcome.stderr[-300:]}")
            found = list((disk / "run").glob("checkpoints/step-*"))
            tally.check(not list((disk / "run").glob("checkpoints/.tmp-*")), f"{size} KiB: leftovers")
            if outcome.returncode != 78:
                subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
                again = run_command(words)
                tally.check(again.returncode == 0, f"{size} KiB, more room: {again.stderr[-300:]}")
                tally.check(
                    not found or re.search("continues after|finished before", again.stdout),
                    f"{size} KiB: started again",
                )
                tally.check(result_of(disk / "run") == expected, f"{size} KiB: another result")
        finally:
            subprocess.run(["umount", str(disk)], check=True)
            shutil.rmtree(disk)


@pytest.mark.fault("T9")
def test_other_errors_and_a_slow_disk(often: Config, tmp_path: Path, tally: Tally) -> None:
    """EIO, EACCES and EROFS at writes and syncs, and a slow disk, do not change the result."""
    expected = known_reference(often)
    cases = [
        DiskError(7, 7, errno.EIO),
        DiskError(4, 4, errno.EIO, function="sync"),
        DiskError(8, 8, errno.EACCES),
        DiskError(6, 10, seconds=0.3),
        DiskError(6, 6, errno.EROFS),
        DiskError(10, 10, errno.EIO),
        DiskError(9, 9, errno.EACCES, function="sync"),
        DiskError(11, 11, errno.EIO, function="sync"),
    ]
    for number, fault in enumerate(cases[: tally.times(2, 8)]):
        run_dir = tmp_path / f"case-{number}"
        outcome = run_command(arguments(at(often, run_dir)), fault)
        tally.check(outcome.returncode == 0, f"{fault}: {outcome.stderr[-300:]}")
        tally.check(result_of(run_dir) == expected, f"{fault}: another result")
        tally.check(leftovers(run_dir) == [], f"{fault}: {leftovers(run_dir)}")

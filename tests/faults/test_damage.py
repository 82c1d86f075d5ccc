"""Truncated files and flipped bits are found, and the older checkpoint is taken, or none."""

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.saves import FILES, KEEP, fall_back, inventory, is_what_was_saved
from tests.power_cut import Tree, materialise
from tests.tally import Tally
from train.checkpoints.contents import MANIFEST
from train.checkpoints.store import CheckpointStore
from train.run.exits import ExitCode, ExitWith
from train.run.folder import RunFolder


@pytest.mark.fault("T4")
@pytest.mark.usefixtures("no_fsync")
def test_every_truncation_is_found(two: Tree, tally: Tally, tmp_path: Path) -> None:
    """A file truncated anywhere is named, its checkpoint set aside, and the older one loaded."""
    seed = random.SystemRandom().randrange(2**32)
    chance = random.Random(seed)
    rounds = tally.times(1, 2)
    for path in (*FILES, "run.json"):
        content = two[path] or b""
        cuts = [0, 1, len(content) // 2, len(content) - 1, chance.randrange(len(content))]
        cuts += [chance.randrange(len(content)) for _ in range(5 * (rounds - 1))]
        for length in cuts:
            materialise({**two, path: content[:length]}, tmp_path / "run")
            label = f"{path} cut at {length} of {len(content)}, seed {seed}"
            if path == "run.json":  # what is lost with it stands in the checkpoints
                found = CheckpointStore(RunFolder(tmp_path / "run"), KEEP).latest()
                tally.check(found and found.state.step == 2 and is_what_was_saved(found), label)
                shutil.rmtree(tmp_path / "run")
                continue
            problem = fall_back(tmp_path / "run", Path(path).name)
            tally.check(not problem, f"{label}: {problem}")


@pytest.mark.fault("T5")
@pytest.mark.usefixtures("no_fsync")
def test_every_flipped_bit_is_found_and_the_older_checkpoint_taken(two: Tree, tally: Tally, tmp_path: Path) -> None:
    """Single bits, drawn uniformly from all files of a checkpoint including the manifest, are found."""
    seed = random.SystemRandom().randrange(2**32)
    chance = random.Random(seed)
    contents = {path: two[path] or b"" for path in FILES}
    places = [(path, position) for path, content in contents.items() for position in range(len(content))]
    for path, position in chance.choices(places, k=tally.times(200, 1000)):
        damaged, bit = bytearray(contents[path]), chance.randrange(8)
        damaged[position] ^= 1 << bit
        materialise({**two, path: bytes(damaged)}, tmp_path / "run")
        problem = fall_back(tmp_path / "run", Path(path).name)
        tally.check(not problem, f"{path}, bit {bit} of byte {position}, seed {seed}: {problem}")


def truncate_all(folder: Path) -> None:
    for path in folder.iterdir():
        os.truncate(path, path.stat().st_size // 2)


def flip_all(folder: Path) -> None:
    for path in folder.iterdir():
        content = bytearray(path.read_bytes())
        content[len(content) // 3] ^= 16
        path.write_bytes(content)


RUINS: dict[str, Callable[[Path], object]] = {
    "all files cut in half": truncate_all,
    "a bit of each file flipped": flip_all,
    "all manifests missing": lambda f: (f / MANIFEST).unlink(),
}


@pytest.mark.fault("T7")
@pytest.mark.parametrize("has_record", [True, False], ids=["", "run.json lost too"])
def test_where_all_are_bad_every_start_ends_with_80(two: Tree, has_record: bool, tally: Tally, tmp_path: Path) -> None:
    """No start, now or later, silently begins a fresh run, and all files stay for inspection."""
    for name, ruin in RUINS.items():
        root = tmp_path / name
        materialise(two, root)
        for folder in (root / "checkpoints").iterdir():
            ruin(folder)
        if not has_record:
            (root / "run.json").unlink()
        codes, before = [], set(inventory(root))
        for _ in range(3):
            with pytest.raises(ExitWith) as caught:
                CheckpointStore(RunFolder(root), KEEP).latest()
            codes.append(caught.value.code)
        tally.check(codes == [ExitCode.NO_VALID_CHECKPOINT] * 3, f"{name}: {codes}")
        tally.check(before <= set(inventory(root)), f"{name}: something is gone")

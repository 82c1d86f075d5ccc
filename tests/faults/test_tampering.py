"""Forged, missing, extra, linked and special files in a checkpoint are refused unread."""

import hashlib
import io
import json
import os
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.saves import KEEP, NEWEST, fall_back, save
from tests.power_cut import Tree, materialise, tree_of
from tests.tally import Tally
from train.checkpoints.contents import ADAPTER, ADAPTER_CONFIG, CONTENTS, MANIFEST, OPTIMIZER, STATE
from train.checkpoints.store import CheckpointStore
from train.run.folder import RunFolder


def sign(folder: Path, change: Callable[[dict[str, Any]], object] = lambda manifest: None) -> bytes:
    """Writes and returns a manifest with the hashes of the current files, and with its own hash.

    Anyone who knows the format can do this: the hashes protect against bit rot, not against people.
    """
    manifest = json.loads((folder / MANIFEST).read_bytes())
    del manifest["manifest_sha256"]
    for name in CONTENTS:
        content = (folder / name).read_bytes()
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    change(manifest)
    own = hashlib.sha256(json.dumps(manifest, sort_keys=True, indent=1).encode()).hexdigest()
    text = json.dumps({**manifest, "manifest_sha256": own}, sort_keys=True, indent=1).encode()
    (folder / MANIFEST).write_bytes(text)
    return text


def replace(path: Path, by: Callable[[Path], object]) -> None:
    """Replaces a file by whatever `by` creates."""
    path.unlink()
    by(path)


def forge(folder: Path, name: str, content: bytes) -> None:
    """Replaces the content of a file, and the hashes to fit."""
    (folder / name).write_bytes(content)
    sign(folder)


def with_field(content: bytes, name: str) -> bytes:
    """A JSON object with one more field."""
    return json.dumps({**json.loads(content), name: 1}).encode()


def link_folder(folder: Path) -> None:
    """Moves the checkpoint out of the run folder and leaves a symlink to it."""
    shutil.copytree(folder, folder.parents[2] / "outside" / "whole")
    shutil.rmtree(folder)
    folder.symlink_to(folder.parents[2] / "outside" / "whole")


def twice(manifest: bytes) -> bytes:
    """The manifest with its first key twice, of which the second is the original."""
    assert manifest.startswith(b'{\n "files":')
    return b'{\n "files": {},' + manifest[1:]


ELSEWHERE = {"bytes": 4, "sha256": hashlib.sha256(b"root").hexdigest()}
# name -> (change of the newest checkpoint's folder, expected message); ../outside has a file and a FIFO
TAMPERINGS: dict[str, tuple[Callable[[Path], object], str]] = {
    "file missing": (lambda f: (f / OPTIMIZER).unlink(), OPTIMIZER),
    "manifest missing": (lambda f: (f / MANIFEST).unlink(), MANIFEST),
    "extra file": (lambda f: (f / "adapter_model.bin").touch(), "adapter_model.bin"),
    "extra hidden folder": (lambda f: (f / ".hidden").mkdir(), ".hidden"),
    "symlink to /etc/passwd": (lambda f: replace(f / STATE, lambda p: p.symlink_to("/etc/passwd")), STATE),
    "symlink to a FIFO": (
        lambda f: replace(f / STATE, lambda p: p.symlink_to(f.parents[2] / "outside" / "fifo")),
        STATE,
    ),
    "symlink to the same content": (
        lambda f: replace(f / ADAPTER_CONFIG, lambda p: p.symlink_to(f"../step-0000000001/{ADAPTER_CONFIG}")),
        ADAPTER_CONFIG,
    ),
    "the folder is a symlink": (link_folder, "not a folder"),
    "FIFO for tensors": (lambda f: replace(f / OPTIMIZER, os.mkfifo), OPTIMIZER),
    "FIFO for the manifest": (lambda f: replace(f / MANIFEST, os.mkfifo), MANIFEST),
    "folder for a file": (lambda f: replace(f / STATE, os.mkdir), STATE),
    "hard link to a file elsewhere": (
        lambda f: replace(f / STATE, lambda p: p.hardlink_to(f.parents[2] / "outside" / "file")),
        STATE,
    ),
    "later format version": (lambda f: sign(f, lambda m: m.update(format_version=2)), "format version 2"),
    "another run's": (lambda f: sign(f, lambda m: m.update(run_uid="0" * 32)), "another run"),
    "manifest is no object": (lambda f: (f / MANIFEST).write_text("[]"), MANIFEST),
    "manifest nested deeply": (lambda f: (f / MANIFEST).write_text("[" * 200_000), MANIFEST),
    "key given twice": (lambda f: (f / MANIFEST).write_bytes(twice(sign(f))), MANIFEST),
    "../ in the manifest": (
        lambda f: sign(f, lambda m: m["files"].update({"../../../outside/file": ELSEWHERE})),
        MANIFEST,
    ),
    "absolute path in the manifest": (lambda f: sign(f, lambda m: m["files"].update({"/etc/passwd": {}})), MANIFEST),
    "huge header length": (lambda f: forge(f, ADAPTER, (1 << 60).to_bytes(8, "little") + b"{}"), ADAPTER),
    "header longer than the file": (
        lambda f: forge(f, OPTIMIZER, (90 << 20).to_bytes(8, "little") + b"{}"),
        OPTIMIZER,
    ),
    "a terabyte of nothing": (lambda f: os.truncate(f / OPTIMIZER, 1 << 40), OPTIMIZER),
    "field that this program does not know": (
        lambda f: forge(f, STATE, with_field((f / STATE).read_bytes(), "surprise")),
        STATE,
    ),
    "renamed to a later step": (lambda f: f.rename(f.with_name("step-0000000009")), "step-0000000009"),
}


@pytest.fixture
def confined(tmp_path: Path) -> Iterator[list[str]]:
    """Lists what is opened outside the run folder or is no regular file; limits memory growth to 2 GiB."""
    strays: list[str] = []
    original, inside = io.open, str(tmp_path / "run")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "file").write_text("root")
    os.mkfifo(tmp_path / "outside" / "fifo")

    def watched(file: Any, *rest: Any, **named: Any) -> Any:
        real = os.path.realpath(file) if not isinstance(file, int) else inside
        if not real.startswith(inside) or (os.path.exists(real) and not os.path.isfile(real)):
            strays.append(real)
            raise OSError(f"{real} is opened")
        return original(file, *rest, **named)

    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30), limits[1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(io, "open", watched)
        yield strays
    resource.setrlimit(resource.RLIMIT_AS, limits)


def tamper(name: str, two: Tree, root: Path, strays: list[str]) -> str:
    """What a start does wrong after this tampering; empty if nothing."""
    change, said = TAMPERINGS[name]
    materialise(two, root)
    change(root / NEWEST)
    strays.clear()
    try:
        problem = fall_back(root, said)
    except Exception as error:  # a start must not end in a traceback
        problem = f"{type(error).__name__}: {error}"
    shutil.rmtree(root, ignore_errors=True)
    return f"{strays[0]} is opened" if strays else problem


@pytest.mark.fault("T6")
@pytest.mark.usefixtures("no_fsync")
def test_every_tampering_is_found(two: Tree, tally: Tally, tmp_path: Path, confined: list[str]) -> None:
    """The older checkpoint is loaded, the bad one kept and its reason printed; nothing outside the run is opened."""
    materialise(two, tmp_path / "run")
    sign(tmp_path / "run" / NEWEST)
    assert tree_of(tmp_path / "run") == two, "the manifest that is signed here is not the product's"
    shutil.rmtree(tmp_path / "run")
    for name in TAMPERINGS:
        problem = tamper(name, two, tmp_path / "run", confined)
        tally.check(not problem, f"{name}: {problem}")


@pytest.mark.fault("T6")
@pytest.mark.parametrize("name", ["symlink to a FIFO", "FIFO for state", "manifest nested deeply"])
@pytest.mark.usefixtures("no_fsync")
def test_nothing_is_read_of_a_bad_older_checkpoint(
    name: str, two: Tree, tally: Tally, tmp_path: Path, confined: list[str]
) -> None:
    """Even without run.json, neither the start, nor retention, nor the search for the run's identity reads it."""
    root = tmp_path / "run"
    materialise({path: content for path, content in two.items() if path != "run.json"}, root)
    older = root / "checkpoints" / "step-0000000001"
    if name == "FIFO for state":
        replace(older / STATE, os.mkfifo)
    else:
        TAMPERINGS[name][0](older)
    store = CheckpointStore(RunFolder(root), KEEP)
    found = store.latest()
    save(store, 3)
    tally.check(found is not None and found.state.step == 2, f"{found}")
    tally.check(confined == [], f"{confined}")

"""The run folder: who spells its names, what `--run.resume never` moves, which ids and attempts it remembers."""

import ast
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.unit.run.folders import fill, names_in
from train.run import versions as versions_module
from train.run.attempts import plain
from train.run.exits import ExitCode, ExitWith
from train.run.folder import OURS, RunFolder, read_object
from train.run.versions import code_version, source_digest

# the base's folder has one too; wandb's own settings are in a folder of this name, too
NAMES_ALSO_ELSEWHERE = {
    "config.json": ("train/models/",),
    "final": ("train/commands/train.py",),  # a key of its JSON
    "tensorboard": ("train/track/tensorboard_tracker.py", "train/foreign/"),
    "wandb": ("train/track/wandb_settings.py", "train/foreign/"),
}


def strings(path: Path) -> Iterator[str]:
    """The string constants of a module, without docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield node.value


def test_no_other_module_spells_a_name_of_the_folder() -> None:
    """Not as a string of its own, nor a name with a suffix or a dot inside another: they ask RunFolder."""
    unmistakable = {name for name in OURS - {*NAMES_ALSO_ELSEWHERE} if "." in name} | {"nonfinite-step-", "previous-"}
    assert {"run.json", "metrics.jsonl", "final", "wandb", ".lock"} <= OURS
    seen = 0
    for path in sorted((ROOT / "train").rglob("*.py")):
        if path == ROOT / "train" / "run" / "folder.py":
            continue
        for text in strings(path):
            seen += 1
            for name in OURS | unmistakable:
                if any(place in str(path) for place in NAMES_ALSO_ELSEWHERE.get(name, ())):
                    continue
                assert text != name, f"{path} spells {name}"
                is_inside = name in unmistakable and re.search(rf"(?<![\w-]){re.escape(name)}", text)
                assert not is_inside, f"{path}: {text!r} spells {name}"
    assert seen > 1000


def test_every_name_is_in_the_folder(folder: RunFolder) -> None:
    """Each entry is directly in the folder, and no two are the same."""
    paths = [getattr(folder, name) for name, entry in vars(RunFolder).items() if type(entry).__name__ == "Entry"]
    assert {path.parent for path in paths} == {folder.path}
    assert len(paths) == len(OURS) >= 13


def test_everything_of_a_run_moves_and_nothing_else(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    """All that a run can write, also what a kill left half-written; not what a user has put beside it."""
    listed = ["run.json", "config.json", "plan.json", "attempts.jsonl", "metrics.jsonl", "exit.json", "answers.json"]
    listed += ["answers_held_out.json", "nonfinite-step-3.json", "checkpoints/", "final/", "wandb/", ".heartbeats/"]
    listed += ["report.html", "audit.jsonl", "answers_general.json", "validation_answers.jsonl", "tensorboard/"]
    listed += ["defect.txt", "compare.json", "mirror.json", ".tmp-final-0123abcd/", ".run.json.tmp-17"]
    stays = [".lock", "previous-1/", "previous-9/", "log.txt", "rows.jsonl", "texts/", "nonfinite-step-x.json"]
    fill(folder, [*listed, *stays])
    folder.config.write_text('{"profile": "demo", "run": {}}')
    folder.plan.write_text('{"engine": "fused", "summary": ""}')
    assert {name.rstrip("/") for name in listed} >= OURS - {".lock"}
    folder.archive()
    assert names_in(folder.path) == {name.rstrip("/") for name in stays} | {"previous-10"}
    assert names_in(folder.path / "previous-10") == {name.rstrip("/") for name in listed}
    assert (folder.path / "previous-10" / "wandb" / "file").read_text() == "wandb/"
    assert f"the earlier run is kept in {folder.path / 'previous-10'}\n" in capsys.readouterr().out


@pytest.mark.parametrize("names", [[], ["run.json", ".lock"], ["notes.txt", "some/"], [".lock", "previous-1/"]])
def test_a_folder_without_a_run_is_left_alone(names: list[str], folder: RunFolder) -> None:
    """Fresh, locked, named by an earlier start that did nothing, or a user's: nothing moves, nothing is said."""
    folder.path.mkdir()
    fill(folder, names)
    folder.checkpoints.mkdir()
    before = names_in(folder.path)
    folder.archive()
    assert names_in(folder.path) == before


def test_a_second_job_is_refused(folder: RunFolder) -> None:
    """The lock holds, and a start removes what an earlier one said of its end."""
    fill(folder, ["exit.json", ".heartbeats/"])
    with folder.locked():
        assert names_in(folder.path) == {".lock"}
        with pytest.raises(ExitWith) as caught, folder.locked():
            pass
        assert caught.value.code == ExitCode.BAD_INPUT


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"run_uid": 7}', '{"run_uid": ""}', "[" * 5000])
def test_an_id_that_is_lost_is_made(content: str, folder: RunFolder) -> None:
    """Rubbish, or an id that is none: made once, then kept."""
    fill(folder, ["run.json"])
    folder.identity.write_text(content)
    assert folder.identifier("run_uid", lambda: "made") == "made"
    assert folder.identifier("run_uid", lambda: "again") == "made"


def test_ids_do_not_cost_each_other(folder: RunFolder) -> None:
    """run.json without a tracker's id keeps the run's, and what a later version may have written there."""
    fill(folder, ["run.json"])
    folder.identity.write_text('{"run_uid": "u", "else": [1]}')
    assert folder.identifier("wandb_id", lambda: "w") == "w"
    assert read_object(folder.identity) == {"run_uid": "u", "else": [1], "wandb_id": "w"}
    assert folder.identifier("run_uid", lambda: "other") == "u"


@pytest.mark.parametrize("moved", [0, 1, 2, 5])
def test_a_start_anew_that_is_cut_short_loses_no_metrics(
    moved: int, folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Identity and metrics go first, checkpoints last: what is left is never another run's beginning."""
    fill(folder, ["run.json", "metrics.jsonl", "attempts.jsonl", "answers.json", "checkpoints/", "final/"])
    real, count = os.rename, iter(range(100))

    def rename(source: Path, target: Path) -> None:
        if next(count) == moved:
            raise OSError(16, "Device or resource busy")
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        with pytest.raises(OSError, match="busy"):
            folder.archive()
    there = names_in(folder.path)
    assert "checkpoints" in there
    assert "metrics.jsonl" not in there or "run.json" not in there or not moved
    kept = [path for path in (folder.metrics, folder.path / "previous-1" / "metrics.jsonl") if path.exists()]
    assert [path.read_text() for path in kept] == ["metrics.jsonl"]


def test_values_are_plain_json() -> None:
    """What JSON has no word for is text; numbers and truth stay what they are."""
    values = {"norm": float("inf"), "path": Path("a/b"), "words": ("a", 1), "flag": True, "none": None, "x": 0.5}
    expected = {"norm": "inf", "path": "a/b", "words": ["a", 1], "flag": True, "none": None, "x": 0.5}
    assert plain(values) == expected
    assert json.loads(json.dumps(plain(values), allow_nan=False)) == expected


def test_the_source_digest_is_of_the_program_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Content and names count; what editors leave, and links to nowhere among it, does not."""
    monkeypatch.setattr(versions_module, "ROOT", tmp_path)
    for package in ("train", "data_tools"):
        (tmp_path / package / ".ipynb_checkpoints").mkdir(parents=True)
        (tmp_path / package / "a.py").write_text("1")
    before = source_digest()
    (tmp_path / "train" / ".ipynb_checkpoints" / "a-checkpoint.py").write_text("0")
    (tmp_path / "train" / ".#a.py").symlink_to("user@host.1234")  # Emacs's lock
    assert source_digest() == before
    (tmp_path / "data_tools" / "a.py").write_text("2")
    assert source_digest() != before


def test_the_code_version_says_when_files_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit in a checkout, -dirty behind it when a tracked file has changed; elsewhere no commit of others."""

    def git(*words: str) -> str:
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.invalid"]
        done = subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    git("init", "--quiet")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "--quiet", "-m", "one")
    monkeypatch.setattr(versions_module, "ROOT", tmp_path)
    commit = git("rev-parse", "--short=12", "HEAD")
    assert code_version() == commit
    (tmp_path / "file").write_text("2")
    assert code_version() == f"{commit}-dirty"
    (tmp_path / "below").mkdir()
    monkeypatch.setattr(versions_module, "ROOT", tmp_path / "below")
    assert commit not in code_version()

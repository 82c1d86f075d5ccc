"""A finished run loaded again: on its own base, wherever that lies."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.finished_runs import finish
from tests.parity.bases import Shape, on, rewrite, write
from train.config import Config
from train.deliver import finished
from train.deliver.finished import check_base, finished_run
from train.models import fingerprint, hub
from train.models.hub import BasePlace
from train.run.exits import ExitWith


def test_a_base_that_has_moved(config: Config, tmp_path: Path) -> None:
    """A copy under another name is the same base; one with a changed weight is not."""
    base = write(tmp_path / "base", Shape())
    run = finish(on(config, base, "none"), tmp_path / "run")
    copy = shutil.copytree(base, tmp_path / "copy")
    shutil.rmtree(base)
    check_base(finished_run(run, ["--model.name_or_path", str(copy)]))
    rewrite(copy, lambda tensors: {name: tensor + 1 for name, tensor in tensors.items()})
    with pytest.raises(ExitWith, match="not those that the adapters were trained on"):
        check_base(finished_run(run, ["--model.name_or_path", str(copy)]))


def test_a_local_copy_of_a_hub_model(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained on a commit of the hub, a folder with the same files is taken, without the commit, and no other is."""
    base = write(tmp_path / "base", Shape())

    def on_hub(name: str, revision: str) -> BasePlace:
        assert (name, revision) in (("owner/name", "main"), ("owner/name", "c0ffee"))
        return BasePlace(base, name, commit="c0ffee")

    monkeypatch.setattr(hub, "_on_hub", on_hub)
    config = on(config, base, "none")
    hub_config = replace(config, model=replace(config.model, name_or_path="owner/name"))
    run = finish(hub_config, tmp_path / "run")
    assert finished_run(run).config.model.revision == "c0ffee"
    check_base(finished_run(run))
    copy = shutil.copytree(base, tmp_path / "copy")
    moved = finished_run(run, ["--model.name_or_path", str(copy)])
    check_base(moved)
    assert fingerprint.base_fingerprint(moved.config) != moved.base["fingerprint"]
    rewrite(copy, lambda tensors: {name: tensor + 1 for name, tensor in tensors.items()})
    with pytest.raises(ExitWith, match="not those that the adapters were trained on"):
        check_base(finished_run(run, ["--model.name_or_path", str(copy)]))
    older: Any = {key: value for key, value in moved.base.items() if key != "content"}
    monkeypatch.setattr(finished, "read_object", lambda path: older if path.name == "base.json" else _read(path))
    with pytest.raises(ExitWith, match="a folder cannot be compared with a commit of the hub"):
        check_base(finished_run(run, ["--model.name_or_path", str(copy)]))


_read = finished.read_object

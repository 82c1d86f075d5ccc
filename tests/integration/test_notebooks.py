"""The notebooks run from top to bottom, on the bundled tiny base instead of a GPU's model."""

import io
import json
import re
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import pytest

from tests.conftest import ROOT, run_command
from tests.injections import AtForward
from train.commands import handloop, train
from train.deliver import receipt
from train.run.attempts import read_attempts
from train.run.folder import RunFolder
from train.track.metrics_file import read_metrics

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
# all that is replaced: the cell tagged `parameters`, beside the one tagged `install`, which is left out
PARAMETERS = {
    "HANDLOOP": "",
    "EARLIER": "",
    "OPTIONS": "--profile demo --track.wandb off --compare.num_questions 2 --compare.max_new_tokens 4",
    "LENGTH": "--train.max_steps 3 --validate.num_questions 0 --validate.tokens 1000 --validate.at_start false",
    "ASKED": "--num 1 --max-new-tokens 4 --loss-tokens 200",
}


def cells(notebook: Path) -> list[dict[str, Any]]:
    """The code cells."""
    found = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == "code"]


def tagged(cell: dict[str, Any], tag: str) -> bool:
    return tag in cell["metadata"].get("tags", [])


def in_process(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Runs a shell command of a notebook: a `handloop` command, or `echo TEXT | handloop ...`; it must succeed.

    Training is stopped in its second step the first time, as where a machine is taken away with notice.
    """
    ends: list[int] = []

    def launched(arguments: list[str], output: int | None) -> tuple[int, str]:
        words = arguments[arguments.index(str(train.MAIN)) + 1 :]
        fault = None if ends else AtForward(2, signal.SIGTERM)
        ends.append(run_command(words, fault).returncode or 0)
        return ends[-1], ""

    def shell(command: str) -> None:
        left, _, right = command.rpartition(" | ")
        monkeypatch.setattr("sys.stdin", io.StringIO(shlex.split(left)[1] + "\n" if left else ""))
        name, *words = shlex.split(right)
        assert name == "handloop"
        assert handloop.main(words) == (75 if ends == [75] and words[0] == "train" else 0), command

    monkeypatch.setattr(train, "launch", launched)
    return shell


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
def test_a_notebook_runs(
    notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every cell but the installation, in order: it trains, resumes, and merges what it has trained."""
    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(receipt, "MAX_ROWS", 6)  # what a receipt asks
    monkeypatch.setattr(receipt, "NUM_QUESTIONS", 2)
    names: dict[str, Any] = {"shell": in_process(monkeypatch), **PARAMETERS, "WORK": str(tmp_path)}
    for cell in cells(notebook):
        if tagged(cell, "parameters"):
            own: dict[str, Any] = {}
            exec("".join(cell["source"]), own)
            assert set(own) - {"__builtins__"} <= set(names), "a parameter that the test does not replace"
        elif not tagged(cell, "install"):
            # `!command` with {names} in it, as IPython runs it
            code = re.sub(
                r"^!(.*)$", lambda match: f"shell(f{match[1]!r})", "".join(cell["source"]), flags=re.MULTILINE
            )
            exec(compile(code, notebook.name, "exec"), names)
    folder = RunFolder(Path(names["RUN"]))
    assert [row["step"] for row in read_metrics(folder.metrics) if row["step"]] == [1, 2, 3]
    first, second = read_attempts(folder)
    assert first.end is not None
    assert first.end["code"] == 75
    assert second.start["from_step"] in (1, 2)
    assert folder.comparison.exists()
    assert folder.report.exists()
    assert list(folder.path.glob("merged-*/model.safetensors"))
    assert (folder.path / "export" / "adapter_model.safetensors").exists()
    assert "skipped" not in capsys.readouterr().err


def test_notebooks_are_kept_without_outputs() -> None:
    """No outputs, no counts, the two cells that the test above knows, and no command but Handloop's."""
    assert {path.stem for path in NOTEBOOKS} == {"reports", "glossary"}
    for path in NOTEBOOKS:
        found = cells(path)
        assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in found), path
        assert [sum(tagged(cell, tag) for cell in found) for tag in ("parameters", "install")] == [1, 1]
        commands = re.findall(r"^!(?:echo .* \| )?(\S+)", "\n".join("".join(cell["source"]) for cell in found), re.M)
        assert set(commands) == {"handloop", "{TRAIN}"}

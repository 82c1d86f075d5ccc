"""`handloop report`: where the page goes, and what is refused."""

import builtins
from pathlib import Path
from typing import Any

import pytest

from tests.run_folders import write_run
from train.commands.handloop import main
from train.run.folder import RunFolder


def test_the_page_lies_in_the_run_folder_or_where_it_is_wanted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One run's page is report.html in its folder, also by its final/; it changes nothing else there."""
    folder = write_run(tmp_path / "run", num_steps=12)
    (folder / "final").mkdir()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert main(["report", str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder / 'report.html'}\n"
    page = (folder / "report.html").read_text()
    assert main(["report", str(folder / "final"), "--output", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text() == page
    assert {
        path: path.read_bytes() for path in folder.rglob("*") if path.name != "report.html" and path.is_file()
    } == before


def test_several_runs_make_one_page(tmp_path: Path) -> None:
    """Their page goes where --output says, and without it nowhere."""
    folders = [str(write_run(tmp_path / name, num_steps=12)) for name in "ab"]
    assert main(["report", *folders]) == 78
    assert not list(tmp_path.rglob("*.html"))
    assert main(["report", *folders, "--output", str(tmp_path / "both.html")]) == 0
    assert "2 runs compared" in (tmp_path / "both.html").read_text()


def test_an_earlier_run_keeps_its_page(tmp_path: Path) -> None:
    """`--run.resume never` moves the page aside with the run that it is of."""
    folder = write_run(tmp_path / "run", num_steps=12)
    assert main(["report", str(folder)]) == 0
    RunFolder(folder).archive()
    assert (folder / "previous-1" / "report.html").exists()
    assert not (folder / "report.html").exists()
    assert main(["report", str(folder / "previous-1")]) == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "RUN"),
        (["{}/nowhere"], "no such folder; name a run folder"),
        (["{}"], "holds runs: name one of"),
        (["{}/run", "--output", "{}/no/page.html"], "--output FILE.html names another"),
        (["{}/run", "--output", "{}/run"], "--output FILE.html names another"),
        (["{}/run", "--optim.lr", "1"], "--optim.lr"),
    ],
)
def test_what_cannot_be_reported_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    """Exit code 78 with the reason and a way out."""
    write_run(tmp_path / "run", num_steps=3)
    assert main(["report", *(word.format(tmp_path) for word in words)]) == 78
    assert said in capsys.readouterr().err


def test_without_matplotlib_the_way_to_install_it_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run is refused with a command to paste where the library cannot be imported; no page is left."""
    real = builtins.__import__

    def without(name: str, *rest: Any, **others: Any) -> Any:
        if name.partition(".")[0] == "matplotlib":
            raise ImportError("No module named 'matplotlib'")
        return real(name, *rest, **others)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["report", str(write_run(tmp_path, num_steps=3))]) == 78
    assert "pip install -c constraints.txt -e ." in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()

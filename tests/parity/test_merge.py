"""A merged model is base and adapter as trained: for every kind of base, and where it is not, nothing is left."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, Qwen3Config, ZambaConfig

from tests.conftest import BUNDLED_BASE
from tests.finished_runs import finish, settings_of
from tests.parity.bases import VOCABULARY, Shape, on, write
from train.commands import merge as command
from train.commands.handloop import main
from train.config import Config, DataConfig
from train.deliver import receipt
from train.deliver.finished import finished_run
from train.deliver.merge import Merge, load_merged
from train.deliver.proof import limits_of
from train.models.language_model import keep_one_cpu_kernel
from train.run.exits import ExitCode, ExitWith

SHAPES = {
    "one file": Shape(),
    "sharded": Shape(is_sharded=True, family=Qwen3Config, dtype=torch.bfloat16),
    "tied": Shape(is_tied=True, dtype=torch.float16),
    "without prefix": Shape(names="", is_sharded=True),
    "with rubbish": Shape(rubbish=True),
}
IDS = torch.arange(5, 45)[None]


def adapted_logits(base: Path, final: Path, **options: Any) -> torch.Tensor:
    """By transformers and PEFT alone."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, **options)
    keep_one_cpu_kernel(model)
    model.resize_token_embeddings(json.loads((final / "base.json").read_text())["vocabulary"])
    with torch.no_grad():
        return PeftModel.from_pretrained(model, str(final)).eval()(input_ids=IDS).logits


def merged_logits(folder: Path) -> torch.Tensor:
    """By transformers, of a folder on its own."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def written(run: Path, onto: Any, target: Path, dtype: str = "fp32") -> Path:
    target.mkdir()
    Merge.of(finished_run(run), onto, dtype).write(target)
    return target


@pytest.mark.parametrize("name", SHAPES)
def test_onto_a_base_that_was_not_quantised(name: str, config: Config, tmp_path: Path) -> None:
    """Merged into the base's own weights, the model computes what PEFT computes with the adapter apart."""
    base = write(tmp_path / "base", SHAPES[name])
    settings = base / "config.json"  # as some have it
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"quantization_config": None}))
    run = finish(on(config, base, "none"), tmp_path / "run")
    wanted = adapted_logits(base, run / "final")
    got = merged_logits(written(run, "original", tmp_path / "merged"))
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-4)
    plain: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert (plain.eval()(input_ids=IDS).logits - got).abs().max() > 0.1, "the adapter changes something"


@pytest.mark.parametrize("name", [*SHAPES, "stored in 4 bits"])
def test_onto_the_base_as_it_was_trained_on(name: str, config: Config, tmp_path: Path) -> None:
    """In NF4 the dequantised weights, all of them, with the adapters added: the logits of training's own model."""
    base = write(tmp_path / "base", SHAPES.get(name, Shape(quantized="nf4", is_sharded=True)))
    run = finish(on(config, base, "nf4"), tmp_path / "run")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    options = {} if name == "stored in 4 bits" else {"quantization_config": nf4, "device_map": {"": "cpu"}}
    wanted = adapted_logits(base, run / "final", **options)
    merged = written(run, "dequantized", tmp_path / "merged")
    torch.testing.assert_close(merged_logits(merged), wanted, rtol=0, atol=2e-3)
    assert "quantization_config" not in settings_of(merged)
    if name != "stored in 4 bits":
        original = merged_logits(written(run, "original", tmp_path / "original"))
        assert (original - wanted).abs().max() > 0.05, "quantisation is a difference that this would see"


def test_onto_a_base_in_int8(config: Config, tmp_path: Path) -> None:
    """In int8 the merged weights are what the codes stand for: within half a step of the originals, and not equal."""
    base = write(tmp_path / "base", Shape())
    run = finish(on(config, base, "int8"), tmp_path / "run")
    name = "model.layers.1.mlp.up_proj.weight"
    trained = load_file(written(run, "dequantized", tmp_path / "dequantized") / "model.safetensors")[name]
    original = load_file(written(run, "original", tmp_path / "original") / "model.safetensors")[name]
    steps = load_file(base / "model.safetensors")[name].abs().amax(1, keepdim=True) / 127
    assert 0.2 < ((trained - original).abs() / steps).max() < 0.7


def test_weights_that_transformers_renames(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no stored name is an architecture's, the model is merged whole, to the same logits."""
    base = write(tmp_path / "base", Shape(is_sharded=True))
    for quantization, onto in (("none", "original"), ("nf4", "original"), ("nf4", "dequantized")):
        run = finish(on(config, base, quantization), tmp_path / f"run-{quantization}-{onto}")
        wanted = merged_logits(written(run, onto, tmp_path / f"by-file-{quantization}-{onto}"))
        with monkeypatch.context() as patch:
            patch.setattr("train.deliver.merge._names_in_files", lambda *_: {})
            got = merged_logits(written(run, onto, tmp_path / f"whole-{quantization}-{onto}"))
        torch.testing.assert_close(got, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("quantization", ["none", "nf4"])
@pytest.mark.parametrize("name", ["one file", "tied", "without prefix", "sharded"])
def test_rows_and_whole_layers(name: str, quantization: str, config: Config, tmp_path: Path) -> None:
    """New tokens' rows, in tied and untied pairs, and a head trained whole come along, with the vocabulary's size."""
    base = write(tmp_path / "base", SHAPES[name])
    config = on(config, base, quantization)
    lora = replace(config.lora, rslora=True, trainable_tokens=("<|so|>", "bolt"))
    if name == "without prefix":
        lora = replace(lora, modules_to_save=("lm_head",))
    if name == "sharded":
        lora = replace(lora, modules_to_save=("lm_head", "embed_tokens"))
    run = finish(replace(config, lora=lora), tmp_path / "run")
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    options = {"quantization_config": nf4, "device_map": {"": "cpu"}} if quantization == "nf4" else {}
    wanted = adapted_logits(base, run / "final", **options)
    merged = written(run, "original" if quantization == "none" else "dequantized", tmp_path / "merged")
    torch.testing.assert_close(merged_logits(merged), wanted, rtol=0, atol=2e-3)
    assert settings_of(merged)["vocab_size"] == wanted.shape[-1] == settings_of(base)["vocab_size"] + 2
    load_merged(merged, torch.float32, torch.device("cpu"))


def test_a_transposed_layer(config: Config, tmp_path: Path) -> None:
    """GPT-2's layers hold their weights transposed: its merged model computes what PEFT does."""
    base = write(tmp_path / "base", Shape())
    vocabulary = settings_of(base)["vocab_size"]
    shape = GPT2Config(vocab_size=vocabulary, n_embd=64, n_layer=2, n_head=4, n_positions=512)
    AutoModelForCausalLM.from_config(shape).save_pretrained(base)
    config = on(config, base, "none")
    config = replace(config, lora=replace(config.lora, target_modules=("c_attn", "c_fc")))
    run = finish(config, tmp_path / "run")
    wanted = adapted_logits(base, run / "final")
    torch.testing.assert_close(merged_logits(written(run, "original", tmp_path / "merged")), wanted, rtol=0, atol=2e-4)


@pytest.fixture
def nf4_run(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A finished run on a base in NF4, with held-out rows; receipts ask two questions and take short answers."""
    monkeypatch.setattr(receipt, "NUM_QUESTIONS", 2)
    monkeypatch.setattr(receipt, "MAX_NEW_TOKENS", 16)
    base = write(tmp_path / "base", Shape(dtype=torch.bfloat16))
    config = on(config, base, "nf4")
    return finish(
        replace(config, data=DataConfig(config.data.path, max_length=128, validation_fraction=0.3)), tmp_path / "run"
    )


def test_the_receipt_tells_merges_apart(nf4_run: Path) -> None:
    """Onto what was trained on the model is kept; with half the adapter lost it is refused, and nothing is left."""
    merge = Merge.of(finished_run(nf4_run), "dequantized", "")
    limits = limits_of(merge)
    record = command.write_with_receipt(merge, limits, nf4_run / "merged")
    assert record["receipt"]["kind"] == "held out"
    assert record["receipt"]["num_positions"] > 100
    adapter = (nf4_run / "final" / "adapter_model.safetensors").read_bytes()
    assert record["adapter_sha256"] == hashlib.sha256(adapter).hexdigest()
    assert record["receipt"]["mean_kl"] < record["merge_and_unload"]["mean_kl"] / 5
    assert json.loads((nf4_run / "merged" / command.RECEIPT).read_text()) == record
    load_merged(nf4_run / "merged", torch.bfloat16, torch.device("cpu"))
    before = sorted(path.name for path in nf4_run.iterdir())
    half = replace(merge.trained, deltas=dict(list(merge.trained.deltas.items())[::2]))
    lost = replace(merge, trained=half)
    with pytest.raises(ExitWith, match="the merged model does not behave like the trained model") as ended:
        command.write_with_receipt(lost, limits, nf4_run / "other")
    assert ended.value.code == ExitCode.UNLIKE
    assert sorted(path.name for path in nf4_run.iterdir()) == before


def test_the_receipt_is_shown_with_its_limits(nf4_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Kept or not, what was measured stands beside what is allowed; over a limit nothing is left."""
    words = ["merge", str(nf4_run), "--onto", "dequantized"]
    assert main([*words, "--max-kl", "1e-12"]) == ExitCode.UNLIKE
    out, told = capsys.readouterr()
    assert "<= 1e-12 too far" in " ".join(told.split())
    assert "nothing was kept; --max-kl and --min-agreement say what is allowed" in told
    assert not out
    assert not (nf4_run / "merged-dequantized").exists()
    assert main([*words, "--min-agreement", "0.5"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "<= 0.02 ok" in said
    assert ">= 50% ok" in said
    assert (
        "is within both limits of the trained one; answers may part where two tokens are nearly equally likely" in said
    )
    assert "likely merge_and_unload, of PEFT on the NF4 base" in said


def test_data_that_has_moved(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merge and export say what the data is for, before they read weights; at its new place it is the same data."""
    base, rows = write(tmp_path / "base", Shape()), Path(shutil.copy(config.data.path[0], tmp_path / "rows.jsonl"))
    data = DataConfig((str(rows),), max_length=128, validation_fraction=0.3)
    run = str(finish(replace(on(config, base, "none"), data=data), tmp_path / "run"))
    moved = rows.rename(tmp_path / "elsewhere.jsonl")
    for words in (["merge"], ["export", "--format", "safetensors"]):
        assert main([words[0], run, "--onto", "original", *words[1:]]) == ExitCode.BAD_INPUT
        said = capsys.readouterr().err
        assert "The data is needed for the receipt, which proves on held-out rows that" in said
        assert "If it has moved, write --data.path NEWPLACE.\n" in said
        assert "loading" not in said
    monkeypatch.setattr("train.deliver.receipt.NUM_QUESTIONS", 1)
    assert main(["merge", run, "--onto", "original", "--data.path", str(moved)]) == 0
    assert "not those that were trained on" not in capsys.readouterr().err


def test_a_base_that_has_moved(nf4_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command that loads it says which option names its new place, and takes it from there."""
    moved = (tmp_path / "base").rename(tmp_path / "elsewhere")
    merge = ["merge", str(nf4_run), "--onto", "dequantized", "--json"]
    export = ["export", str(nf4_run), "--format", "adapter"]
    for words in (merge, export, ["compare", str(nf4_run)], ["chat", str(nf4_run)]):
        assert main(words) == ExitCode.BAD_INPUT
        said = capsys.readouterr().err
        reason = f"its base is no longer in {tmp_path / 'base'}; if it has moved, write --model.name_or_path NEWPLACE"
        assert said == f"\nhandloop: {nf4_run}: {reason}\n"
    assert main([*export, "--model.name_or_path", str(moved)]) == 0
    capsys.readouterr()
    assert main(["export", str(nf4_run), "--push", "me/x", "--dry-run"]) == 0, "what is exported is sent without it"


def test_nothing_tells_of_a_folder_s_place(nf4_run: Path, tmp_path: Path) -> None:
    """Neither the paths that older transformers wrote into config.json nor the base's are in what is handed on."""
    settings = tmp_path / "base" / "config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "_name_or_path": str(tmp_path / "secret")}))
    command.main([str(nf4_run), "--onto", "dequantized"])
    for path in (nf4_run / "merged-dequantized").iterdir():
        assert str(tmp_path).encode() not in path.read_bytes(), path.name


def test_what_cannot_be_merged_is_refused(nf4_run: Path, config: Config, tmp_path: Path) -> None:
    """A changed base, an adapter that is more than LoRA, a base in 4 bits alone, and one that was never quantised."""

    def refused(run: Path, onto: str, reason: str, *words: str) -> None:
        before = sorted(run.rglob("*"))
        with pytest.raises(ExitWith, match=reason) as ended:
            command.main([str(run), "--onto", onto, *words])
        assert ended.value.code == ExitCode.BAD_INPUT
        assert sorted(run.rglob("*")) == before

    plain = finish(on(config, tmp_path / "base", "none"), tmp_path / "plain")
    refused(plain, "dequantized", "the base was not quantised; write --onto original")
    packed = write(tmp_path / "packed", Shape(quantized="nf4"))
    refused(finish(on(config, packed, "nf4"), tmp_path / "of-packed"), "original", "stored quantised")
    in_8_bits = write(tmp_path / "in-8-bits", Shape(quantized="int8"))
    of_8_bits = finish(on(config, in_8_bits, "int8"), tmp_path / "of-8-bits")
    for onto in ("original", "dequantized"):
        refused(of_8_bits, onto, "stored in 8 bits, onto which nothing is merged")
    refused(tmp_path / "base", "original", "it is no run folder")
    adapter = nf4_run / "final" / "adapter_model.safetensors"
    whole = load_file(adapter)
    save_file(whole | {"base_model.model.lm_head.bias": torch.zeros(2)}, adapter)
    refused(nf4_run, "dequantized", r"lm_head\.bias would be lost")
    save_file(whole, adapter)
    for option, value in (("model.quantization", "none"), ("lora.alpha", "1"), ("train.seed", "5")):
        refused(nf4_run, "original", rf"--{option}: a finished run is taken as it was trained", f"--{option}", value)
    weights = tmp_path / "base" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.norm.weight"] += 1
    save_file(tensors, weights, metadata={"format": "pt"})
    refused(nf4_run, "dequantized", "not those that the adapters were trained on")


def test_a_weight_that_layers_share_is_not_merged(config: Config, tmp_path: Path) -> None:
    """Zamba's blocks share their attention, and each has adapters of its own on it: one weight cannot hold both."""
    base = Path(shutil.copytree(BUNDLED_BASE, tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors")))
    blocks: Any = {"num_hidden_layers": 3, "layers_block_type": ["mamba", "hybrid", "hybrid"]}
    sizes: Any = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    shape = ZambaConfig(**sizes, **blocks, num_key_value_heads=4, attention_head_dim=32, mamba_d_state=8)
    AutoModelForCausalLM.from_config(shape).save_pretrained(base)
    run = finish(on(config, base, "none"), tmp_path / "run")
    with pytest.raises(ExitWith, match=r"is one weight of 2 layers with adapters of their own, and is not merged"):
        written(run, "original", tmp_path / "merged")

"""gpt-oss as it is shipped, experts in MXFP4: read to the bit, trained on every path, merged, or refused by name."""

import json
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from accelerate import Accelerator
from peft import PeftModel
from safetensors.torch import load_file

from tests.conftest import BUNDLED_BASE, training_of
from tests.finished_runs import finish
from tests.parity.bases import VOCABULARY, Tensors, on, rewrite, ways
from tests.parity.models import GPT_OSS, SIZES
from tests.parity.test_merge import IDS, written
from train.commands.handloop import main
from train.config import Config, LoraConfig, ModelConfig
from train.deliver.finished import finished_run, load_tuned
from train.engine.families import decoder_layers
from train.engine.host_stream import HostBlocks
from train.engine.lora_linear import dequantize
from train.engine.machine_memory import OwnMemory
from train.engine.mxfp4 import is_mxfp4
from train.engine.packed_weights import packed_bytes
from train.models.base import load_base, skeleton
from train.models.experts import packed_experts
from train.models.held_weights import held_weights
from train.models.mxfp4 import read_mxfp4
from train.models.stored import StoredWeights
from train.models.whole import train_whole
from train.run.exits import ExitWith
from train.step import optimizer_step

CPU = torch.device("cpu")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny gpt-oss with codes and scales for its experts, and the bundled tokenizer."""
    folder = tmp_path / "base"
    shutil.copytree(BUNDLED_BASE, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    torch.manual_seed(1)
    settings = SIZES | GPT_OSS | {"vocab_size": VOCABULARY, "max_position_embeddings": 512}
    T.AutoModelForCausalLM.from_config(T.GptOssConfig(**settings)).bfloat16().save_pretrained(folder)

    def packed(tensors: Tensors) -> Tensors:
        found = {}
        for name, tensor in tensors.items():
            if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
                experts, inputs, outputs = tensor.shape
                found[f"{name}_blocks"] = torch.randint(256, (experts, outputs, inputs // 32, 16), dtype=torch.uint8)
                found[f"{name}_scales"] = torch.randint(118, 124, (experts, outputs, inputs // 32), dtype=torch.uint8)
            else:
                found[name] = torch.randn(tensor.shape).bfloat16() if tensor.dim() == 1 else tensor
        return found

    rewrite(folder, packed)
    told(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return folder


def told(folder: Path, **settings: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def by_transformers(folder: Path) -> Any:
    """In fp32; transformers 5.17 leaves experts in bf16, which has all values of MXFP4."""
    return T.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).float().eval()


def adapted_logits(folder: Path, run: Path) -> torch.Tensor:
    """By transformers and PEFT alone."""
    model = by_transformers(folder)
    model.resize_token_embeddings(json.loads((run / "final" / "base.json").read_text())["vocabulary"])
    with torch.no_grad():
        return PeftModel.from_pretrained(model, str(run / "final")).eval()(input_ids=IDS).logits


def merged_logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return by_transformers(folder)(input_ids=IDS).logits


def loaded(folder: Path, quantization: Any = "none", streamed: tuple[int, ...] = ()) -> Any:
    host = HostBlocks(streamed, OwnMemory(pin=False))
    return load_base(ModelConfig(str(folder), quantization=quantization), torch.float32, CPU, host, 0, False)[0]


def test_values_are_those_of_the_format(base: Path) -> None:
    """Every code with every power is what transformers makes of it, in fp32 and rounded to bf16, row by row."""
    theirs = by_transformers(base)
    names = [name for name, parameter in theirs.named_parameters() if parameter.dim() == 3]
    assert len(names) == 6
    with ExitStack() as files:
        stored = StoredWeights([base / "model.safetensors"], files)
        for name in names:
            for dtype in (torch.float32, torch.bfloat16):
                packed = read_mxfp4(stored, name, dtype, CPU)
                found = torch.full((*packed.quant_state.shape[:2], 100), torch.nan, dtype=dtype)  # type: ignore[attr-defined]
                dequantize(packed, found[..., : packed.quant_state.shape[2]])  # type: ignore[attr-defined]
                wanted = theirs.get_parameter(name).data.transpose(1, 2)
                assert torch.equal(found[..., : wanted.shape[2]].float(), wanted)
    tensors = load_file(base / "model.safetensors")
    assert all(len(tensors[f"{name}_blocks"].unique()) == 256 for name in names)


@pytest.mark.parametrize("streamed", [(), (0, 2)])
def test_a_base_computes_what_transformers_computes(base: Path, streamed: tuple[int, ...]) -> None:
    """Its logits, resident and streamed; experts take 4.25 bits and stay in them between two passes."""
    theirs = by_transformers(base)
    found, ids = loaded(base, streamed=streamed), torch.randint(VOCABULARY, (1, 9))
    with torch.no_grad():
        torch.testing.assert_close(found(ids).logits, theirs(ids).logits, rtol=0, atol=1e-4)
    packed = packed_experts(found)
    assert len(packed) == 6
    assert all(is_mxfp4(linear.weight) for linear in packed)
    state: Any = packed[0].weight
    assert 8 * (state.nbytes + state.quant_state.absmax.nbytes) == 4.25 * state.quant_state.shape.numel()
    held = held_weights(found)
    assert held.quantized.keys() == {"MXFP4"}
    assert held_weights(loaded(base, "nf4")).quantized.keys() == {"MXFP4", "NF4"}


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_runs_of_every_path(base: Path, quantization: Any, config: Config) -> None:
    """Losses of six steps on the fused engine are the reference engine's, streamed ones resident ones to the bit, with
    adapters on experts, too.

    As of every mixture, the agreement of each block with transformers' is tested before the first step.
    """
    config = replace(on(config, base, quantization), data=replace(config.data, packing=False))
    runs = {way: training_of(each, Accelerator(cpu=True)) for way, each in ways(config).items()}
    assert [run.model.engine_name for run in runs.values()] == ["reference", "fused", "fused"]
    curves = {way: [optimizer_step(run, step).loss for step in range(6)] for way, run in runs.items()}
    assert curves["resident"][-1] < curves["resident"][0]
    assert curves["resident"] == pytest.approx(curves["reference"], rel=2e-3)
    assert curves["streamed"] == pytest.approx(curves["resident"], rel=1e-5)
    tuned = runs["resident"].model
    assert all(group.parameters for block in tuned.engine.stack.blocks for group in block.groups)  # type: ignore[union-attr]
    assert all(is_mxfp4(linear.weight) for linear in packed_experts(tuned.causal_lm))  # type: ignore[arg-type]
    assert tuned.adapted.peft_config["default"].target_parameters == [  # type: ignore[union-attr]
        "mlp.experts.down_proj",
        "mlp.experts.gate_up_proj",
    ]


def test_adapters_are_loaded_by_peft(base: Path, config: Config, tmp_path: Path) -> None:
    """transformers and PEFT alone, on values that transformers dequantises, compute what training's model does."""
    run = finish(on(config, base, "none"), tmp_path / "run")
    found = adapted_logits(base, run)
    tuned = load_tuned(finished_run(run)).model
    with torch.no_grad(), tuned.generating():
        wanted = tuned.adapted(input_ids=IDS).logits
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4)
    with pytest.raises(ExitWith, match="adapters on experts stored transposed, or in MXFP4, are not merged"):
        written(run, "original", tmp_path / "merged")


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_merge_copies_experts(base: Path, quantization: Any, config: Config, tmp_path: Path) -> None:
    """Adapters on attention are merged, experts' bytes are the base's, and config.json still tells what they are."""
    lora = LoraConfig(target_modules=ATTENTION, dropout=0.0)
    run = finish(replace(on(config, base, quantization), lora=lora), tmp_path / "run")
    merged = written(run, "original", tmp_path / "merged")
    torch.testing.assert_close(merged_logits(merged), adapted_logits(base, run), rtol=0, atol=2e-4)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, merged))
    assert before.keys() == after.keys()
    same = [name for name in before if torch.equal(before[name].to(after[name].dtype), after[name])]
    assert {name for name in before if "_proj_" in name or "lm_head" in name} <= set(same)
    assert len(same) == len(before) - 3 * len(ATTENTION)
    assert loaded(merged).config.quantization_config["quant_method"] == "mxfp4"


def without(end: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: each for name, each in tensors.items() if not name.endswith(end)}


def test_what_cannot_be_is_refused_by_name(base: Path, config: Config) -> None:
    """Files that lack scales or have others, LLM.int8, full fine-tuning, codes that config.json does not tell of."""
    with pytest.raises(ExitWith, match=r"--model\.quantization int8: .* experts in MXFP4"):
        loaded(base, "int8")
    with pytest.raises(ExitWith, match=r"--train\.method full: .* stored in MXFP4"):
        train_whole(loaded(base), config)
    whole = (base / "model.safetensors").read_bytes()
    name = "model.layers.1.mlp.experts.down_proj_scales"
    rewrite(base, without(name))
    with pytest.raises(ExitWith, match=rf"(?s)the files lack {name}"):
        loaded(base)
    (base / "model.safetensors").write_bytes(whole)
    rewrite(base, lambda tensors: tensors | {name: tensors[name][:-1]})
    with pytest.raises(ExitWith, match=rf"(?s){name} is \[5, 64, 3\] in the files, \[6, 64, 3\] by config.json"):
        loaded(base)
    (base / "model.safetensors").write_bytes(whole)
    rewrite(base, lambda tensors: tensors | {name: tensors[name].bfloat16()})
    with pytest.raises(ExitWith, match=r"down_proj should be in MXFP4 by config.json, and its .* are no bytes"):
        loaded(base)
    (base / "model.safetensors").write_bytes(whole)
    told(base, quantization_config=None)
    with pytest.raises(ExitWith, match=r"are stored as U8, and config\.json has no quantization_config"):
        loaded(base)


def test_a_plan(base: Path, capsys: pytest.CaptureFixture) -> None:
    """`handloop plan` plans the fused engine for it from config.json alone, its experts in 4.25 bits."""
    (base / "model.safetensors").unlink()
    words = ["--profile", "a100", "--model.name_or_path", str(base), "--gpu", "24GiB", "--lora.dropout", "0"]
    words += ["--data.max_length", "256"]
    assert main(["plan", *words]) == 0
    shown = capsys.readouterr().out
    assert "3 of 3 blocks keep their activations" in shown
    sketched = decoder_layers(skeleton(ModelConfig(str(base), quantization="none"), torch.bfloat16))  # type: ignore[arg-type]
    of_experts = [packed_bytes(linear) for layer in sketched for linear in layer.linears[-2:]]
    assert sum(of_experts) == pytest.approx(3 * 6 * 3 * 96 * 64 * 4.25 / 8, rel=0.05)

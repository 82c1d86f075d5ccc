"""Runs of hybrids: what each engine computes, what is trained, resumed, merged and refused."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from safetensors.torch import load_file

from tests.conftest import BUNDLED_BASE, arguments, run_command
from tests.finished_runs import export_refusal, finish
from tests.multimodal import logits_of
from tests.parity.bases import VOCABULARY, by_transformers, first_loss, on, ways
from tests.parity.models import DELTA, LINEAR, SIZES
from train.checkpoints.contents import ADAPTER
from train.config import Config, EngineConfig
from train.deliver.finished import finished_run, load_tuned
from train.deliver.merge import Merge

IDS = torch.arange(5, 45)[None]


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A checkpoint of random weights with the bundled tokenizer."""
    folder = tmp_path / "base"
    shutil.copytree(BUNDLED_BASE, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    torch.manual_seed(0)
    sizes = SIZES | {"vocab_size": VOCABULARY}
    shape = T.Qwen3_5TextConfig(**sizes, **DELTA, initializer_range=0.1, layer_types=LINEAR)
    T.AutoModelForCausalLM.from_config(shape).save_pretrained(folder)
    return folder


def plain(folder: Path) -> Any:
    return T.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_every_path_has_the_loss_of_samples_alone(quantization: str, config: Config, base: Path) -> None:
    """Reference, resident and streamed: the first loss of two samples is that of plain transformers, one at a time."""
    config = on(config, base, quantization)
    wanted = by_transformers(config)
    found = {name: first_loss(each) for name, each in ways(config).items()}
    assert found == pytest.approx(dict.fromkeys(found, wanted), rel=1e-4)


def test_a_run_on_the_engine(config: Config, base: Path, tmp_path: Path) -> None:
    """A packed run, resumed after two of four steps, ends in the adapter of one that was left alone.

    Merged, transformers computes of it what the tuned model computes.
    """
    config = replace(on(config, base, "none"), engine=EngineConfig(kind="fused"))
    config = replace(config, data=replace(config.data, packing=True), batch=replace(config.batch, accumulation=1))
    config = replace(config, optim=replace(config.optim, schedule="constant"))
    finals = []
    for name, stops in (("whole", [4]), ("resumed", [2, 4])):
        for steps in stops:
            train, run = replace(config.train, max_steps=steps), replace(config.run, dir=str(tmp_path / name))
            outcome = run_command(arguments(replace(config, train=train, run=run)))
            assert outcome.returncode == 0, outcome.stderr
            said = outcome.stdout
            assert "engine    fused; linear attention: the gated delta rule by torch code" in said
            assert "2 have linear attention, so there are no CUDA graphs" in said
            assert ("continues after step 2" in said) == ((name, steps) == ("resumed", 4))
        finals.append(load_file(tmp_path / name / "final" / ADAPTER))
    assert all(torch.equal(finals[0][name], finals[1][name]) for name in finals[0] | finals[1])
    assert any("linear_attn.in_proj_qkv.lora_B" in name and tensor.any() for name, tensor in finals[0].items())
    (tmp_path / "merged").mkdir()
    run = finished_run(tmp_path / "whole")
    Merge.of(run, "original", "fp32").write(tmp_path / "merged")
    model = load_tuned(run).model
    with model.generating():
        tuned = logits_of(model.causal_lm, IDS)
    assert (tuned - logits_of(plain(base), IDS)).abs().max() > 1e-3
    torch.testing.assert_close(logits_of(plain(tmp_path / "merged"), IDS), tuned, rtol=0, atol=1e-4)


def test_gguf_is_refused_by_name(config: Config, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Of a hybrid no GGUF is written, and the message names its class."""
    run = finish(on(config, base, "none"), tmp_path / "run")
    said = export_refusal([str(run), "--format", "gguf", "--onto", "original"], capsys)
    assert "Qwen3_5ForCausalLM is not one of" in said

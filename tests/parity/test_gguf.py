"""What real llama.cpp computes from the files that are written, against transformers."""

from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch

from tests.gguf_models import SHAPES, logits_of, model_folder, needs_llama_cpp, written
from train.config import LLAMA_LINEAR_LAYERS
from train.deliver import llama_cpp_runner
from train.deliver.adapter_delta import Rows, read_trained
from train.deliver.gguf_adapter import write_adapter_gguf
from train.deliver.gguf_writer import write_gguf
from train.deliver.llama_cpp_runner import LlamaCpp
from train.models.text_part import Names
from train.run.exits import ExitWith

pytestmark = needs_llama_cpp
IDS = [0, 5, 1500, 2, 77, 77, 300, 2047, 9, 10, 640, 31] * 16  # 192 tokens: beyond what scaled embeddings were made for


@pytest.mark.parametrize("name", SHAPES)
def test_llama_cpp_computes_what_transformers_computes(name: str, tmp_path: Path) -> None:
    """Each family and variant in fp32: the same logits at every position up to the rounding of sums; also in shards."""
    model = model_folder(tmp_path, SHAPES[name], shard_size="300KB")
    write_gguf(tmp_path, tmp_path / "tiny.gguf", "F32", *written(tmp_path))
    with LlamaCpp(tmp_path / "tiny.gguf", is_exact=True) as llama:
        found = llama.logits(IDS, range(len(IDS)))
    wanted = logits_of(model, IDS)
    assert found.shape == wanted.shape
    assert (found - wanted).norm() <= 2e-5 * wanted.norm()


def test_a_row_may_be_longer_than_a_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Computed 50 tokens at a time, 192 tokens have the same logits, each at its place, asked for all or for some."""
    model = model_folder(tmp_path, SHAPES["llama"])
    write_gguf(tmp_path, tmp_path / "tiny.gguf", "F32", *written(tmp_path))
    monkeypatch.setattr(llama_cpp_runner, "MAX_BATCH", 50)
    with LlamaCpp(tmp_path / "tiny.gguf", is_exact=True) as llama:
        found = llama.logits(IDS, range(len(IDS)))
        places = [0, 49, 50, 191, 7]  # of the first, second and last of 4 batches, not of the third
        some = llama.logits(IDS, places)
    wanted = logits_of(model, IDS)
    assert (found - wanted).norm() <= 2e-5 * wanted.norm()
    assert some.shape == (len(places), wanted.shape[1])
    assert (some - wanted[places]).norm() <= 2e-5 * wanted[places].norm()


@pytest.mark.parametrize("uses_rslora", [False, True])
@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_an_adapter_over_the_base_computes_what_peft_computes(name: str, uses_rslora: bool, tmp_path: Path) -> None:
    """The adapters' own file over the base's: PEFT's logits, not the base's; with rsLoRA's scale, too."""
    base = model_folder(tmp_path, SHAPES[name])
    shape, vocabulary = written(tmp_path)
    write_gguf(tmp_path, tmp_path / "base.gguf", "F32", shape, vocabulary)
    targets = [*LLAMA_LINEAR_LAYERS, "lm_head"]
    lora = peft.LoraConfig(r=3, lora_alpha=7, target_modules=targets, use_rslora=uses_rslora, init_lora_weights=False)
    plain = logits_of(base, IDS)
    adapted = peft.get_peft_model(base, lora).eval()
    adapted.save_pretrained(str(tmp_path / "final"), save_embedding_layers=False)
    trained = read_trained(tmp_path / "final", 0, Names())
    assert len(trained.deltas) == 7 * 2 + 1
    write_adapter_gguf(tmp_path / "final", tmp_path / "adapter.gguf", shape, trained, "tiny")
    with LlamaCpp(tmp_path / "base.gguf", adapter=tmp_path / "adapter.gguf", is_exact=True) as llama:
        found = llama.logits(IDS, range(len(IDS)))
    wanted = logits_of(adapted, IDS)
    assert (found - wanted).norm() <= 2e-5 * wanted.norm()
    assert (found - plain).norm() > 0.1 * wanted.norm()


def test_adapters_that_llama_cpp_has_no_place_for_are_refused(tmp_path: Path) -> None:
    """Of a tied head, which the file has no tensor of; and an adapter of another architecture's file."""
    base = model_folder(tmp_path, SHAPES["llama, tied"])
    shape, vocabulary = written(tmp_path)
    lora = peft.LoraConfig(r=3, target_modules=["lm_head"], init_lora_weights=False)
    peft.get_peft_model(base, lora).save_pretrained(str(tmp_path / "final"), save_embedding_layers=False)
    trained = read_trained(tmp_path / "final", 0, Names())
    with pytest.raises(ExitWith, match="no adapter of lm_head"):
        write_adapter_gguf(tmp_path / "final", tmp_path / "adapter.gguf", shape, trained, "tiny")
    rows = replace(trained, rows={"model.embed_tokens.weight": Rows([1], torch.zeros(1, 64))})
    with pytest.raises(ExitWith, match=r"model.embed_tokens.weight was trained, and only adapters of linear layers"):
        write_adapter_gguf(tmp_path / "final", tmp_path / "adapter.gguf", shape, rows, "tiny")
    write_gguf(tmp_path, tmp_path / "base.gguf", "F32", shape, vocabulary)
    with pytest.raises(ExitWith, match=r"llama.cpp refuses it: .*expect general.type to be 'adapter'"):
        LlamaCpp(tmp_path / "base.gguf", adapter=tmp_path / "base.gguf")


def test_answers_are_greedy_and_end_before_an_end_token(tmp_path: Path) -> None:
    """Token for token what the logits say, from a prompt of ids; the end token is not part of the answer."""
    model = model_folder(tmp_path, SHAPES["llama"])
    write_gguf(tmp_path, tmp_path / "tiny.gguf", "F32", *written(tmp_path))
    whole: list[int] = [5, 6, 7]
    for _ in range(8):
        whole.append(int(logits_of(model, whole)[-1].argmax()))
    answer = whole[3:]
    with LlamaCpp(tmp_path / "tiny.gguf", max_new_tokens=8, is_exact=True) as llama:
        assert llama.answer(whole[:3]) == answer
    end = answer[4]
    with LlamaCpp(tmp_path / "tiny.gguf", [end], max_new_tokens=8, is_exact=True) as llama:
        assert llama.answer(whole[:3]) == answer[: answer.index(end)]

"""Greedy answers: in batches that fit where a GPU has little memory left, and without the base's own settings."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForCausalLM

from tests.conftest import asked_in, training_of
from train.config import Config, ModelConfig
from train.deliver.compare import Answer, compare
from train.deliver.generation import Completion, Generator
from train.models.language_model import LanguageModel
from train.models.tokenizer import load_tokenizer


@pytest.mark.parametrize("most", [1, 3])
def test_questions_are_asked_in_smaller_batches_where_memory_ends(
    most: int, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU that holds `most` answers at a time gives the answers of one that holds all; below one it is an error."""
    tokenizer = load_tokenizer(config).backend
    asked = asked_in(config, 7)
    model = training_of(config, Accelerator(cpu=True)).model
    wanted = compare(Generator(model, tokenizer, [0], 6), asked, lambda: False)
    generate, sizes = Generator.__call__, []

    def small(self: Generator, prompts: Any) -> Any:
        sizes.append(len(prompts))
        if len(prompts) > most:
            raise torch.OutOfMemoryError("no more")
        return generate(self, prompts)

    monkeypatch.setattr(Generator, "__call__", small)
    assert compare(Generator(model, tokenizer, [0], 6), asked, lambda: False) == wanted
    assert max(sizes) == 7
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        compare(Generator(model, tokenizer, [0], 6), asked, lambda: False)


def test_an_answer_ends_where_the_base_takes_no_more(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """At its last position, not stopped; behind a prompt that fills them there is none, and the others have theirs."""
    model = training_of(config, Accelerator(cpu=True)).model
    generator = Generator(model, load_tokenizer(config).backend, [-1], 6)
    monkeypatch.setattr("train.deliver.generation.positions_of", lambda _: 12)
    lengths = (4, 9, 12, 20)
    found = [generator([list(range(5, 5 + length))])[0] for length in lengths]
    assert [each.num_tokens for each in found] == [6, 3, 0, 0]
    assert not any(each.is_stopped for each in found)
    together = generator([list(range(5, 5 + length)) for length in (9, 20, 4)])
    assert [each.num_tokens for each in together] == [3, 0, 3]


# what a base may bring along, each of which changes a greedy answer
OWN_SETTINGS = {
    "do_sample": True,
    "temperature": 0.3,
    "top_k": 3,
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 2,
    "suppress_tokens": list(range(100, 1000)),
    "begin_suppress_tokens": list(range(1000, 1500)),
    "forced_bos_token_id": 7,
    "forced_eos_token_id": 9,
    "min_new_tokens": 3,
    "num_beams": 3,
    "eos_token_id": list(range(300, 900)),
}
STOP = 1


def base_with(shape: Path, folder: Path, own: dict[str, Any]) -> Path:
    """A tiny base with weights, whose generation_config.json is `own`; without one where that is empty."""
    shutil.copytree(shape, folder)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(shape)).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if own:
        (folder / "generation_config.json").write_text(json.dumps(own))
    return folder


def model_at(folder: Path, config: Config) -> tuple[LanguageModel, Any, Config]:
    own = replace(config, model=ModelConfig(str(folder), quantization="none"))
    return training_of(own, Accelerator(cpu=True)).model, load_tokenizer(own).backend, own


def answers_of(folder: Path, config: Config) -> list[Answer]:
    model, tokenizer, own = model_at(folder, config)
    return compare(Generator(model, tokenizer, [STOP], 12), asked_in(own, 5), lambda: False)


def by_hand(model: LanguageModel, prompt: list[int]) -> list[int]:
    """The argmax of each position, until STOP; no cache, no padding, none of transformers' generation."""
    ids, causal_lm = list(prompt), model.causal_lm
    for _ in range(12):
        logits: Any = causal_lm(input_ids=torch.tensor([ids]), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] == STOP:
            break
    return ids[len(prompt) :]


def test_a_base_s_own_settings_do_not_reach_the_answers(shape: Path, config: Config, tmp_path: Path) -> None:
    """Penalties, forced, suppressed and stop tokens in generation_config.json leave the answers as they are without."""
    plain = base_with(shape, tmp_path / "plain", {})
    opinionated = base_with(shape, tmp_path / "opinionated", OWN_SETTINGS)
    assert answers_of(opinionated, config) == answers_of(plain, config)


def test_greedy_is_the_argmax(shape: Path, config: Config, tmp_path: Path) -> None:
    """What is generated is what a loop over argmax finds, and the base has its settings again afterwards."""
    model, tokenizer, own = model_at(base_with(shape, tmp_path / "base", OWN_SETTINGS), config)
    prompts = [list(question.prompt) for question in asked_in(own, 4)]
    found: list[Completion] = []
    with model.generating(), torch.no_grad():
        found = Generator(model, tokenizer, [STOP], 12)(prompts)
        wanted = [by_hand(model, prompt) for prompt in prompts]
    kept: Any = model.causal_lm
    assert kept.generation_config.repetition_penalty == 5.0
    for completion, tokens in zip(found, wanted, strict=True):
        assert completion.is_stopped == (STOP in tokens)
        assert completion.text == tokenizer.decode([token for token in tokens if token != STOP]).strip()

"""Who a chat talks to: a run's model, and models without a run, resident and streamed."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.conftest import BUNDLED_BASE, tokenizer_at
from tests.unit.conftest import MAX_NEW_TOKENS
from train.cli import parse_over
from train.data import read_data
from train.deliver.finished import finished_run, today_of
from train.deliver.partner import partner_of_model, partner_of_run, with_stored_quantization
from train.deliver.questions import questions_of
from train.deliver.sampling import Sampling
from train.deliver.speaker import Speaker, Spoken
from train.deliver.talk import Talk
from train.models.tokenizer import load_tokenizer
from train.profiles import data_alone

GREEDY = Sampling(max_new_tokens=MAX_NEW_TOKENS)


class Listener:
    """In a speaker's place; keeps the prompts."""

    def __init__(self) -> None:
        self.prompts: list[list[int]] = []

    def answer(self, prompt: list[int], *_: Any) -> Spoken:
        self.prompts.append(prompt)
        return Spoken("yes", "stopped", 1, 1.0, 0)


def asked(partner: Any, questions: list[str], with_adapters: bool) -> list[str]:
    """The first answers to each question."""
    speaker = Speaker(partner.model, partner.tokenizer, partner.end_token_ids)
    found = []
    with partner.model.generating():
        for question in questions:
            talk = Talk(speaker, partner.prompts, partner.context, GREEDY, with_adapters)
            found.append(talk.ask(question, lambda text: None, lambda: False, lambda line: None).text)
    return found


@pytest.mark.parametrize("words", [[], ["--memory.offload", "stream"]], ids=["resident", "streamed"])
def test_a_run_s_first_answers_are_those_of_its_questions(words: list[str], finished_path: Path) -> None:
    """With adapters and without they are those in answers.json, also where the base is streamed."""
    rows = json.loads((finished_path / "answers.json").read_text())
    partner = partner_of_run(finished_run(finished_path, words))
    assert partner.context == 1024
    questions = [row["question"] for row in rows]
    for with_adapters, key in ((True, "after"), (False, "before")):
        assert asked(partner, questions, with_adapters) == [row[key] for row in rows]
    assert bool(partner.model.away.host.numbers) == bool(words)


def test_a_first_turn_s_prompt_is_the_trained_one(finished_path: Path) -> None:
    """Its ids are those before the answer in the training samples, for every row of the run."""
    run = finished_run(finished_path)
    partner = partner_of_run(run)
    tokenizer = load_tokenizer(run.config).backend
    samples = read_data(run.config, tokenizer, today_of(run)).training.samples
    questions = questions_of(samples, range(len(samples)), tokenizer, 100)
    assert len(questions) == 19
    for question in questions:
        listener: Any = Listener()
        talk = Talk(listener, partner.prompts, partner.context, GREEDY)
        talk.ask(question.text, print, lambda: False, print)
        assert listener.prompts == [question.prompt]


def test_a_model_without_a_run(tmp_path: Path) -> None:
    """A folder that is not quantised is loaded so, answers as transformers does, and stops at its own end tokens."""
    folder = Path(shutil.copytree(BUNDLED_BASE, tmp_path / "model"))
    named = parse_over(data_alone(), ["--model.name_or_path", str(folder), "--run.device", "cpu"], "")
    config = with_stored_quantization(named)
    assert config.model.quantization == "none"
    partner = partner_of_model(config)
    tokenizer: Any = tokenizer_at()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Who?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = plain.generate(**prompt, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert asked(partner, ["Who?"], False) == [tokenizer.decode(ids).strip()]
    settings = json.loads((folder / "generation_config.json").read_text())
    settings["eos_token_id"] = [int(ids[3]), 5]
    (folder / "generation_config.json").write_text(json.dumps(settings))
    assert asked(partner_of_model(config), ["Who?"], False) == [tokenizer.decode(ids[:3]).strip()]


def test_how_a_model_s_files_are_quantised_is_found(tmp_path: Path) -> None:
    """Files in 4 and in 8 bits are loaded as what they are, without being told."""
    for stored, kind in (({"load_in_4bit": True}, "nf4"), ({"load_in_8bit": True}, "int8")):
        folder = tmp_path / kind
        shutil.copytree(BUNDLED_BASE, folder)
        shape = json.loads((folder / "config.json").read_text())
        shape["quantization_config"] = {"quant_method": "bitsandbytes", **stored}
        (folder / "config.json").write_text(json.dumps(shape))
        named = parse_over(data_alone(), ["--model.name_or_path", str(folder)], "")
        assert with_stored_quantization(named).model.quantization == kind

"""Answers as they are written: whole characters, all of the text, and the end that was asked for."""

import os
import signal
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from accelerate import Accelerator

from tests.conftest import tokenizer_at, training_of
from tests.parity.bases import on
from tests.unit.models.test_agreement import SIZES, write
from train.config import Config
from train.deliver.finished import Tuned, finished_run, load_tuned
from train.deliver.generation import Generator
from train.deliver.sampling import Sampling
from train.deliver.speaker import Speaker, TextStream

GREEDY = Sampling(max_new_tokens=16)


@pytest.fixture(scope="module")
def tuned(finished_path: Path) -> Iterator[Tuned]:
    """The finished run's model, as a chat has it."""
    found = load_tuned(finished_run(finished_path))
    with found.model.generating():
        yield found


def ids_of(tuned: Tuned, text: str) -> list[int]:
    tokenizer: Any = tuned.tokenizer
    turns = [{"role": "user", "content": text}]
    return tokenizer.apply_chat_template(turns, add_generation_prompt=True)["input_ids"]


def said_by(speaker: Speaker, prompt: list[int], sampling: Sampling = GREEDY, adapters: bool = True) -> Any:
    pieces: list[str] = []
    spoken = speaker.answer(prompt, sampling, adapters, pieces.append, lambda: False)
    assert "".join(pieces).strip() == spoken.text
    return spoken


def test_answers_are_the_generator_s(tuned: Tuned) -> None:
    """With adapters and without, the text, its length and how it ended are those of batched greedy decoding."""
    speaker = Speaker(tuned.model, tuned.tokenizer, tuned.end_token_ids)
    generator = Generator(tuned.model, tuned.tokenizer, tuned.end_token_ids, 16)
    ends = set()
    for number in range(3):
        prompt = ids_of(tuned, f"What is part {number}?")
        for adapters in (True, False):
            with nullcontext() if adapters else tuned.model.without_adapters():
                (wanted,) = generator([prompt])
            spoken = said_by(speaker, prompt, adapters=adapters)
            assert (spoken.text, spoken.num_tokens) == (wanted.text, wanted.num_tokens)
            assert spoken.ended == ("stopped" if wanted.is_stopped else "length")
            ends.add(spoken.ended)
    assert ends == {"stopped", "length"}


def test_a_model_with_states_of_its_own_answers(config: Config, tmp_path: Path) -> None:
    """Mamba takes no keys and values: its answers are the generator's all the same, and nothing is kept."""
    sizes = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "initializer_range")}
    folder = write(tmp_path / "base", T.MambaConfig(**sizes, state_size=8))
    model, tokenizer = training_of(on(config, folder, "none"), Accelerator(cpu=True)).model, tokenizer_at()
    prompt = tokenizer("What is part 1?")["input_ids"]
    with model.generating():
        spoken = said_by(Speaker(model, tokenizer, [1]), prompt)
        (wanted,) = Generator(model, tokenizer, [1], GREEDY.max_new_tokens)([prompt])
    assert (spoken.text, spoken.num_tokens, spoken.num_kept) == (wanted.text, wanted.num_tokens, 0)


def test_kept_keys_and_values_change_nothing(tuned: Tuned) -> None:
    """A prompt that goes on from the last turn reads its new tokens alone, to the same answer; another one all."""
    first = ids_of(tuned, "What is part 1?")
    speaker = Speaker(tuned.model, tuned.tokenizer, tuned.end_token_ids)
    said_by(speaker, first)
    cached = list(speaker.cached)
    longer = [*cached, *ids_of(tuned, "And what is part 2?")]
    fresh = said_by(Speaker(tuned.model, tuned.tokenizer, tuned.end_token_ids), longer)
    kept = said_by(speaker, longer)
    assert (fresh.num_kept, kept.num_kept) == (0, len(cached))
    assert len(cached) > len(first)
    assert (kept.text, kept.ended) == (fresh.text, fresh.ended)
    said_by(speaker, first)
    other = [*speaker.cached[:3], speaker.cached[3] + 1, *speaker.cached[4:], 5]  # one earlier token differs
    assert said_by(speaker, other).num_kept == 0
    assert said_by(speaker, [*speaker.cached, 5], adapters=False).num_kept == 0  # the base's are others
    assert said_by(speaker, first).num_kept == 0


def test_a_seed_repeats_an_answer(tuned: Tuned) -> None:
    """With a temperature the same seed gives the same answer, another seed or temperature another one."""
    speaker, prompt = Speaker(tuned.model, tuned.tokenizer, tuned.end_token_ids), ids_of(tuned, "What?")
    warm = Sampling(temperature=2.0, max_new_tokens=16, seed=1)
    found = [said_by(speaker, prompt, each).text for each in (warm, warm, warm.with_value("seed", "2"))]
    assert found[0] == found[1] != found[2]
    narrow = warm.with_value("top_k", "1")
    assert said_by(speaker, prompt, narrow).text == said_by(speaker, prompt).text
    assert said_by(speaker, prompt, warm.with_value("top_p", "0.000001")).text == said_by(speaker, prompt).text


def test_an_answer_ends_when_asked(tuned: Tuned) -> None:
    """Asked once, it ends behind the next token and its cache is good; asked twice, within it, without a cache."""
    speaker, prompt = Speaker(tuned.model, tuned.tokenizer, tuned.end_token_ids), ids_of(tuned, "What is part 1?")
    pieces: list[str] = []
    spoken = speaker.answer(prompt, GREEDY, False, pieces.append, lambda: len(pieces) >= 3)
    assert spoken.ended == "interrupted"
    assert 3 <= spoken.num_tokens < 16
    assert len(speaker.cached) == len(prompt) + spoken.num_tokens - 1

    def press(text: str) -> None:
        pieces.append(text)
        os.kill(os.getpid(), signal.SIGINT)

    pieces.clear()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background inherits none
    with pytest.raises(KeyboardInterrupt):  # nobody has asked for the answer's end
        speaker.answer(prompt, GREEDY, False, press, lambda: False)
    pieces.clear()
    spoken = speaker.answer(prompt, GREEDY, False, press, lambda: bool(pieces))
    assert spoken.ended == "interrupted"
    assert spoken.text == "".join(pieces).strip() != ""
    assert speaker.cache is None
    assert said_by(speaker, prompt).text


def test_memory_that_ends_is_raised_and_forgotten(tuned: Tuned, monkeypatch: pytest.MonkeyPatch) -> None:
    """An OutOfMemoryError reaches the caller, and the next answer starts anew."""
    speaker, prompt = Speaker(tuned.model, tuned.tokenizer, tuned.end_token_ids), ids_of(tuned, "What?")
    wanted = said_by(speaker, prompt).text

    def fail(text: str) -> None:
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        speaker.answer([*speaker.cached, 5], GREEDY, True, fail, lambda: False)
    assert speaker.cache is None
    assert said_by(speaker, prompt).text == wanted


def test_characters_of_several_tokens_are_whole() -> None:
    """Emoji, umlauts and joined signs, fed token by token, are written whole and in order; end tokens are not."""
    tokenizer = tokenizer_at()
    text = "Größe: 日本語 🛩️ 👩‍🔧 ende\n  x"
    pieces: list[str] = []
    stream = TextStream(tokenizer, [1], pieces.append)
    stream.put(torch.tensor([[7, 7]]))
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) > len(text)  # this tokenizer has bytes for most of them
    for number in [*ids, 1]:
        stream.put(torch.tensor([number]))
    stream.end()
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)
    assert len(pieces) > 10

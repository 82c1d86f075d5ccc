"""Answers in batches that fit, where a GPU has little memory left."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator

from tests.conftest import asked_in, training_of
from train.config import Config
from train.deliver.compare import compare
from train.deliver.generation import Generator
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

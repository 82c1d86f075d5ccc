"""What a run is validated on."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from data_tools.report import DataError
from tests.conftest import TODAY, splits_of
from train.config import CompareConfig, Config, ValidateConfig
from train.models.tokenizer import load_tokenizer
from train.validation.material import Material, material_of, subset


def made(config: Config) -> Material:
    return material_of(config, load_tokenizer(config).backend, splits_of(config), TODAY)


@pytest.fixture
def two_paths(config: Config, pairs: Path, tmp_path: Path) -> Config:
    """A configuration with two validation files, of 5 and 19 rows, and all that can be measured."""
    few = tmp_path / "few.jsonl"
    rows = [{"prompt": f"Which screw is {i}?", "response": f"the screw {i * 7}"} for i in range(5)]
    few.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = replace(config.data, validation_path=(str(few), str(pairs)), gate="warn")
    return replace(config, data=data, validate=ValidateConfig())


def test_a_subset_holds_its_tokens_and_every_path() -> None:
    """Drawn by the seed, the same each time, within the budget, at least one of each path; 0 takes all."""
    lengths, paths = [10 + i % 7 for i in range(100)], [i // 98 for i in range(100)]
    chosen = subset(lengths, paths, 200, seed=1)
    assert chosen == subset(lengths, paths, 200, seed=1) != subset(lengths, paths, 200, seed=2)
    assert 180 < sum(lengths[i] for i in chosen) <= 200
    assert all(len(Counter(paths[i] for i in subset(lengths, paths, 200, seed))) == 2 for seed in range(20))
    assert subset(lengths, paths, 0, seed=1) == subset(lengths, paths, 10**9, seed=1) == list(range(100))
    assert len(subset(lengths, paths, 1, seed=1)) == 2  # too few tokens for one of each: still one of each


def test_parts_are_the_paths(two_paths: Config) -> None:
    """By their numbers from 1; the general text lies beside them, in samples no longer than data.max_length."""
    material = made(two_paths)
    assert {number: len(part) for number, part in material.parts.items()} == {1: 5, 2: 19}
    assert material.general is not None
    assert len(material.general) > 2
    assert max(material.general["num_tokens"]) <= two_paths.data.max_length
    assert material.longest == max(max(text["num_tokens"]) for text in material.texts)
    assert [question.text for question in material.questions] == [f"Which screw is {i}?" for i in range(4)]


def test_what_is_off_is_not_there(two_paths: Config, config: Config) -> None:
    """No questions, no general text; and nothing at all without held-out data."""
    off = made(replace(two_paths, validate=ValidateConfig(general_text="off", num_questions=0)))
    assert (off.general, off.questions, len(off.texts)) == (None, (), 2)
    assert made(replace(config, validate=ValidateConfig())).texts == []


def test_general_questions_are_the_bundled_ones_or_the_user_s(config: Config, tmp_path: Path) -> None:
    """Off by default, as many as are asked of the data; a file that cannot be used is refused by its option."""
    asking = replace(config, compare=CompareConfig(num_questions=3, general_questions="bundled"))
    assert made(config).general_questions == ()
    bundled = made(asking).general_questions
    assert [question.reference for question in bundled] == ["Paris", "Seven", "Mercury"]
    own = tmp_path / "own.txt"
    own.write_text("Who are you?\n\nWhere?\n")
    found = made(replace(asking, compare=replace(asking.compare, general_questions=str(own)))).general_questions
    assert [(question.text, question.reference) for question in found] == [("Who are you?", None), ("Where?", None)]
    missing = replace(asking, compare=replace(asking.compare, general_questions=str(tmp_path / "no.txt")))
    with pytest.raises(DataError, match=r"--compare\.general_questions .*no\.txt"):
        made(missing)


def test_the_user_s_general_text(config: Config, tmp_path: Path) -> None:
    """It is measured without held-out data too; one that is missing is refused by the option's name."""
    text = tmp_path / "poem.txt"
    text.write_text("The rain in Spain stays mainly in the plain. " * 40)
    own = made(replace(config, validate=ValidateConfig(general_text=str(text))))
    assert own.general is not None
    assert (own.parts, len(own.texts)) == ({}, 1)
    with pytest.raises(DataError, match=r"--validate.general_text .*nowhere.txt"):
        made(replace(config, validate=ValidateConfig(general_text=str(tmp_path / "nowhere.txt"))))


def test_losses_are_compared_on_the_same_samples_alone(two_paths: Config) -> None:
    """The fingerprint differs with the budget and the files, and not with what else is measured."""
    whole = made(two_paths).fingerprint
    assert whole == made(replace(two_paths, validate=ValidateConfig(num_questions=0, every=3))).fingerprint
    assert whole != made(replace(two_paths, validate=ValidateConfig(tokens=100))).fingerprint
    one = replace(two_paths, data=replace(two_paths.data, validation_path=two_paths.data.validation_path[:1]))
    assert whole != made(one).fingerprint

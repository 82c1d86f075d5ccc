"""The validation data is audited as the training data is, and against it."""

import io
from pathlib import Path

from rich.console import Console

from data_tools.abilities import abilities_of
from data_tools.audit import failures, warnings
from data_tools.audit_report import show_audit
from data_tools.chat_template import NO_TEMPLATE, PLAIN_TEMPLATE
from data_tools.render import RenderSettings
from tests.conftest import tokenizer_at
from tests.unit.data_tools.rows import numbered, write
from tests.unit.data_tools.test_audit import audit_of, found


def test_near_duplicates_across_the_sides(tmp_path: Path) -> None:
    """A validation row that differs from a training row in a word of a hundred warns, with both places."""
    words = " ".join(f"word{i}" for i in range(120))
    training = write(tmp_path / "train.jsonl", [*numbered(20), {"prompt": "Say all", "response": words}])
    odd = {"prompt": "Say it all", "response": words.replace("word60 ", "other ")}
    validation = write(tmp_path / "validation.jsonl", [*numbered(5, start=100), odd])
    result = audit_of(training, validation)
    assert found(result) == {"near_leaked_rows": 1}
    assert result.findings["near_leaked_rows"].places == [f"{validation}:6 (like {training}:21)"]
    assert failures(result) == []


def test_a_question_in_other_words_is_no_near_duplicate(tmp_path: Path) -> None:
    """Up to twelve wordings with one long answer are not warned about; near ones, and stock phrases, are.

    Among the validation rows it is said for what it is.
    """
    words = " ".join(f"word{i}" for i in range(120))
    asked = [{"prompt": prompt, "response": words} for prompt in ("Define AOG.", "Explain AOG.", "What is AOG?")]
    training = write(tmp_path / "train.jsonl", [*numbered(20), *asked])
    assert found(audit_of(training)) == {}
    long = " ".join(f"asked{i}" for i in range(80))
    near = [{"prompt": prompt, "response": words} for prompt in (long, long.replace("asked40", "other"))]
    assert found(audit_of(write(tmp_path / "near.jsonl", near))) == {"near_duplicates": 1}
    changed = {"prompt": "Explain AOG.", "response": words.replace("word60 ", "other ")}
    assert found(audit_of(write(tmp_path / "changed.jsonl", [asked[0], changed]))) == {"near_duplicates": 1}
    stock = [{"prompt": f"{word} it?", "response": words} for word in "ABCDEFGHIJKLMN"]
    assert found(audit_of(write(tmp_path / "stock.jsonl", stock))) == {"near_duplicates": 13}
    assert found(audit_of(write(tmp_path / "twelve.jsonl", stock[:12]))) == {}
    held_out = write(tmp_path / "validation.jsonl", [*numbered(3, start=100), {"prompt": "AOG?", "response": words}])
    result = audit_of(training, held_out)
    assert found(result) == {"leaked_wordings": 1}
    assert "1 validation rows ask for a training row's answer in other words (25.0%)" in warnings(result)[0]


def test_the_validation_data_has_a_report_of_its_own(tmp_path: Path) -> None:
    """Nine of ten validation rows are too long: that is said, with their places, and does not refuse training."""
    training = write(tmp_path / "train.jsonl", numbered(20))
    rows = [{"prompt": f"Why {i}?", "response": f"because {i} " * 90} for i in range(9)]
    validation = write(tmp_path / "validation.jsonl", [*rows, *numbered(1, start=50)])
    result = audit_of(training, validation, max_length=64)
    assert result.validation is not None
    assert (result.validation.rows, result.validation.samples) == (10, 1)
    assert result.validation.findings["dropped_rows"].count == 9
    (sentence,) = [line for line in warnings(result) if line.startswith("validation: 9 rows are longer")]
    assert f"{validation}:1" in sentence
    assert failures(result) == []
    console = Console(file=io.StringIO(), width=200)
    tokenizer = tokenizer_at()
    show_audit(result, console, abilities_of(tokenizer, RenderSettings()))
    assert "of which 9 of 10 are left out" in console.file.getvalue()  # pyrefly: ignore[missing-attribute]
    assert NO_TEMPLATE not in console.file.getvalue()  # pyrefly: ignore[missing-attribute]
    tokenizer.chat_template = PLAIN_TEMPLATE
    console = Console(file=io.StringIO(), width=400)
    show_audit(result, console, abilities_of(tokenizer, RenderSettings()))
    assert NO_TEMPLATE in console.file.getvalue()  # pyrefly: ignore[missing-attribute]

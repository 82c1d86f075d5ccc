"""The audit reports every finding in data made to have it, and none in good data."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from data_tools.audit import RULES, Audit, Schedule, audit, failures, warnings
from data_tools.making import FEATURES
from data_tools.prepare import DataSplit, PrepareSettings, prepare
from data_tools.report import DataError
from tests.conftest import tokenizer_at
from tests.unit.data_tools.rows import numbered, write
from train.commands.handloop import main

PLAN = Schedule(2, 4, 1, "samples", 20, 3, epochs=2, total_steps=6, units_per_step=8, batch="2 x 4 = 8")


def audit_of(path: str, validation: str = "", tokenizer: Any = None, **settings: Any) -> Audit:
    """The audit of a file with the bundled tokenizer."""
    tokenizer = tokenizer or tokenizer_at()
    splits = []
    for name in filter(None, (path, validation)):
        prepared = prepare(PrepareSettings((name,), **settings), tokenizer)
        splits.append(DataSplit(prepared, prepared.dataset))
    return audit(splits[0], splits[1] if validation else None, tokenizer, PLAN)


def found(result: Audit) -> dict[str, int]:
    return {name: finding.count for name, finding in result.findings.items() if finding.count}


def by_hand(path: str, samples: Sequence[tuple[int, list[int], list[int]]]) -> Audit:
    """The audit of samples (record, ids, trained) that `prepare` would not make from the records at `path`."""
    rows = [
        {
            "source": f"{path}:{record + 1}",
            "record": record,
            "input_ids": ids,
            "trained": [bool(value) for value in trained],
            "num_tokens": len(ids),
            "num_supervised_tokens": sum(trained[1:]),
            "path_number": 0,
            "question": "",
        }
        for record, ids, trained in samples
    ]
    prepared = prepare(PrepareSettings((path,)), tokenizer_at())
    facts = prepared.facts
    for name in ("num_tokens", "num_supervised_tokens"):  # as if these samples had been made from the records
        sums = [sum(row[name] for row in rows if row["record"] == record) for record in range(len(facts))]
        facts = facts.set_column(facts.schema.get_field_index(name), name, [sums])
    prepared = replace(prepared, facts=facts)
    return audit(DataSplit(prepared, Dataset.from_list(rows, features=FEATURES)), None, tokenizer_at(), PLAN)


def test_good_data_has_no_finding(tmp_path: Path) -> None:
    """Counts are right, every end token is trained, and there is no failure and no warning."""
    path = write(tmp_path / "good.jsonl", numbered(20))
    result = audit_of(path)
    assert (result.rows, result.samples, result.validation_rows) == (20, 20, 0)
    assert found(result) == {}
    assert failures(result) == warnings(result) == []
    assert (result.end_token_trained_fraction, result.end_token_masked_fraction, result.end_token_cut_fraction) == (
        1.0,
        0.0,
        0.0,
    )
    dataset: Any = prepare(PrepareSettings((path,)), tokenizer_at()).dataset
    assert result.tokens == sum(dataset["num_tokens"])
    assert result.supervised_tokens == sum(dataset["num_supervised_tokens"])
    assert sum(count for _, _, count in result.length_histogram) == 20
    assert result.longest[0][1] == max(dataset["num_tokens"])
    assert all(low <= result.longest[0][1] for low, _, _ in result.length_histogram)


def test_duplicates_exact_normalised_and_near(tmp_path: Path) -> None:
    """Each repetition is counted once, as the strictest kind it is, and names the row that it repeats."""
    long = " ".join(f"word{i}" for i in range(120))
    rows = [
        *numbered(30),
        {"prompt": "Say all", "response": long},
        numbered(1)[0],
        {"prompt": "what is PART 1", "response": "Bolt  7919!"},
        {"prompt": "Say all", "response": long.replace("word60 ", "other ")},
    ]
    path = write(tmp_path / "rows.jsonl", rows)
    result = audit_of(path)
    assert found(result) == {
        "duplicates": 1,
        "normalised_duplicates": 1,
        "near_duplicates": 1,
        "conflicting_answers": 1,
    }
    assert result.findings["duplicates"].places == [f"{path}:32 (like line 1)"]
    assert result.findings["normalised_duplicates"].places == [f"{path}:33 (like line 2)"]
    assert result.findings["near_duplicates"].places == [f"{path}:34 (like line 31)"]
    assert failures(result) == []
    assert len(warnings(result)) == 4


def test_duplicates_warn(tmp_path: Path) -> None:
    """Exact and normalised duplicates are counted apart, five are named, and none refuses: they may be a weighting."""
    upper = [{name: text.upper() for name, text in row.items()} for row in numbered(5)]
    mixed = audit_of(write(tmp_path / "a.jsonl", [*numbered(40), *numbered(5), *upper]))
    assert found(mixed) == {"duplicates": 5, "normalised_duplicates": 5}
    alone = audit_of(write(tmp_path / "c.jsonl", [*numbered(20), *numbered(6)]))
    assert failures(mixed) == failures(alone) == []
    assert len(alone.findings["duplicates"].places) == 5
    assert re.match(r"6 rows repeat an earlier row exactly \(23\.1%\): .*, \.\.\.; ", warnings(alone)[0])


def test_leaks_between_files(tmp_path: Path) -> None:
    """A training row in the validation data refuses, also in another spelling; a shared prompt alone warns."""
    training = write(tmp_path / "train.jsonl", numbered(20))
    rows = [
        *numbered(5, start=100),
        numbered(1, start=3)[0],
        {"prompt": "WHAT IS PART 4", "response": "bolt 31676."},
        {"prompt": "What is part 5?", "response": "a nut"},
    ]
    validation = write(tmp_path / "validation.jsonl", rows)
    result = audit_of(training, validation)
    assert (result.rows, result.validation_rows) == (20, 8)
    assert found(result) == {"leaked_rows": 2, "leaked_prompts": 1}
    assert result.findings["leaked_rows"].places == [
        f"{validation}:6 (like {training}:4)",
        f"{validation}:7 (like {training}:5)",
    ]
    assert [sentence.split(":")[0] for sentence in failures(result)] == [
        "2 validation rows are also training rows (25.0%; the limit is 0%)"
    ]
    assert found(audit_of(training, write(tmp_path / "other.jsonl", numbered(5, start=100)))) == {}


def test_the_same_file_as_training_and_validation_data_leaks(tmp_path: Path) -> None:
    """Splits with equal settings count as held out of one data set only if they share no record."""
    path = write(tmp_path / "rows.jsonl", numbered(6))
    assert found(audit_of(path, path)) == {"leaked_rows": 6}


def test_a_fraction_held_out_keeps_equal_rows_together(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """With validation_fraction all copies of a row, in any spelling, are on one side: nothing leaks."""
    pairs = [row for number, row in enumerate(numbered(40)) for row in (row, shouted(row) if number % 2 else row)]
    path = write(tmp_path / "rows.jsonl", pairs)
    words = ["audit", "--profile", "demo", "--data.path", path, "--data.validation_fraction", "0.25", "--json"]
    assert main(words) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["rows"], result["validation_rows"], result["samples"]) == (60, 20, 60)
    assert result["leaked_rows"] == result["leaked_prompts"] == 0
    assert result["dropped_rows"] == 0  # a row that is held out is not dropped
    assert result["duplicates"] + result["normalised_duplicates"] == 30
    assert result["validation"]["duplicates"] + result["validation"]["normalised_duplicates"] == 10


def shouted(row: dict[str, str]) -> dict[str, str]:
    return {name: text.upper() for name, text in row.items()}


def test_a_template_that_renders_two_bos_tokens_is_refused(tmp_path: Path) -> None:
    """Any row with two BOS tokens in a row refuses; the bundled template renders one."""
    doubled = tokenizer_at()
    doubled.chat_template = "{{ bos_token }}" + doubled.chat_template
    path = write(tmp_path / "rows.jsonl", numbered(3))
    result = audit_of(path, tokenizer=doubled)
    assert found(result) == {"double_bos_rows": 3}
    assert result.findings["double_bos_rows"].places == [f"{path}:{line}" for line in (1, 2, 3)]
    assert len(failures(result)) == 1


def test_bos_tokens_of_neighbouring_samples_are_no_pair(tmp_path: Path) -> None:
    """Two BOS tokens in a row count only within one sample."""
    path = write(tmp_path / "rows.jsonl", numbered(2))
    begin, end = tokenizer_at().bos_token_id, tokenizer_at().eos_token_id
    result = by_hand(path, [(0, [begin, 9, end, begin], [0, 1, 1, 0]), (1, [begin, 8, end], [0, 1, 1])])
    assert found(result) == {}


def test_a_template_without_end_token_is_refused_earlier(tmp_path: Path) -> None:
    """A chat template that never ends an answer fails in rendering, before the audit."""
    endless = tokenizer_at()
    endless.chat_template = "{% for m in messages %}{{ m['role'] + ':\n' + m['content'] + '\n' }}{% endfor %}" + (
        "{% if add_generation_prompt %}assistant:\n{% endif %}"
    )
    with pytest.raises(DataError, match="special token"):
        audit_of(write(tmp_path / "rows.jsonl", numbered(2)), tokenizer=endless)


def test_end_tokens_masked_and_cut(tmp_path: Path) -> None:
    """End tokens are trained, masked or cut at the sample's end; one that follows in the next sample is not cut."""
    path = write(tmp_path / "rows.jsonl", numbered(4))
    begin, end = tokenizer_at().bos_token_id, tokenizer_at().eos_token_id
    result = by_hand(
        path,
        [
            (0, [begin, 9, 9, end], [0, 0, 1, 1]),
            (1, [begin, 9, 9, end], [0, 0, 1, 0]),
            (2, [begin, 9, 9, 9], [0, 0, 1, 1]),
            (3, [begin, 9, 9, 9], [0, 0, 1, 1]),
            (3, [begin, 9, 9, end], [0, 1, 1, 1]),
        ],
    )
    assert (result.end_token_trained_fraction, result.end_token_masked_fraction, result.end_token_cut_fraction) == (
        0.5,
        0.25,
        0.25,
    )
    assert result.findings["end_token_untrained_rows"].places == [f"{path}:2 (masked)", f"{path}:3 (cut)"]
    assert [sentence for sentence in failures(result) if "50.0%; the limit is 1%" in sentence]


def test_rows_without_supervision(tmp_path: Path) -> None:
    """A sample in which no token, or only the first, is trained refuses."""
    path = write(tmp_path / "rows.jsonl", numbered(3))
    begin, end = tokenizer_at().bos_token_id, tokenizer_at().eos_token_id
    result = by_hand(path, [(0, [begin, 9, end], [0, 1, 1]), (1, [begin, 9, end], [0, 0, 0]), (2, [9, end], [0, 1])])
    assert result.findings["rows_without_supervision"].places == [f"{path}:2"]
    assert len(failures(result)) == 1


def test_truncated_and_dropped_rows(tmp_path: Path) -> None:
    """`drop` drops long rows, `left` and `right` truncate them, `split` loses nothing; each row has its length."""
    long = {"prompt": "Tell me.", "response": " ".join(f"word{i}" for i in range(60))}
    long_prompt = {"prompt": " ".join(f"thing{i}" for i in range(60)), "response": "Yes."}
    path = write(tmp_path / "rows.jsonl", [*numbered(20), long, long_prompt])
    dropped = audit_of(path, max_length=64)
    assert found(dropped) == {"dropped_rows": 2}
    assert re.fullmatch(re.escape(path) + r":21 \(\d+ tokens\)", dropped.findings["dropped_rows"].places[0])
    assert (dropped.rows, dropped.samples) == (22, 20)
    left = audit_of(path, max_length=64, truncation="left")
    assert found(left) == {"truncated_rows": 2}
    assert "64 of " in left.findings["truncated_rows"].places[0]
    assert found(audit_of(path, max_length=1024, truncation="left")) == {}
    assert "truncated_rows" not in found(
        audit_of(write(tmp_path / "s.jsonl", [long]), max_length=64, truncation="split")
    )
    too_many = audit_of(write(tmp_path / "many.jsonl", [*numbered(2), long]), max_length=64)
    assert "(33.3%; the limit is 20%)" in failures(too_many)[0]


def test_skipped_rows(tmp_path: Path) -> None:
    """With on_error skip, rows that could not be read are counted with their reasons."""
    path = tmp_path / "rows.jsonl"
    write(path, numbered(10))
    path.write_text(path.read_text() + '{"prompt": 3\n')
    result = audit_of(str(path), on_error="skip")
    assert found(result) == {"skipped_rows": 1}
    assert result.findings["skipped_rows"].places[0].startswith(f"{path}:11: not JSON")


def test_garbage_with_its_line(tmp_path: Path) -> None:
    """Control characters and wrongly decoded text, in rows and in text files, up to one row in twenty."""
    odd = [
        {"prompt": "What?", "response": "one\nbell \x07"},
        {"prompt": "Who is JosÃ©?", "response": "him"},
        {"prompt": "bad", "response": "bytes \ufffd"},
    ]
    path = write(tmp_path / "rows.jsonl", [*numbered(10), *odd])
    result = audit_of(path)
    assert found(result) == {"control_character_rows": 1, "mojibake_rows": 2}
    assert result.findings["control_character_rows"].places == [f"{path}:11 (U+0007 in line 2)"]
    assert result.findings["mojibake_rows"].places[0] == f"{path}:12 (U+00C3 U+00A9 in line 1)"
    assert len(failures(result)) == 2
    assert len(warnings(audit_of(write(tmp_path / "few.jsonl", [*numbered(60), *odd])))) == 2
    text = tmp_path / "report.txt"
    text.write_text("A good line.\n\nA page\x0cbreak.\n")
    assert audit_of(str(text)).findings["control_character_rows"].places == [f"{text} (U+000C in line 3)"]


def test_order_of_roles_in_data(tmp_path: Path) -> None:
    """A conversation in an unusual order is named, with what is unusual about it."""
    turns = [("user", "Hi."), ("user", "Hello?"), ("assistant", "Yes.")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    path = write(tmp_path / "rows.jsonl", [row])
    result = audit_of(path)
    assert found(result) == {"role_order_rows": 1}
    assert result.findings["role_order_rows"].places == [f"{path}:1 (user after user)"]


def test_text_files(tmp_path: Path) -> None:
    """A document is one row, however many samples it becomes; only the last has an end token to train."""
    (tmp_path / "a.txt").write_text(" ".join(f"word{i}" for i in range(300)))
    (tmp_path / "b.txt").write_text("Short.")
    result = audit_of(str(tmp_path), max_length=64, text_overlap=8)
    assert result.rows == 2
    assert result.samples > 10
    assert result.end_token_trained_fraction == 1.0
    assert found(result) == {}


def test_every_rule_has_a_test_here() -> None:
    """Every rule is named in this file or the one beside it."""
    source = "".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_audit*.py"))
    assert len(RULES) > 10
    assert all(f'"{name}"' in source for name in RULES)

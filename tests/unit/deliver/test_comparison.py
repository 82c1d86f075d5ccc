"""`handloop compare`: what it finds is what the run itself found, and what can be had without its data."""

import json
import shutil
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, GenerationConfig

from tests.finished_runs import finish
from tests.parity.bases import Shape, on, write
from tests.unit.conftest import MAX_NEW_TOKENS, NUM_ASKED
from train.commands.handloop import main
from train.config import Config
from train.data import prepare_settings
from train.deliver.compare import Answer, compare
from train.deliver.comparison import Comparison, Wanted, first_samples, material_of
from train.deliver.comparison_table import show_comparison
from train.deliver.finished import data_of, finished_run, load_tuned, today_of
from train.deliver.generation import Completion, Generator
from train.deliver.losses import TokenLoss, losses_of
from train.deliver.questions import Question, questions_in
from train.profiles import DEMO

WORDS = ["--num", str(NUM_ASKED), "--max-new-tokens", str(MAX_NEW_TOKENS)]
BRIEF = ["--num", "1", "--loss-tokens", "300"]
WANTED = Wanted(50, 1, 10, DEMO / "general_questions.jsonl", DEMO / "general.txt")


def compared(path: Path, *words: str) -> dict[str, Any]:
    assert main(["compare", str(path), *WORDS, *words]) == 0
    return json.loads((path / "compare.json").read_text())


@pytest.fixture
def copied(finished_path: Path, tmp_path: Path) -> Path:
    """A copy of the run folder, to change it."""
    return Path(shutil.copytree(finished_path, tmp_path / "run", ignore=shutil.ignore_patterns("compare.json")))


def test_answers_and_loss_are_those_of_the_run(finished_path: Path) -> None:
    """Both models' answers are those in answers.json, and the held-out loss after is the eval/loss that was logged."""
    found = compared(finished_path)
    for group, file in (("trained", "answers.json"), ("held_out", "answers_held_out.json")):
        of_run = json.loads((finished_path / file).read_text())
        assert len(of_run) == NUM_ASKED
        for one, wanted in zip(found["groups"][group]["answers"], of_run, strict=True):
            assert (one["question"], one["reference"]) == (wanted["question"], wanted["reference"])
            assert one["before"]["text"] == wanted["before"] != wanted["after"]
            assert one["after"]["text"] == wanted["after"]
            assert (one["after"]["exact"], one["after"]["stopped"]) == (wanted["exact"], wanted["stopped"])
            assert one["before"]["num_tokens"] == MAX_NEW_TOKENS  # the bundled base never stops
    logged = [json.loads(line) for line in (finished_path / "metrics.jsonl").read_text().splitlines()][-1]
    held_out = found["losses"]["held_out"]
    assert held_out["after"] == pytest.approx(logged["eval/loss"], rel=1e-6)
    assert held_out["before"] > held_out["after"] + 0.5
    assert held_out["difference"] == held_out["after"] - held_out["before"]
    general = found["losses"]["general"]
    assert general["num_tokens"] > 1500
    assert general["before"] != general["after"]
    assert found["groups"]["general"]["unchanged"]["total"] == NUM_ASKED
    assert found["notes"] == []


def test_the_base_s_loss_is_that_without_adapters(finished_path: Path) -> None:
    """`before` equals `after` once the adapters are zero, does not depend on them, and OOM changes neither sum."""
    run = finished_run(finished_path)
    model = load_tuned(run).model
    validation = data_of(run)[0].validation
    assert validation is not None
    rows = first_samples(validation.samples, 10**6)
    tuned = losses_of(model, rows, 0)
    forward, sizes = type(model).forward, []

    def small(self: Any, batch: Any) -> torch.Tensor:
        sizes.append(len(batch.input_ids))
        if len(batch.input_ids) > 2:
            raise torch.OutOfMemoryError("no more")
        return forward(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "forward", small)
        halved = losses_of(model, rows, 0)
    assert max(sizes) > 2
    assert (halved.before, halved.after) == pytest.approx((tuned.before, tuned.after), rel=1e-6)
    for parameter in model.trainable().values():
        parameter.data.zero_()
    zero = losses_of(model, rows, 0)
    assert zero.after == zero.before == tuned.before != tuned.after
    assert zero.num_tokens == tuned.num_tokens == sum(sum(row["trained"][1:]) for row in rows)


KINDS: dict[str, tuple[bool, dict[str, Any]]] = {  # whether the head is the embedding, and what is trained
    "plain": (False, {}),
    "rows": (False, {"trainable_tokens": ("a", "e")}),
    "rows of one matrix": (True, {"trainable_tokens": ("a", "e")}),
    "head": (False, {"modules_to_save": ("lm_head",)}),
    "embedding": (False, {"modules_to_save": ("embed_tokens",)}),
    "rows beside a whole head": (False, {"modules_to_save": ("lm_head",), "trainable_tokens": ("a", "e")}),
}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_base_is_the_one_of_transformers(kind: str, config: Config, tmp_path: Path) -> None:
    """Whatever is trained, loss and answers before are those of transformers alone, and those after are not."""
    is_tied, trained = KINDS[kind]
    base = write(tmp_path / "base", Shape(is_tied=is_tied))
    config = on(config, base, "none")
    run = finished_run(finish(replace(config, lora=replace(config.lora, **trained)), tmp_path / "run", size=0.3))
    tuned, rows = load_tuned(run), first_samples(data_of(run)[0].training.samples, 300)
    plain: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    settings = GenerationConfig(max_new_tokens=9, eos_token_id=list(tuned.end_token_ids), pad_token_id=0)
    wanted, answers = 0.0, []
    for row in rows:
        ids, is_target = torch.tensor(row["input_ids"]), torch.tensor(row["trained"][1:], dtype=torch.bool)
        logits = plain(input_ids=ids[None]).logits[0, :-1]
        wanted += float(cross_entropy(logits[is_target], ids[1:][is_target], reduction="sum"))
        found = plain.generate(ids[None, :9], attention_mask=torch.ones(1, 9), generation_config=settings)
        answers.append(str(tuned.tokenizer.decode(found[0, 9:])).strip())
    loss = losses_of(tuned.model, rows, 0)
    assert loss.before == pytest.approx(wanted, rel=1e-5)
    assert abs(loss.after - wanted) > 1e-4 * wanted
    questions = [Question(row["input_ids"][:9], "", None) for row in rows]
    both = compare(Generator(tuned.model, tuned.tokenizer, tuned.end_token_ids, 9), questions, lambda: False)
    assert [answer.before.text for answer in both] == answers != [answer.after.text for answer in both]


def test_without_its_data_the_other_groups_stand(copied: Path, tmp_path: Path) -> None:
    """Where training rows are gone that is noted, and held-out rows and general questions are compared; 0."""
    gone = tmp_path / "gone.jsonl"
    found = compared(copied, "--data.path", str(gone), *BRIEF)
    assert list(found["groups"]) == ["held_out", "general"]
    assert "gone.jsonl: no such file" in found["notes"][0]
    assert found["notes"][0].endswith("; if it has moved, write --data.path NEWPLACE")
    found = compared(copied, "--data.path", str(gone), "--data.validation_path", str(gone), *BRIEF)
    assert (list(found["groups"]), list(found["losses"])) == (["general"], ["general"])


def test_changed_data_is_said(copied: Path, tmp_path: Path) -> None:
    """Where the rows are not those that were trained on, the comparison goes on and says so."""
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "What is part 0?", "response": "A bolt."}\n')
    found = compared(copied, "--data.path", str(other), *BRIEF)
    assert found["notes"] == ["the data or its settings are not those that were trained on"]
    assert [one["reference"] for one in found["groups"]["trained"]["answers"]] == ["A bolt."]


def test_questions_of_a_file(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Lines of a .txt are asked as the same rows would be, without a reference; --json prints what is written."""
    rows, lines, output = tmp_path / "rows.jsonl", tmp_path / "lines.txt", tmp_path / "found.json"
    asked = ["What is part 3?", "Why <|assistant|> not?"]
    rows.write_text("".join(json.dumps({"question": text, "answer": "none"}) + "\n" for text in asked))
    lines.write_text(f"{asked[0]}\n\n  {asked[1]}\n")
    run = finished_run(copied)
    tokenizer = load_tuned(run).tokenizer
    settings = prepare_settings(run.config, (), today_of(run))
    of_rows, of_lines = (questions_in(path, settings, tokenizer, 9)[0] for path in (rows, lines))
    assert [(q.prompt, q.text) for q in of_rows] == [(q.prompt, q.text) for q in of_lines]
    assert [q.reference for q in of_rows] == ["none"] * 2
    assert [q.reference for q in of_lines] == [None] * 2
    capsys.readouterr()
    words = [*BRIEF, "--max-new-tokens", "2", "--questions", str(lines), "--output", str(output), "--json"]
    assert main(["compare", str(copied), *words]) == 0
    assert not (copied / "compare.json").exists()
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(output.read_text())
    group = printed["groups"]["questions"]
    assert group["num_questions"] == 1
    assert group["answers"][0]["reference"] is None
    assert group["after"]["f1"] is None
    assert group["after"]["exact"]["total"] == 0
    assert group["after"]["stopped"]["total"] == 1


@pytest.mark.parametrize("content", [None, "", "\n \n", '{"text": "no question"}'])
def test_a_file_without_questions_is_refused(
    content: str | None, finished_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file of questions that is missing, empty, or has none ends the command with 78 before the weights are read."""
    path = tmp_path / ("rows.jsonl" if content and "text" in content else "lines.txt")
    if content is not None:
        path.write_text(content)
    assert main(["compare", str(finished_path), "--questions", str(path)]) == 78
    said = capsys.readouterr().err
    assert str(path) in said
    assert "asking" not in said


REFUSED = {
    "missing": (["--output", "missing/x.json"], "--output missing/x.json: there is no folder missing; make it"),
    "folder": (["--output", "."], "--output .: it is a folder; name a file in it"),
    "unread": (["--compare.num_questions", "1"], "here --num says how many are asked"),
    "unread, spelled otherwise": (["--compare.num-questions=1"], "here --num says how many are asked"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_at_once(
    name: str, finished_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A result that could not be written, and an option that would not be read, end it with 78 before any work."""
    words, reason = REFUSED[name]
    monkeypatch.chdir(tmp_path)
    assert main(["compare", str(finished_path), *words]) == 78
    said = capsys.readouterr().err
    assert reason in said
    assert "asking" not in said


def test_the_tables_fit_a_terminal(finished_path: Path) -> None:
    """With the longest shares and counts no line is wider than 80 columns, and none is cut."""
    written = Completion("yes", True, 4096)
    answers = [Answer("question", "yes", written, written)] * 2000
    groups = {name: answers for name in ("trained", "held out", "general", "questions")}
    losses = {name: TokenLoss(123456.7, 223456.7, 98765, 9) for name in ("held out", "general")}
    target = StringIO()
    found = Comparison(finished_run(finished_path), WANTED, groups, losses, [])
    show_comparison(Console(file=target, width=80), found, 1)
    lines = target.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in target.getvalue()
    assert sum("100 % (100-100)" in line for line in lines) == 8
    assert "general questions: 2000 of 2000 answers unchanged" in lines


def test_trained_questions_were_trained(finished_path: Path) -> None:
    """The trained group holds rows of the steps that were made, in the data's order, also of a part of an epoch."""
    run = finished_run(finished_path)
    run = replace(run, base={**run.base, "step": 1})

    wanted = Wanted(
        50, 1, 10, *[Path(__file__).parents[3] / "demo" / name for name in ("general_questions.jsonl", "general.txt")]
    )
    part = [question.text for question in material_of(run, wanted).questions["trained"]]
    whole = [question.text for question in material_of(finished_run(finished_path), wanted).questions["trained"]]
    assert (len(part), len(whole)) == (8, 19)
    rows = [json.loads(line) for line in (finished_path / "metrics.jsonl").read_text().splitlines()]
    assert part == [
        whole[number] for number in sorted(next(row for row in rows if row["step"] == 1)["data/sample_ids"])
    ]

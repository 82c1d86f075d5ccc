"""Questions made from a glossary are unique, and no held-out question is a training question."""

from pathlib import Path
from typing import Any

import pytest

from data_tools import glossary as module
from data_tools.glossary import WORDINGS, Pairs, PairSettings, make_pairs, similar_pairs
from data_tools.glossary_files import Term, read_terms
from data_tools.report import DataError
from tests.unit.data_tools.glossaries import BUNDLED


def bundled(**settings: Any) -> Pairs:
    return make_pairs(read_terms(BUNDLED).terms, PairSettings(**settings))


@pytest.mark.parametrize("seed", range(3))
def test_no_prompt_twice_and_none_held_out_is_trained(seed: int) -> None:
    """No prompt occurs twice in the two bundled files, and no held-out wording is a training wording."""
    pairs = bundled(seed=seed, forms=12, held_out_forms=6)
    training, held_out = ([row["prompt"] for row in pairs.rows(part)] for part in (False, True))
    assert len(training) > 12 * 200
    assert len(held_out) > 6 * 200
    assert len(set(training + held_out)) == len(training) + len(held_out)
    for wordings in WORDINGS.values():
        assert not {w.casefold() for w in wordings.training} & {w.casefold() for w in wordings.held_out}


def test_every_term_is_asked_in_both_files_in_as_many_forms_as_said() -> None:
    """Each definition answers 3 training and 2 held-out questions, which name its term."""
    pairs = bundled(forms=3, held_out_forms=2, comparisons=0)
    terms = read_terms(BUNDLED).terms
    assert len(terms) >= 200
    for held_out, forms in ((False, 3), (True, 2)):
        rows = pairs.rows(held_out)
        for term in terms:
            asked = [row["prompt"] for row in rows if row["response"] == term.definition]
            assert len(asked) == forms, term
            assert all(term.name in prompt for prompt in asked)
        assert pairs.counts(held_out)["definition"] == forms * len(terms)
        assert pairs.counts(held_out)["examples"] == sum(bool(term.examples) for term in terms) > 0


def test_wordings_are_drawn_by_the_seed_and_all_are_used() -> None:
    """The same seed gives the same rows, another seed others; over the glossary every wording occurs."""
    assert bundled(seed=1) == bundled(seed=1)
    one, two = ({question.prompt for question in bundled(seed=seed).questions} for seed in (1, 2))
    assert len(one - two) > len(one) / 2
    prompts = {question.prompt for question in bundled(forms=2, held_out_forms=1).questions}
    names = [term.name for term in read_terms(BUNDLED).terms]
    for wording in WORDINGS["definition"].training + WORDINGS["definition"].held_out:
        assert prompts & {wording.format(term=name, context="") for name in names}, wording


def test_a_new_term_leaves_the_rows_of_the_others() -> None:
    """The order of the glossary does not matter, and another term only adds rows."""
    terms = read_terms(BUNDLED).terms
    settings = PairSettings(comparisons=0)
    rows = make_pairs(terms, settings).rows(False)
    assert make_pairs(terms[::-1], settings).rows(False) == rows
    more = make_pairs((Term("zzz", "Sleep."), *terms), settings).rows(False)
    assert [row for row in more if row["response"] != "Sleep."] == rows
    assert len(more) == len(rows) + settings.forms


def test_comparisons_pair_look_alikes_of_one_domain_and_state_both_definitions() -> None:
    """PO and PR, MIGO and MIRO, dry and wet lease are compared; each answer has both definitions."""
    terms = {term.name: term for term in read_terms(BUNDLED).terms}
    settings = PairSettings(comparisons=1000)
    chosen = similar_pairs(tuple(terms.values()), settings)
    names = {(first.name, second.name) for first, second in chosen}
    assert {("PO", "PR"), ("MTBF", "MTBR"), ("MIGO", "MIRO"), ("dry lease", "wet lease")} <= names
    assert not {("PO", "winglet"), ("winglet", "PO")} & names
    pairs = make_pairs(tuple(terms.values()), settings)
    for held_out in (False, True):
        asked = {q.prompt: q.response for q in pairs.questions if q.kind == "comparison" and q.held_out == held_out}
        assert len(asked) == len(chosen) > 40
        wording = (WORDINGS["comparison"].held_out if held_out else WORDINGS["comparison"].training)[0]
        for first, second in chosen:
            assert first.domain == second.domain
            answer = asked[wording.format(term=first.name, other=second.name, context="")]
            assert first.definition in answer
            assert second.definition in answer
    assert len(similar_pairs(tuple(terms.values()), PairSettings(comparisons=7))) == 7


def test_alike_in_another_domain_is_not_compared() -> None:
    """PO and PR are compared within a domain, not across two; MM01 and VA01 are not similar."""
    assert similar_pairs((Term("MM01", "One."), Term("VA01", "Two.")), PairSettings()) == []
    terms = (Term("PO", "One.", "a"), Term("PR", "Two", "b"))
    assert similar_pairs(terms, PairSettings()) == []
    same = (terms[0], Term("PR", "Two", "a"))
    answers = [q.response for q in make_pairs(same, PairSettings()).questions if q.kind == "comparison"]
    assert answers == ["PO: One. PR: Two."] * 2


def test_the_context_stands_in_every_question() -> None:
    """--context is added to every question."""
    questions = bundled(context=" in the Embraer context").questions
    assert all(question.prompt.count(" in the Embraer context") == 1 for question in questions)


def test_two_terms_that_would_share_a_prompt_are_refused() -> None:
    """For the terms `the term PO` and `PO`, different wordings give the prompt `Explain the term PO.`"""
    terms = (Term("PO", "Order.", where="t.csv:2"), Term("the term PO", "Its name.", where="t.csv:3"))
    with pytest.raises(
        DataError, match=r"t\.csv:3: the question 'Explain the term PO\.' is also asked about t\.csv:2; rename"
    ):
        make_pairs(terms, PairSettings(forms=12))


def test_impossible_numbers_are_named_together() -> None:
    """More forms than wordings, no held-out forms, and a negative number of comparisons are reported together."""
    with pytest.raises(DataError, match=r"--forms 13: .* 1 to 12\n--held-out-forms 0: .* 1 to 6\n--comparisons -1: "):
        make_pairs((Term("PO", "Order."),), PairSettings(forms=13, held_out_forms=0, comparisons=-1))


def test_a_failed_write_leaves_the_old_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the second file cannot be written, the first stays as it was, and no temporary file is left."""
    old, blocked = tmp_path / "t.jsonl", tmp_path / "h.jsonl"
    old.write_text("old")
    original = Path.write_text

    def write_text(path: Path, *arguments: str, **options: str) -> int:
        if "h.jsonl" in path.name:
            raise OSError("disk full")
        return original(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", write_text)
    with pytest.raises(OSError, match="disk full"):
        module.write_both({old: [{"prompt": "a", "response": "b"}], blocked: []})
    assert [path.name for path in tmp_path.iterdir()] == ["t.jsonl"]
    assert old.read_text() == "old"

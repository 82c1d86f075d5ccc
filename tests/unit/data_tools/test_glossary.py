"""Questions made from a glossary are unique, and no held-out question is a training question."""

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_tools import glossary as module
from data_tools.glossary import WORDINGS, Pairs, PairSettings, main, make_pairs, similar_pairs
from data_tools.glossary_files import Term, read_terms
from data_tools.records import DataError
from tests.conftest import ROOT
from train.commands.handloop import main as handloop
from train.run.exits import ExitCode

BUNDLED = ROOT / "demo" / "glossary.csv"
# No comparisons: their answers are two definitions long, and the bundled base learnt none of six.
BUNDLED_WORDS = ("--forms", "3", "--held-out-forms", "1", "--comparisons", "0")
ENTRIES: list[dict[str, Any]] = [
    {"term": "PO", "definition": "Purchase order, sent to a supplier.", "domain": "buying", "examples": ["for bolts"]},
    {"term": "PR", "definition": 'Purchase requisition, "please buy", inside a company', "domain": "buying"},
    {"term": "lead time", "definition": "Days from order to delivery.", "domain": "buying", "examples": ["3", "40"]},
    {"term": "Überholung", "definition": "An overhaul, in German.", "domain": "repair"},
    {"term": "NO", "definition": "Nitric oxide.", "domain": "repair"},
]


def write_as(kind: str, path: Path) -> Path:
    """ENTRIES as a file of this kind."""
    path = path.with_suffix(f".{kind.partition(' ')[0]}")
    mapping = {entry["term"]: {key: entry[key] for key in entry if key != "term"} for entry in ENTRIES}
    if kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["term", "domain", "definition", "examples"])
            writer.writeheader()
            writer.writerows({**entry, "examples": "; ".join(entry.get("examples", []))} for entry in ENTRIES)
        return path
    content = mapping if kind.endswith("mapping") else ENTRIES
    if kind.startswith("json"):
        text = json.dumps(content)
    elif kind.startswith("y"):
        text = yaml.safe_dump(content, allow_unicode=True, sort_keys=False).replace(
            "'NO'", "NO"
        )  # as a person writes it
    else:
        text = f'import os\n\nNAME = "x"\nTERMS = {content!r}\nraise SystemExit("executed")\n'
    path.write_text(text, encoding="utf-8")
    return path


KINDS = ["csv", "json list", "json mapping", "yaml list", "yaml mapping", "yml list", "py list", "py mapping"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_gives_the_same_pairs(kind: str, tmp_path: Path) -> None:
    """CSV, JSON, YAML and Python give the same terms, as a list or a mapping; Python is not executed."""
    glossary = read_terms(write_as(kind, tmp_path / "terms"))
    expected = tuple(Term(e["term"], e["definition"], e["domain"], tuple(e.get("examples", ()))) for e in ENTRIES)
    assert glossary.terms == expected
    pairs, expected_pairs = (make_pairs(terms, PairSettings()) for terms in (glossary.terms, expected))
    for held_out in (False, True):
        assert pairs.rows(held_out) == expected_pairs.rows(held_out) != []


def test_terms_alone_and_lists_of_texts_are_enough(tmp_path: Path) -> None:
    """{term: definition}, [term, definition], definitions over two lines and semicolons between columns are read."""
    for name, text in (
        ("a.json", '{"PO": "Purchase order.", "PR": "Purchase requisition."}'),
        ("b.json", '[["PO", "Purchase order."], ["PR", "Purchase requisition."]]'),
        ("c.yaml", "PO: Purchase\n  order.\nPR: Purchase requisition.\n"),
        ("d.py", "TERMS: list = [('PO', 'Purchase '\n 'order.'), ('PR', 'Purchase requisition.')]\n"),
        ("e.csv", "\ufeffTerm;Definition\r\nPO;Purchase order.\r\n\r\n PR ;Purchase requisition.\r\n"),
    ):
        (tmp_path / name).write_text(text, encoding="utf-8")
        terms = read_terms(tmp_path / name).terms
        assert [(t.name, t.definition) for t in terms] == [("PO", "Purchase order."), ("PR", "Purchase requisition.")]


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
        assert pairs.count(held_out, "definition") == forms * len(terms)
        assert pairs.count(held_out, "examples") == sum(bool(term.examples) for term in terms) > 0


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


def test_repetitions_are_dropped_and_counted(tmp_path: Path) -> None:
    """The same term in other capitals, with its definition spaced differently, is one term with all examples."""
    path = tmp_path / "terms.csv"
    path.write_text(
        "term,definition,examples,note\nlead time,Days  to wait.,3,x\nLead Time,Days to wait.,40,\nPOi,An item.,,\n"
        "POI,A place.,,\nPOi,An item.,,\n"
    )
    glossary = read_terms(path)
    assert [(term.name, term.examples) for term in glossary.terms] == [
        ("lead time", ("3", "40")),
        ("POi", ()),
        ("POI", ()),
    ]
    assert (glossary.num_duplicates, glossary.ignored_fields) == (2, {"note": 5})
    assert make_pairs((Term("PO", "One."),) * 2, PairSettings(forms=3, held_out_forms=2)).num_duplicates == 5


BAD_FILES = [
    ("a.csv", "term,definition\nPO,Order.\n,Empty.\nPR,\n", ["a.csv:3: 'term' is empty", "a.csv:4: 'definition' is"]),
    ("b.csv", "name,meaning\nPO,Order.\n", ["b.csv:1: the first line must name the columns: term,definition"]),
    ("c.csv", 'term,definition\nPO,"Two\nlines"\nPR,one, two\n', ["c.csv:4: more columns than in the first line"]),
    ("d.csv", 'term,definition\nPO,Order.\nPR,"never closed\n', ["d.csv:3: not CSV: unexpected end of data"]),
    ("e.csv", "term,definition,definition\nPO,a,b\n", ["e.csv:2: the field 'definition' appears twice"]),
    ("f.csv", "term,definition\n", ["f.csv: contains no terms"]),
    ("g.csv", "", ["g.csv: contains no terms"]),
    ("h.csv", "term,definition\nPO,Order.\nPO,Office.\n", ["h.csv:3: 'PO' is defined differently at .*h.csv:2; k"]),
    ("a.json", '{"PO": 7, "PR": null, "PX": ["a"]}', ["entry 1: 'definition' must be a str", "entry 2: 'def"]),
    ("b.json", '[{"term": "PO"}, "PR"]',
     ["entry 1: no field 'definition' .fields here: term", "entry 2: expected a term with"]),
    ("c.json", '{"PO": "a",\n"PO": "b"}', ["c.json: entry 2: 'PO' is defined differently at .*c.json: entry 1"]),
    ("d.json", '[{"term": "PO", "definition": "a", "examples": [1]}]', ["entry 1: 'examples' must be a list of str"]),
    ("e.json", '[\n{"term": "PO",}]', ["e.json:2: not JSON"]),
    ("f.json", "7", ["f.json: expected a list of terms, or an"]),
    ("g.json", "[" * 100_000, ["g.json: nested too deeply"]),
    ("a.yaml", "PO: Order.\nPR: null\n", ["a.yaml:2: 'definition' is empty"]),
    ("b.yaml", "PO: Order.\nPR: 'open\n", ["b.yaml:3: not YAML: found unexpected end"]),
    ("c.yaml", "PO: Order.\nPO: Office.\n", ["c.yaml:2: 'PO' is defined differently at .*c.yaml:1"]),
    ("d.yaml", "- &a [*a, *a]\n", ["d.yaml:1: nested too deeply"]),
    ("e.yaml", "text", ["e.yaml: expected a list of terms"]),
    ("a.py", "TERMS = [\n {'term': 'PO', 'definition': open('/x')},\n {}]", ["a.py:2: the file is p", "a.py:3: no fi"]),
    ("b.py", "TERMS = [\n", ["b.py:1: not Python"]),
    ("c.py", "import os\nx = 7\n", ["c.py: no list or dict is assigned"]),
    ("d.py", "OTHER = {}\nTERMS = {'PO': 'a'}\n", ["d.py: contains no terms"]),
    ("e.py", "TERMS = {'PO': 'a',\n **OTHER}\n", ["e.py:2: the file is parsed, not executed"]),
    ("a.txt", "PO", ["a.txt: unknown file extension; a glossary is a .csv, .json"]),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "problems"), BAD_FILES, ids=[name for name, _, _ in BAD_FILES])
def test_bad_input_is_named_with_its_place(name: str, text: str, problems: list[str], tmp_path: Path) -> None:
    """All problems are in one report, each with place and reason."""
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError, match="(.|\n)*".join(problems)):
        read_terms(path)


def test_bytes_that_are_not_utf8_and_a_file_that_is_not_there(tmp_path: Path) -> None:
    """Both errors name the file; the first says what to do."""
    (tmp_path / "a.csv").write_bytes(b"term,definition\nPO,\xff\n")
    with pytest.raises(DataError, match=r"a\.csv: not UTF-8 \(byte 19\); convert it"):
        read_terms(tmp_path / "a.csv")
    with pytest.raises(DataError, match=r"gone\.csv: no such file"):
        read_terms(tmp_path / "gone.csv")


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


def command(source: Path, folder: Path, *words: str) -> int:
    return handloop(
        [
            "glossary",
            str(source),
            "--out",
            str(folder / "t.jsonl"),
            "--held-out",
            str(folder / "new" / "h.jsonl"),
            *words,
        ]
    )


def test_the_command_writes_both_files_and_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The files hold the rows of make_pairs, one JSON object per line, and the printed counts are theirs."""
    path = write_as("csv", tmp_path / "terms")
    path.write_text(path.read_text(encoding="utf-8") + "PR,buying,Purchase requisition,\n", encoding="utf-8")
    assert command(path, tmp_path) == ExitCode.BAD_INPUT
    assert "terms.csv:7: 'PR' is defined differently" in capsys.readouterr().err
    assert not (tmp_path / "t.jsonl").exists()

    write_as("csv", tmp_path / "terms")
    path.write_text(path.read_text(encoding="utf-8") + "NO,repair,Nitric oxide.,\n", encoding="utf-8")
    assert command(path, tmp_path, "--forms", "3", "--held-out-forms", "1", "--comparisons", "5", "--seed", "4") == 0
    pairs = make_pairs(read_terms(path).terms, PairSettings(3, 1, 5, 4))
    for name, held_out in (("t.jsonl", False), ("new/h.jsonl", True)):
        lines = (tmp_path / name).read_text(encoding="utf-8").splitlines()
        assert [json.loads(line) for line in lines] == pairs.rows(held_out)
        assert sum("Überholung" in line for line in lines) == (1 if held_out else 3)
    printed = capsys.readouterr().out
    for part in (
        "5 terms: buying 3, repair 2",
        "18 training rows: 15 on definitions (3 forms per term), 2 on examples, 1 comparisons",
        "8 held-out rows: 5 on definitions (1 forms per term), 2 on examples, 1 comparisons",
        "1 duplicates removed",
    ):
        assert part in printed


@pytest.mark.parametrize("words", [["--form", "3"], ["--forms", "x"], ["--seed"]])
def test_the_command_refuses_what_it_does_not_know(words: list[str], tmp_path: Path, capsys) -> None:
    """Bad options end with exit code 78 and the usage, as in every command."""
    assert command(BUNDLED, tmp_path, *words) == ExitCode.BAD_INPUT
    assert "usage: handloop glossary" in capsys.readouterr().err
    with pytest.raises(DataError, match="must be three different files"):
        main([str(BUNDLED), "--out", str(BUNDLED), "--held-out", str(tmp_path / "h.jsonl")])


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


def test_the_bundled_rows_are_those_of_the_bundled_glossary(tmp_path: Path) -> None:
    """The command in BUNDLED_WORDS writes demo/glossary.jsonl and demo/held_out.jsonl byte for byte."""
    assert command(BUNDLED, tmp_path, *BUNDLED_WORDS) == 0
    for made, bundled_rows in (("t.jsonl", "glossary.jsonl"), ("new/h.jsonl", "held_out.jsonl")):
        assert (tmp_path / made).read_bytes() == (BUNDLED.parent / bundled_rows).read_bytes()

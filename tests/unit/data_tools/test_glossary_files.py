"""Every kind of glossary file gives the same terms, and what is wrong in one is named with its place."""

from pathlib import Path

import pytest

from data_tools.glossary import PairSettings, make_pairs
from data_tools.glossary_files import Term, read_terms
from data_tools.report import DataError
from tests.unit.data_tools.glossaries import ENTRIES, write_as

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
    with pytest.raises(DataError, match=r"a\.csv: not UTF-8 \(byte 4 of line 2\); convert it"):
        read_terms(tmp_path / "a.csv")
    with pytest.raises(DataError, match=r"gone\.csv: no such file"):
        read_terms(tmp_path / "gone.csv")

"""The terms of a glossary, read from CSV, JSON, YAML or a Python literal; every problem in one report."""

import ast
import csv
import io
import itertools
import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from data_tools.report import Report
from data_tools.strict_json import place_of
from data_tools.utf8 import not_utf8

FIELDS = ("term", "definition", "domain", "examples")


@dataclass(frozen=True)
class Term:
    """One entry of a glossary."""

    name: str
    definition: str
    domain: str = ""
    examples: tuple[str, ...] = ()
    where: str = field(default="", compare=False)  # file:line, or file: entry N


@dataclass(frozen=True)
class Glossary:
    """The terms of a file, each once; the number of duplicates that were dropped; the ignored fields."""

    terms: tuple[Term, ...]
    num_duplicates: int
    ignored_fields: Counter[str]


class _Object(list[tuple[Any, Any]]):
    """A mapping as (key, value) pairs, so that a repeated key can be reported."""


Entries = Iterator[tuple[str, Any]]  # (place, one term as the file holds it)


def read_terms(path: Path) -> Glossary:
    """The glossary in a .csv, .json, .yaml or .py file; raises DataError with every problem and its place.

    A Python file is parsed, never executed: the first list or dict that it assigns is the glossary.
    """
    report, ignored_fields = Report(), Counter[str]()
    terms, num_duplicates = _merge(_read(path, report, ignored_fields), report)
    if not terms and not report.total:
        report.add(str(path), "contains no terms")
    report.raise_if_any()
    return Glossary(tuple(terms), num_duplicates, ignored_fields)


def _read(path: Path, report: Report, ignored_fields: Counter[str]) -> Iterator[Term]:
    """The valid terms of a file; problems are added to `report`."""
    reader = READERS.get(path.suffix.lower())
    if not path.is_file():
        report.add(str(path), "no such file; check the spelling")
        return
    if reader is None:
        report.add(str(path), f"unknown file extension; a glossary is a {', '.join(READERS)} file")
        return
    try:
        entries = list(reader(path, path.read_bytes().decode("utf-8-sig"), report))
    except UnicodeDecodeError:
        with path.open("rb") as file:
            line, byte = not_utf8(file)
        report.add(str(path), f"not UTF-8 (byte {byte} of line {line}); convert it, for example with iconv -t utf-8")
        return
    except RecursionError:
        report.add(str(path), "nested too deeply; expected a list of terms")
        return
    for where, content in entries:
        try:
            yield _term(where, content, ignored_fields)
        except ValueError as error:
            report.add(where, str(error))


def _csv_entries(path: Path, text: str, report: Report) -> Entries:
    first_line = text.partition("\n")[0]
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=first_line.count), strict=True)
    header: list[str] = []
    line_number = 1
    try:
        for row in lines:
            where, line_number = f"{path}:{line_number}", lines.line_num + 1
            if not any(cell.strip() for cell in row):
                continue
            if header:
                yield where, _Object(itertools.zip_longest(header, row, fillvalue=""))
                continue
            header = [cell.strip().lower() for cell in row]
            if not {"term", "definition"} <= set(header):
                report.add(
                    where, f"the first line must name the columns: {','.join(FIELDS)} (domain, examples: optional)"
                )
                return
    except csv.Error as error:
        report.add(f"{path}:{line_number}", f"not CSV: {error}; close every quote, and double those inside a text")


def _json_entries(path: Path, text: str, report: Report) -> Entries:
    try:
        content = json.loads(text, object_pairs_hook=_Object)
    except json.JSONDecodeError as error:
        line, column = place_of(error)
        report.add(f"{path}:{line}", f"not JSON: {error.msg.removesuffix(' at')} at column {column}")
        return
    if not isinstance(content, list):
        report.add(str(path), f"expected a list of terms, or an object of term: definition, not {_kind(content)}")
        return
    for number, entry in enumerate(content, start=1):
        yield f"{path}: entry {number}", _keyed(*entry) if isinstance(content, _Object) else entry


def _yaml_entries(path: Path, text: str, report: Report) -> Entries:
    """Reads nodes, because safe_load would turn a term NO into False and 145 into a number."""
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{path}:{mark.line + 1}" if mark else str(path)
        report.add(place, f"not YAML: {getattr(error, 'problem', None) or error}")
        return
    if not isinstance(root, yaml.CollectionNode):
        report.add(str(path), "expected a list of terms, or a mapping of term: definition")
        return
    for entry in root.value:
        key, value = entry if isinstance(root, yaml.MappingNode) else (None, entry)
        where = f"{path}:{(key or value).start_mark.line + 1}"
        try:
            yield where, _yaml_value(value) if key is None else _keyed(_yaml_value(key), _yaml_value(value))
        except ValueError as error:
            report.add(where, str(error))


def _yaml_value(node: yaml.Node, depth: int = 0) -> Any:
    if depth > 3:  # aliases can make a small file endless
        raise ValueError("nested too deeply")
    if isinstance(node, yaml.MappingNode):
        return _Object((_yaml_value(key, depth + 1), _yaml_value(value, depth + 1)) for key, value in node.value)
    if isinstance(node, yaml.SequenceNode):
        return [_yaml_value(item, depth + 1) for item in node.value]
    return "" if node.tag == "tag:yaml.org,2002:null" else node.value


def _python_entries(path: Path, text: str, report: Report) -> Entries:
    try:
        tree = ast.parse(text)
    except (SyntaxError, ValueError) as error:
        place = f"{path}:{error.lineno}" if isinstance(error, SyntaxError) else str(path)
        report.add(place, f"not Python: {error.args[0]}")
        return
    values = (node.value for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign))
    content = next((value for value in values if isinstance(value, ast.List | ast.Tuple | ast.Dict)), None)
    if content is None:
        report.add(str(path), "no list or dict is assigned; write TERMS = [...] with the terms in it")
        return
    keyed = isinstance(content, ast.Dict)
    for key, value in zip(content.keys, content.values, strict=True) if keyed else ((None, e) for e in content.elts):
        where = f"{path}:{(key or value).lineno}"
        try:
            yield where, _keyed(_python_value(key), _python_value(value)) if keyed else _python_value(value)
        except (ValueError, TypeError):
            report.add(where, "the file is parsed, not executed; write literal strings, lists and dicts")


def _python_value(node: ast.expr | None) -> Any:
    if isinstance(node, ast.Dict):
        keys_and_values = zip(node.keys, node.values, strict=True)
        return _Object((_python_value(key), _python_value(value)) for key, value in keys_and_values)
    if isinstance(node, ast.List | ast.Tuple):
        return [_python_value(element) for element in node.elts]
    if node is None:  # the key of **other
        raise ValueError("not a literal")
    return ast.literal_eval(node)


READERS: dict[str, Callable[[Path, str, Report], Entries]] = {
    ".csv": _csv_entries,
    ".json": _json_entries,
    ".yaml": _yaml_entries,
    ".yml": _yaml_entries,
    ".py": _python_entries,
}


def _keyed(key: Any, value: Any) -> _Object:
    """A mapping's entry `term: value`, where the value is the definition or the other fields."""
    return _Object([("term", key), *(value if isinstance(value, _Object) else [("definition", value)])])


def _term(where: str, content: Any, ignored_fields: Counter[str]) -> Term:
    """The term in an entry; raises ValueError with everything that is wrong with it."""
    fields = _fields(content)
    problems = []
    for name in ("term", "definition"):
        if name not in fields:
            problems.append(f"no field {name!r} (fields here: {', '.join(sorted(fields)) or 'none'})")
        elif not fields[name]:
            problems.append(f"{name!r} is empty; fill it in or remove the entry")
    for name in FIELDS[:3]:
        if not isinstance(fields.get(name) or "", str):
            problems.append(f"{name!r} must be a string, not {_kind(fields[name])}; put quotes around it")
    examples = fields.get("examples") or []
    examples = examples.split(";") if isinstance(examples, str) else examples
    if not isinstance(examples, list) or not all(isinstance(example, str) for example in examples):
        problems.append("'examples' must be a list of strings, or one string separated by ;")
    if problems:
        raise ValueError("; ".join(problems))
    ignored_fields.update(fields.keys() - set(FIELDS))
    return Term(
        " ".join(fields["term"].split()),
        fields["definition"],
        fields.get("domain") or "",
        tuple(text for example in examples if (text := example.strip())),
        where,
    )


def _fields(content: Any) -> dict[str, Any]:
    """The fields of an entry, texts stripped; raises ValueError if it is not a mapping or repeats a key."""
    if type(content) is list and 2 <= len(content) <= len(FIELDS):
        content = _Object(zip(FIELDS, content, strict=False))
    if not isinstance(content, _Object):
        raise ValueError(f"expected a term with its definition, not {_kind(content)}")
    fields: dict[str, Any] = {}
    for key, value in content:
        name = str(key).strip().lower()
        # a term with a composed and one with a decomposed accent look the same
        value = unicodedata.normalize("NFC", value).strip() if isinstance(value, str) else value
        if name in fields:
            raise ValueError(f"the field {name!r} appears twice; keep one")
        if name:
            fields[name] = value
        elif value:
            raise ValueError("more columns than in the first line; put quotes around a text with commas")
    return fields


def _merge(terms: Iterable[Term], report: Report) -> tuple[list[Term], int]:
    """(the terms, each once; the number of duplicates); a term with two different definitions is a problem."""
    merged: dict[str, Term] = {}
    num_duplicates = 0
    for term in terms:
        first = merged.setdefault(_key(term.name), term)
        if first is term:
            continue
        if first.definition.split() != term.definition.split():
            report.add(term.where, f"{term.name!r} is defined differently at {first.where}; keep one, or rename one")
            continue
        num_duplicates += 1
        examples = tuple(dict.fromkeys(first.examples + term.examples))
        merged[_key(term.name)] = replace(first, examples=examples)
    return list(merged.values()), num_duplicates


def _key(name: str) -> str:
    """A key that is equal for spellings of the same term: `Lead time` is `lead time`, but `POi` is not `POI`."""
    return " ".join(word.lower() if word[1:] == word[1:].lower() else word for word in name.split())


def _kind(value: Any) -> str:
    return "a mapping" if isinstance(value, _Object) else "a list" if isinstance(value, list) else type(value).__name__

"""The bundled glossary, and a small one in every kind of file."""

import csv
import json
from pathlib import Path
from typing import Any

import yaml

from tests.conftest import ROOT

BUNDLED = ROOT / "demo" / "glossary.csv"
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

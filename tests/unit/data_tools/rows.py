"""Rows for the tests of the audit, and files of them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def numbered(count: int, start: int = 0) -> list[dict[str, str]]:
    """Rows that share nothing but their form."""
    return [{"prompt": f"What is part {i}?", "response": f"bolt {i * 7919}"} for i in range(start, start + count)]


def write(path: Path, rows: Sequence[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)

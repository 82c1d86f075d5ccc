"""Fenced blocks of README, CONTRIBUTING and docs/, for the tests that read, parse and execute them."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SHELL = {"", "bash", "sh", "shell", "console"}  # languages of blocks that are typed
OTHERS = {"text", "python", "yaml", "json", "jsonl", "toml"}
MARKER = re.compile(r"<!-- not run: ?(.*?) ?-->")


@dataclass(frozen=True)
class Block:
    """A fenced block; `reason` is why it is not executed, as the comment before it says."""

    path: Path
    line: int  # of its first fence
    language: str
    text: str
    reason: str | None

    @property
    def where(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"

    @property
    def commands(self) -> list[str]:
        """Its command lines, joined where they go on; of a block with output, those behind `$`."""
        lines = self.text.replace("\\\n", " ").splitlines()
        typed = [line[2:] for line in lines if line.startswith("$ ")] or lines
        return [line for line in typed if line.strip() and not line.lstrip().startswith("#")]


@dataclass(frozen=True)
class Command:
    """A command line of a document."""

    where: str
    text: str
    reason: str | None

    @property
    def words(self) -> list[str]:
        """As the shell splits it, without a comment behind it."""
        return shlex.split(self.text, comments=True)


def blocks(text: str, path: Path) -> list[Block]:
    """The fenced blocks of a document, and an AssertionError for a fence that does not close."""
    found: list[Block] = []
    reason: str | None = None
    lines = iter(enumerate(text.splitlines(), 1))
    for number, line in lines:
        fence = re.fullmatch(r"(\s*)```(\w*)", line)
        if fence is None:
            marker = MARKER.fullmatch(line.strip())
            reason = marker[1] if marker else reason if not line.strip() else None
            continue
        body = []
        for _, inner in lines:
            if inner.strip() == "```":
                break
            body.append(inner.removeprefix(fence[1]))
        else:
            raise AssertionError(f"{path}:{number}: the block does not end")
        found.append(Block(path, number, fence[2], "\n".join(body), reason))
        reason = None
    return found


BLOCKS = [block for path in DOCUMENTS for block in blocks(path.read_text(encoding="utf-8"), path)]
COMMANDS = [
    Command(block.where, text, block.reason) for block in BLOCKS if block.language in SHELL for text in block.commands
]

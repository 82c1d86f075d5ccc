"""Text from and for the terminal: untrusted text is made safe to print, and typed paths are completed.

Imports nothing heavy: train/main.py needs it before torch.
"""

import os
import re
import shutil
import sys
import textwrap
import unicodedata
from contextlib import suppress
from pathlib import Path
from typing import TextIO

# Joiners shape letters and emoji; every other invisible character is shown by its code point.
JOINERS = "\u200c\u200d"
LABEL_WIDTH = 10  # columns: a run's first lines begin with a label, such as `batch`
MIN_WIDTH = 40  # columns; in fewer nothing reads well


def escaped(text: str, keep: str = "") -> str:
    """`text` with escapes such as \\x1b for unprintable characters, except those in `keep`."""
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def visible(text: str, breaks: str = "↵") -> str:
    """`text` with marks for white space, invisible and control characters; `breaks` stands for a newline."""
    return "".join(_visible_character(character, breaks) for character in text)


def printable(text: str) -> str:
    """`text` on one line, safe for a terminal, with its spaces as they are."""
    return " ".join(visible(part) for part in text.split(" "))


def printable_lines(text: str) -> str:
    """`text` safe for a terminal, with its spaces, tabs and line breaks as they are."""
    return "\n".join("\t".join(map(printable, line.split("\t"))) for line in text.split("\n"))


def _visible_character(character: str, breaks: str) -> str:
    if character == "\n":
        return breaks
    if character == "\t":
        return "⇥"
    if character == " ":
        return "·"
    if ord(character) < 32:
        return chr(0x2400 + ord(character))  # ␀ to ␟
    is_hidden = unicodedata.category(character) in ("Cc", "Cf", "Cs", "Co", "Cn", "Zs", "Zl", "Zp")
    return f"<U+{ord(character):04X}>" if is_hidden and character not in JOINERS else character


def seen_from_here(path: str) -> str:
    """The path as it is shorter to read: from the current folder, if it is below that; the home folder is ~."""
    for folder, begins in ((Path.cwd, ""), (Path.home, "~/")):
        with suppress(ValueError, OSError, RuntimeError):  # not below it, or there is none
            return begins + str(Path(path).relative_to(folder()))
    return path


def fitted(text: str, stream: TextIO | None = None) -> str:
    """`text` with its long lines broken to the terminal's width; as it is where `stream`, or stdout, is none."""
    is_terminal = (stream or sys.stdout).isatty()
    return wrapped(text, shutil.get_terminal_size().columns) if is_terminal else text


def wrapped(text: str, width: int) -> str:
    """`text` with lines of at most `width` columns; what follows stands under what was said, behind its label.

    Words are not broken, so that a path can be copied; nor is a line that begins with two spaces, as a command does.
    """
    return "\n".join(_wrapped(line, max(width, MIN_WIDTH)) for line in text.split("\n"))


def _wrapped(line: str, width: int) -> str:
    if re.match(r"  \S", line):
        return line
    begins = re.match(r"\w* +", line)
    indent = " " * (LABEL_WIDTH if begins and begins.end() == LABEL_WIDTH else 2)
    lines = textwrap.wrap(line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines) if len(line) > width else line


def typed_path(text: str) -> Path:
    """The path that a user typed; `~` at the beginning is the home folder, which no shell sees in `--out=~/rows`."""
    return Path(os.path.expanduser(text))

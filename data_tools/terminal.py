"""Text from and for the terminal: untrusted text is made safe to print, and typed paths are completed.

Imports nothing heavy: train/main.py needs it before torch.
"""

import os
import unicodedata
from pathlib import Path

# Joiners shape letters and emoji; every other invisible character is shown by its code point.
JOINERS = "\u200c\u200d"


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


def typed_path(text: str) -> Path:
    """The path that a user typed; `~` at the beginning is the home folder, which no shell sees in `--out=~/rows`."""
    return Path(os.path.expanduser(text))

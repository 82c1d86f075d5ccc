"""Where bytes are no UTF-8."""

import re
from pathlib import Path

from data_tools.utf8 import not_utf8


def test_the_byte_that_is_not_utf8(tmp_path: Path) -> None:
    """Its line and its place in it, wherever chunks end, also in the middle of a character."""
    path, line = tmp_path / "a.csv", "é" * 40_000
    edges = [f"{'a' * number}{end}{'b' * 9}" for number in range(8189, 8194) for end in ("\n", "\r\n", "\r", "\r\r")]
    for before in ("", "a", f"{line}\n", f"a{line}", f"{line}\n\n{line}\nab", f"a{line}\n{line}", "a\r", *edges):
        for bad in (b"\xe9", b"\xe9\n", b"\xffabc", b"\xe2\x82"):
            path.write_bytes(before.encode() + bad)
            lines = re.split("\r\n?|\n", before)
            with path.open("rb") as file:
                assert not_utf8(file) == (len(lines), len(lines[-1].encode()) + 1)


def test_bytes_that_are_all_utf8(tmp_path: Path) -> None:
    """The end, as where a file was mended in the meantime."""
    path = tmp_path / "a.csv"
    for text, place in (("", (1, 1)), ("aé", (1, 4)), ("a\nbc", (2, 3)), ("a\n", (2, 1))):
        path.write_text(text, encoding="utf-8")
        with path.open("rb") as file:
            assert not_utf8(file) == place

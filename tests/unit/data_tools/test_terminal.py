"""What others wrote cannot steer a terminal, in any of the ways in which it is shown."""

from types import SimpleNamespace

import pytest

from data_tools.terminal import escaped, fitted, printable, visible, wrapped

HOSTILE = "red \x1b[31m\r\x07\u202e\u200b\n\tend"


def test_nothing_that_steers_is_left() -> None:
    """Escapes for messages, marks for displays; newlines only where they are asked to stay."""
    for text in (escaped(HOSTILE), printable(HOSTILE), visible(HOSTILE)):
        assert text.isprintable()
        assert (text[:3], text[-3:]) == ("red", "end")
    assert escaped(HOSTILE) == r"red \x1b[31m\r\x07\u202e\u200b\n\tend"
    assert escaped("one\ntwo\t", keep="\n") == "one\ntwo\\t"


def test_ordinary_text_stays() -> None:
    """Letters of any script, and the joiners that shape them; spaces are marked only where tokens are shown."""
    for text in ("naïve Ωμέγα 漢字", "👩\u200d🚀"):
        assert printable(text) == text
    assert escaped("naïve 漢字") == "naïve 漢字"
    assert visible("a b\n") == "a·b↵"


def test_long_lines_fit_a_terminal_and_lose_nothing() -> None:
    """A line stands under its own label; short lines and paths stay as they are, in whatever width."""
    path = "/a/long/path/" + "x" * 90
    lines = [
        "profile   demo: a base (frozen), compute in fp32, and whatever else there is to be said of it in this line",
        "          GiB: weights 1.00, adapters 0.50, activations 3.25, head 0.75, of which nothing is kept",
        f"data      {path}: 655 records (prompt_response), 655 samples",
        "steps     82 per epoch",
        "loading a base with a name so long that it reaches beyond what a terminal of eighty columns show at once",
        "",
    ]
    for width in (80, 100):
        text = wrapped("\n".join(lines), width)
        shown = text.split("\n")
        assert all(len(line) <= width for line in shown if path not in line)
        assert " ".join(text.split()) == " ".join("\n".join(lines).split())
    shown = wrapped("\n".join(lines), 80).split("\n")
    assert shown[0] == "profile   demo: a base (frozen), compute in fp32, and whatever else there is to"
    assert shown[1] == "          be said of it in this line"
    assert shown[-3].startswith("loading")
    assert shown[-2].startswith("  ")
    assert shown[-2][2] != " "
    assert wrapped("a b " * 40, 3) == wrapped("a b " * 40, 40)


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_log_keeps_its_lines(is_terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only a terminal's lines are broken."""
    monkeypatch.setattr("sys.stdout", SimpleNamespace(isatty=lambda: is_terminal))
    monkeypatch.setenv("COLUMNS", "80")
    line = "data      " + "word " * 40
    assert (fitted(line) == line) is not is_terminal

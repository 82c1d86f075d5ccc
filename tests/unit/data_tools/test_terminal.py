"""What others wrote cannot steer a terminal, in any of the ways in which it is shown."""

from data_tools.terminal import escaped, printable, visible

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

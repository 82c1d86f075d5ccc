"""Template files are looked at, templates fail with their line, and the date is an input."""

from datetime import date
from pathlib import Path

import pytest

from data_tools.chat_template import ChatTemplate, read_template
from data_tools.prepare import PrepareSettings, prepare
from data_tools.render import RenderSettings
from tests.unit.data_tools.jinja import DATED, PLAIN, answer, rendered, tokenizer_with, user

BAD_FILES = [
    (b"", ": the file is empty"),
    (b"\xef\xbb\xbf \n", ": the file is empty"),
    (b'{"chat_template": "{{ messages }}"}', ":1: JSON, not a Jinja template; put the text of its 'chat_template'"),
    (b"[1, 2]", ":1: JSON, not a Jinja template"),
    (b'"{{ messages }}"', ":1: JSON, not a Jinja template"),
    (b"<html>not found</html>", ":1: it has no Jinja in it"),
    (b"a\n\n{% for m in messages %}\n{{ m }", ":4: not a Jinja template: "),
    (b"\xff\xfe", r": not UTF-8 \(byte 0\)"),
]


@pytest.mark.parametrize(("content", "reason"), BAD_FILES, ids=[reason[:30] for _, reason in BAD_FILES])
def test_a_template_file_that_is_none(content: bytes, reason: str, tmp_path: Path) -> None:
    """Empty, JSON, broken, or not UTF-8: the message has the file, and the line where there is one."""
    path = tmp_path / "x.jinja"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"x.jinja{reason}"):
        read_template(path)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    """It is not trained before every prompt."""
    path = tmp_path / "x.jinja"
    path.write_text("\ufeff" + PLAIN, encoding="utf-8")
    assert read_template(path) == PLAIN


def test_a_template_that_raises_says_where(tmp_path: Path) -> None:
    """With its line, when it is loaded and with each row."""
    template = "{{ bos_token }}\n{% for m in messages %}\n{{ raise_exception('not today') }}{% endfor %}"
    with pytest.raises(ValueError, match=r"x\.jinja: it fails on a question .*: not today \(line 3 of the template\)"):
        ChatTemplate(tokenizer_with(template)).check(Path("x.jinja"))
    with pytest.raises(ValueError, match=r"refuses this conversation: not today \(line 3 of the template\)"):
        rendered(template, user("a"), answer("b"))


def test_the_date_is_an_input(tmp_path: Path) -> None:
    """A template sees the given date; it is in the fingerprint and recorded, for templates that ask for it alone."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "response": "b"}\n')
    found = {}
    for template in (DATED, PLAIN):
        for day in (date(2026, 1, 31), date(2026, 2, 1)):
            settings = PrepareSettings((str(path),), render=RenderSettings(today=day))
            found[template, day] = prepare(settings, tokenizer_with(template))
    dated, other = found[DATED, date(2026, 1, 31)], found[DATED, date(2026, 2, 1)]
    assert dated.fingerprint != other.fingerprint
    tokenizer = tokenizer_with(DATED)
    assert tokenizer.decode(dated.dataset[0]["input_ids"]).startswith("<|begin|>31.01.2026\n")
    assert (dated.statistics.date, other.statistics.date) == ("2026-01-31", "2026-02-01")
    plain = found[PLAIN, date(2026, 1, 31)]
    assert plain.fingerprint == found[PLAIN, date(2026, 2, 1)].fingerprint
    assert plain.statistics.date == ""

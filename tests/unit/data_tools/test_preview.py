"""The preview shows exactly the prepared tokens, and no data can control the reader's terminal or browser."""

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from data_tools.prepare import PrepareSettings, prepare
from data_tools.preview import TokenView, as_html, as_plain, preview, show_samples, visible
from tests.conftest import BUNDLED_BASE, SHARED, needs_shared, tokenizer_at
from train.commands.handloop import main

NASTY = "é ✓ 🎉 <script>alert('x')</script> & \x1b[31m\u202e\n\n\tnext  line \ufffd"
WORDS = ["--profile", "demo", "--data.path"]


@pytest.fixture
def nasty(tmp_path: Path) -> Path:
    path = tmp_path / "<b>rows.jsonl"
    rows = [{"prompt": NASTY, "response": "One\ntwo é"}, {"prompt": "Again?", "response": NASTY}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(path: Path, folder: Path = BUNDLED_BASE) -> list[TokenView]:
    tokenizer = tokenizer_at(folder)
    return list(preview(prepare(PrepareSettings((str(path),)), tokenizer).dataset, tokenizer))


def shown(rows: list[TokenView], **options: Any) -> str:
    stream = io.StringIO()
    show_samples(rows, Console(file=stream, width=60, **options))
    return stream.getvalue()


def check_tokens_joined_are_the_text(path: Path, folder: Path) -> None:
    tokenizer = tokenizer_at(folder)
    if tokenizer.chat_template is None:
        tokenizer.chat_template = tokenizer_at().chat_template
    rows = list(preview(prepare(PrepareSettings((str(path),)), tokenizer).dataset, tokenizer))
    assert len(rows) == 2
    for row in rows:
        assert "".join(row.tokens).lstrip(" ") == tokenizer.decode(row.ids).lstrip(" ")
        assert any("é" in token for token in row.tokens)
        assert len(row.tokens) == len(row.ids) == len(row.trained) == len(row.special)


def test_tokens_joined_are_the_text(nasty: Path) -> None:
    """Spaces, parts of characters and special tokens are all kept."""
    check_tokens_joined_are_the_text(nasty, BUNDLED_BASE)


@needs_shared
@pytest.mark.parametrize("name", ["tinyllama_1b", "llama31_8b"])
def test_tokens_joined_are_the_text_for_real_tokenizers(nasty: Path, name: str) -> None:
    """The same for real SentencePiece and byte-level vocabularies."""
    check_tokens_joined_are_the_text(nasty, SHARED / name)


def test_json_round_trip(nasty: Path, capsys: pytest.CaptureFixture) -> None:
    """`--json` prints one document that has each sample, with the prepared ids and masks and the text of the tokens."""
    assert main(["preview", *WORDS, str(nasty), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)["samples"]
    tokenizer = tokenizer_at()
    samples: Any = prepare(PrepareSettings((str(nasty),), max_length=256), tokenizer).dataset
    assert len(printed) == len(samples) == 2
    for row, sample in zip(printed, samples, strict=True):
        assert row["ids"] == sample["input_ids"]
        assert row["trained"] == [int(value) for value in sample["trained"]]
        assert row["source"] == sample["source"]
        assert row["num_supervised_tokens"] == sample["num_supervised_tokens"] == sum(row["trained"])
        assert "".join(row["tokens"]) == tokenizer.decode(row["ids"])


def test_no_terminal_no_escape_codes(nasty: Path, capsys: pytest.CaptureFixture) -> None:
    """Without a terminal no escape codes are printed, not even those in the data; trained text is in brackets."""
    assert main(["preview", *WORDS, str(nasty), "--rows", "1"]) == 0
    text = capsys.readouterr().out
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "␛[" in text.replace("│", "")
    assert "<U+202E>" in text
    trained = re.findall("⟦(.*?)⟧", text, re.DOTALL)[1:]  # without the legend's
    assert [re.sub("[│…]", "", part) for part in trained] == ["One↵\ntwo·é<|end|>"]
    assert "<b>rows.jsonl:1  " in text
    assert "<b>rows.jsonl:2  " not in text


def test_a_terminal_gets_colours_and_the_same_text(nasty: Path) -> None:
    """A terminal gets the same characters in colour: trained tokens green, special ones reversed."""
    rows = rows_of(nasty)
    coloured = shown(rows, force_terminal=True, color_system="standard", no_color=False)
    assert "\x1b[31m" not in coloured  # the data's own code
    parts = re.findall(r"\x1b\[([\d;]+)m(.*?)\x1b\[0m", coloured.split("rows.jsonl:1")[1].split("rows.jsonl:2")[0])
    assert "".join(text for codes, text in parts if "32" in codes.split(";")).endswith("two·é…<|end|>")
    assert [text for codes, text in parts if "7" in codes.split(";")] == [
        token for token, special in zip(rows[0].tokens, rows[0].special, strict=True) if special
    ]
    assert {"2", "4"} <= set(parts[1][0].split(";")) or {"2", "4"} <= set(parts[0][0].split(";"))
    assert "\x1b" not in shown(rows, force_terminal=True, no_color=True).replace("\x1b[1m", "").replace("\x1b[0m", "")


def test_plain_text_separates_every_two_tokens() -> None:
    """Tokens are separated by bars, brackets or line breaks; a trained newline keeps its bracket on its line."""
    row = TokenView("x:1", [1, 2, 3, 4, 5], [False, True, True, False, True], ["a", "b", "\n", "c", " d"], [False] * 5)
    assert as_plain(row) == "a⟦b│↵⟧\nc⟦·d⟧"


class Page(HTMLParser):
    """Collects the tags of a page, their references, and the text of its token spans."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.references: list[str] = []
        self.classes: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.references += [
            value or "" for name, value in attrs if name in ("src", "href", "style") or name[:2] == "on"
        ]
        self.classes += [value or "" for name, value in attrs if name == "class" and tag == "span"]


def test_the_page_is_self_contained_and_escaped(nasty: Path) -> None:
    """Data, file names and subtitle cannot add tags; nothing is loaded; each token has one span of the right class."""
    one_token = TokenView("x:1", [1, 2], [True, False], ["<script>", "</code><b>"], [False, False])
    rows = [*rows_of(nasty), one_token]
    text = as_html(rows, "<script>of</script>")
    page = Page(text)
    assert not {"script", "b", "link", "img", "iframe"} & set(page.tags)
    assert not page.references
    assert not re.search(r"https?:|url\(|@import", text)
    assert "&lt;script&gt;of" in text
    assert "&lt;b&gt;rows.jsonl:1" in text
    assert "\x1b" not in text
    assert {"title", "ul", "article"} <= set(page.tags)
    assert "prefers-color-scheme: dark" in text
    legend = Page(text.split("</ul>")[0]).classes
    expected = [("t" if trained else "m") for row in rows for trained in row.trained]
    assert [name.split()[0] for name in page.classes[len(legend) :]] == expected


def test_the_page_through_the_command(nasty: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """`--html FILE` writes the page and prints no rows; a missing folder is 78 without a traceback."""
    target = tmp_path / "page.html"
    assert main(["preview", *WORDS, str(nasty), f"--html={target}"]) == 0
    assert target.read_text().startswith("<!DOCTYPE html>")
    assert target.read_text().count("<article>") == 2
    assert capsys.readouterr().out == ""
    assert main(["preview", *WORDS, str(nasty), "--html", str(tmp_path / "absent" / "page.html")]) == 78
    captured = capsys.readouterr()
    assert captured.err.count("handloop: ") == 1
    assert "Traceback" not in captured.err


def test_visible_marks() -> None:
    """White space and hidden characters get marks; letters, joiners and emoji stay."""
    assert visible("a b\tc\r\x7f\u00a0\u200d🎉") == "a·b⇥c␍<U+007F><U+00A0>\u200d🎉"


def test_mistakes_end_with_one_message(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Unknown commands and options, bad numbers and missing files are 78 with one message that says what works."""
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "x"\n')
    for words, part in (
        (["preveiw"], "did you mean preview?"),
        (["preview", "--profile", "demo", "--rows", "0"], "'0' is not a positive integer"),
        (["preview", "--profile", "demo", "--json=yes"], "--json"),
        (["preview", "--profile", "demo", "--data.pat", "x"], "did you mean --data.path?"),
        (["preview", "--profile", "demo", "--data.pat", "x"], "\nusage: handloop preview [FILE ...] [--profile NAME]"),
        (["audit"], "\nusage: handloop audit [FILE ...] [--profile NAME]"),
        (["plan", "--profile", "dem"], "\nusage: handloop plan --profile NAME"),
        (["audit", *WORDS, str(bad)], f"{bad}:1: not JSON"),
        (["preview", *WORDS, "absent.jsonl"], "absent.jsonl"),
    ):
        assert main(words) == 78
        captured = capsys.readouterr()
        assert part in captured.err
        assert captured.err.startswith("\nhandloop: ")
        assert "Traceback" not in captured.err
        assert captured.out == ""


def test_help_lists_the_commands(capsys: pytest.CaptureFixture) -> None:
    """`handloop --help` lists the commands; a command's help lists its own options."""
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"\n  {name} " in text for name in ("preview", "audit", "glossary"))
    with pytest.raises(SystemExit) as caught:
        main(["preview", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(option in text for option in ("--rows", "--html", "--json", "--profile"))


def test_positions_in_packed_rows(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """With packing, a row's samples are shown in order, each with its first and last position in the row."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"What is {i}?", "response": "x" * i}) + "\n" for i in range(1, 21)))
    words = [
        "preview",
        "--profile",
        "demo",
        "--data.path",
        str(path),
        "--data.packing",
        "true",
        "--data.group_by_length",
        "false",
        "--rows",
        "2",
    ]
    assert main([*words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["samples"]
    assert {row["packed_row"] for row in rows} == {1, 2}
    for number in (1, 2):
        place = 0
        members = [row for row in rows if row["packed_row"] == number]
        assert len(members) > 1
        for row in members:
            assert row["packed_start"] == place
            place += row["num_tokens"]
        assert place <= 256
    assert main(words) == 0
    assert re.search(r"in packed row 2 from 1 to \d+$", capsys.readouterr().out, re.MULTILINE)

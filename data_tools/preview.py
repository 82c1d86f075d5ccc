"""Samples token by token, trained or masked: in colour on a terminal, as plain text, JSON lines or an HTML page."""

import html
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from data_tools.encode import special_ids
from data_tools.terminal import printable, visible

REPLACEMENT = "\ufffd"
MAX_CHARACTER_TOKENS = 8  # a UTF-8 character has at most 4 bytes, and each token holds at least one
CONTINUATION = "…"  # stands for a token that only continues the bytes of the character before it
MARKS = f"· space   ↵ newline   ⇥ tab   {CONTINUATION} continues the character before it"
TRAINED, MASKED = "green", "dim"
TITLE = "What is trained on"


@dataclass(frozen=True)
class TokenView:
    """A sample as it is trained; the four lists have one item per token, and joined `tokens` give the text."""

    source: str
    ids: list[int]
    trained: list[bool]
    tokens: list[str]
    special: list[bool]
    packed_row: int | None = None  # number of its packed row, from 1
    packed_start: int = 0  # number of tokens before it in that row

    @property
    def num_supervised_tokens(self) -> int:
        """Supervised tokens; the first token is never one."""
        return sum(self.trained[1:])

    @property
    def heading(self) -> str:
        """The source, the counts, and the place in a packed row."""
        return f"{printable(self.source)}  {self.counts}"

    @property
    def counts(self) -> str:
        """The numbers of tokens and trained tokens, and the place in a packed row."""
        counts = f"{len(self.ids):,} tokens, {self.num_supervised_tokens:,} trained"
        if self.packed_row is None:
            return counts
        last = self.packed_start + len(self.ids)
        return f"{counts}, in packed row {self.packed_row} from {self.packed_start + 1:,} to {last:,}"

    def as_json(self) -> dict[str, Any]:
        """An object for one JSON line: source, counts, ids, trained (0 or 1) and the text of each token."""
        return {
            "source": self.source,
            "num_tokens": len(self.ids),
            "num_supervised_tokens": self.num_supervised_tokens,
            "ids": self.ids,
            "trained": [int(value) for value in self.trained],
            "tokens": self.tokens,
            "packed_row": self.packed_row,
            "packed_start": self.packed_start,
        }


def preview(samples: Iterable[Any], tokenizer: Any) -> Iterator[TokenView]:
    """Samples of a prepared data set with the text of each token, and the place of packed ones."""
    special = special_ids(tokenizer)
    for sample in samples:
        ids = sample["input_ids"]
        flags = [number in special for number in ids]
        texts = token_texts(tokenizer, ids, flags)
        place = sample.get("packed_row"), sample.get("packed_start", 0)
        yield TokenView(sample["source"], ids, sample["trained"], texts, flags, *place)


def token_texts(tokenizer: Any, ids: Sequence[int], special: Sequence[bool]) -> list[str]:
    """The text of each token; joined, they are the text of the sample.

    If several tokens make up one character, the first gets it and the others are empty. Each piece is decoded after an
    ordinary token, because Llama-2's decoder strips the space at the beginning of a text.
    """
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1:]
    anchor_length = len(tokenizer.decode(anchor))

    def decode(piece: Sequence[int]) -> str:
        return tokenizer.decode([*anchor, *piece], skip_special_tokens=False)[anchor_length:]

    texts: list[str] = []
    while len(texts) < len(ids):
        start = len(texts)
        if special[start]:
            texts.append(tokenizer.convert_ids_to_tokens(ids[start]))
            continue
        end, piece = start + 1, decode(ids[start : start + 1])
        # half a character; or the data itself has U+FFFD, and then cutting the text at `end` does not change it
        while REPLACEMENT in piece and end < min(len(ids), start + MAX_CHARACTER_TOKENS):
            horizon = end + MAX_CHARACTER_TOKENS
            if piece + decode(ids[end:horizon]) == decode(ids[start:horizon]):
                break
            end += 1
            piece = decode(ids[start:end])
        texts += [piece, *[""] * (end - start - 1)]
    return texts


def show_samples(rows: Iterable[TokenView], console: Console) -> None:
    """Prints the rows: in colour on a terminal, otherwise with brackets and bars."""
    coloured = console.is_terminal and not console.no_color
    legend = _coloured_legend() if coloured else Text(f"⟦ ⟧ trained   │ between tokens   {MARKS}")
    console.print(legend, soft_wrap=True)
    for row in rows:
        body = _coloured(row) if coloured else Text(as_plain(row))
        console.print(Text(f"\n{row.heading}", style="bold"), soft_wrap=True)
        console.print(body, soft_wrap=True)


def as_plain(row: TokenView) -> str:
    """The tokens without colour: ⟦ and ⟧ around trained ones, and a bar or a new line between any other two."""
    text = ""
    for token, trained, before, after in zip(
        row.tokens, row.trained, [False, *row.trained], [*row.trained[1:], False], strict=False
    ):
        # the line break follows ⟧, which would otherwise begin the next line
        body, newline, _ = _shown(token).rpartition("↵\n") if token.endswith("\n") else (_shown(token), "", "")
        bar = "⟦" if trained and not before else "│" if text and text[-1] not in "\n⟧" else ""
        text += f"{bar}{body}{newline[:1]}{'⟧' if trained and not after else ''}{newline[1:]}"
    return text.rstrip("\n")


def _shown(token: str) -> str:
    return visible(token, breaks="↵\n") or CONTINUATION


def _coloured(row: TokenView) -> Text:
    """Every second token is underlined, special tokens are reversed."""
    text = Text()
    for i, (token, trained, special) in enumerate(zip(row.tokens, row.trained, row.special, strict=True)):
        text.append(_shown(token), style=_style(trained, special, underlined=i % 2 == 1))
    text.rstrip()
    return text


def _style(trained: bool, special: bool, underlined: bool) -> str:
    return f"{TRAINED if trained else MASKED}{' reverse' if special else ''}{' underline' if underlined else ''}"


def _coloured_legend() -> Text:
    return Text("   ").join(
        [
            Text("trained", style=_style(True, False, False)),
            Text("masked", style=_style(False, False, False)),
            Text("special", style=_style(True, True, False)),
            Text.assemble(("tok", _style(True, False, False)), ("ens", _style(True, False, True))),
            Text(MARKS),
        ]
    )


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --back: #ffffff; --ink: #1d2433; --quiet: #667085; --line: #d5dae3;
  --card: #f7f8fa; --on-a: #c9efd2; --on-b: #a9e0b8; --on-ink: #06371a; --off-b: #e9ecf1; --mark: #8c6d1f; }}
@media (prefers-color-scheme: dark) {{ :root {{ --back: #14171d; --ink: #e6e9ef; --quiet: #98a2b3; --line: #343b49;
  --card: #1b2028; --on-a: #14532d; --on-b: #1b6b3b; --on-ink: #dcfce7; --off-b: #272e3a; --mark: #e3b341; }} }}
* {{ box-sizing: border-box; }}
body {{ margin: 0 auto; max-width: 64rem; padding: 1.5rem 1rem 3rem; background: var(--back); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 1.5rem; margin: 0 0 .25rem; }}
h2 {{ font-size: 1rem; margin: 0; overflow-wrap: anywhere; }}
p {{ margin: 0 0 1rem; color: var(--quiet); overflow-wrap: anywhere; }}
.legend {{ display: flex; flex-wrap: wrap; gap: .4rem 1.25rem; margin: 0 0 1.5rem; padding: 0; list-style: none; }}
article {{ margin: 0 0 1.25rem; border: 1px solid var(--line); border-radius: 8px; overflow: hidden; }}
header {{ display: flex; flex-wrap: wrap; gap: .25rem 1rem; justify-content: space-between; padding: .5rem .9rem;
  background: var(--card); border-bottom: 1px solid var(--line); }}
header small {{ color: var(--quiet); font-size: .875rem; }}
code {{ font: .875rem/1.75 ui-monospace, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }}
.text {{ display: block; padding: .7rem .9rem; }}
.m {{ color: var(--quiet); }}
.m.b {{ background: var(--off-b); }}
.t {{ background: var(--on-a); color: var(--on-ink); }}
.t.b {{ background: var(--on-b); }}
.m, .t {{ border-radius: 2px; padding: .1em 0; }}
.s {{ outline: 1px solid var(--mark); outline-offset: -1px; font-weight: 600; }}
i {{ font-style: normal; opacity: .65; }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>{subtitle}</p>
<ul class="legend">
<li><code><span class="t">trained</span></code></li>
<li><code><span class="m">masked</span></code></li>
<li><code><span class="t s">trained</span> <span class="m s">masked</span></code> special token</li>
<li><code><span class="t">tok</span><span class="t b">ens</span> <span class="m">tok</span><span class="m b">ens</span>
</code> neighbours differ in shade</li>
<li><code><i>·</i></code> space</li>
<li><code><i>↵</i></code> newline</li>
<li><code><i>⇥</i></code> tab</li>
<li><code><i>…</i></code> continues the character before it</li>
</ul>
{rows}
</body>
</html>
"""


def as_html(rows: Iterable[TokenView], subtitle: str) -> str:
    """A self-contained page; everything that comes from the data is escaped."""
    articles = "\n".join(_article(row) for row in rows)
    return _PAGE.format(title=TITLE, subtitle=html.escape(printable(subtitle)), rows=articles)


def _article(row: TokenView) -> str:
    spans = [
        f'<span class="{"t" if trained else "m"}{" s" if special else ""}{" b" if i % 2 else ""}" '
        f'title="{"trained" if trained else "masked"}, id {number}">{_html_token(token)}</span>'
        for i, (number, token, trained, special) in enumerate(
            zip(row.ids, row.tokens, row.trained, row.special, strict=True)
        )
    ]
    return (
        f"<article>\n<header><h2>{html.escape(printable(row.source))}</h2><small>{row.counts}</small>"
        "</header>\n"
        f'<code class="text">{"".join(spans)}</code>\n</article>'
    )


def _html_token(token: str) -> str:
    """Marks for white space are lighter than the text; a line may break before a space."""
    marks = {" ": "<wbr><i>·</i>", "\n": "<i>↵</i><br>", "\t": "<i>⇥</i>"}
    return "".join(marks.get(c) or html.escape(visible(c)) for c in token) or f"<i>{CONTINUATION}</i>"

"""Text -> token ids, where special tokens spelled in the data stay text.

While a template runs, a special token that the data spells is one private character. So it is known, in the rendered
text, which special tokens the template wrote and which the data did, wherever the template has put the data.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any

from transformers import PreTrainedTokenizerBase

PRIVATE = range(0xE000, 0xF8FF)  # characters without a meaning
PRIVATE_CHARACTER = re.compile("[\ue000-\uf8ff]")
PRIVATE_ESCAPE = re.compile(r"\\u([eEfF][0-9a-fA-F]{3})")
# What begins a turn or ends it, also where a tokenizer does not call it special; <think> is data's own to write.
CONTROL = re.compile(r"<[|\uff5c].*[|\uff5c]>|\[/?[A-Z_]+\]")
# Beginnings of a text with which it is seen how a tokenizer treats what follows a special token.
PROBES = ("a b", " a", "\na", ". a", "a")
ANCHORS = ("\n", "a", ".", "0")

Span = tuple[int, int]  # [start, end) in characters


def special_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of all special tokens, including those without a named role (Llama-3's <|eot_id|>)."""
    return frozenset(special_tokens(tokenizer, len(tokenizer)))


@lru_cache(maxsize=4)
def special_tokens(tokenizer: PreTrainedTokenizerBase, size: int) -> dict[int, str]:
    """Special tokens by id, and those that only look so: DeepSeek's roles are not marked as special.

    Cached by vocabulary size, because asking the tokenizer is slower than tokenising a row.
    """
    added = {
        number: token.content
        for number, token in tokenizer.added_tokens_decoder.items()
        if token.special or CONTROL.fullmatch(token.content)
    }
    return added | dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))


@dataclass(frozen=True)
class Encoded:
    """Token ids, and for each the characters of the text that it stands for."""

    ids: list[int]
    offsets: list[Span]


class SpelledTokens:
    """The special tokens that a row's strings spell, each with the private character that stands for it."""

    def __init__(self, pattern: re.Pattern[str], strings: str) -> None:
        names = sorted(set(pattern.findall(strings)))
        taken = {ord(character) for character in PRIVATE_CHARACTER.findall(strings)}
        taken |= {int(digits, 16) for digits in PRIVATE_ESCAPE.findall(strings)}
        free = [code for code in PRIVATE if code not in taken]
        if len(free) < len(names):
            raise ValueError(f"it spells {len(names)} special tokens and uses all of Unicode's private characters")
        self.pattern = pattern
        self.private = {name: chr(code) for name, code in zip(names, free, strict=False)}
        self.names = {character: name for name, character in self.private.items()}

    def hide(self, value: Any) -> Any:
        """The value with private characters in the place of special tokens, at every depth."""
        if isinstance(value, str):
            return self.pattern.sub(lambda match: self.private[match[0]], value)
        if isinstance(value, Mapping):
            return {self.hide(key): self.hide(item) for key, item in value.items()}
        return type(value)(map(self.hide, value)) if isinstance(value, list | tuple) else value

    def are_escaped(self, text: str) -> bool:
        """Whether a template has written one of the private characters as JSON does for ASCII."""
        lower = text.lower()
        return any(f"\\u{ord(character):04x}" in lower for character in self.names)

    def restore(self, text: str) -> str:
        """The text with the special tokens spelled out."""
        for character, name in self.names.items():
            text = text.replace(character, name)
        return text


class Encoder:
    """A tokenizer for rendered conversations."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.special = special_tokens(tokenizer, len(tokenizer))
        names = sorted(filter(None, set(self.special.values())), key=lambda name: (-len(name), name))
        self.special_names = tuple(names)
        marked = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        self._unmarked = [name for name in names if name not in marked | set(tokenizer.all_special_tokens)]
        self.special_pattern = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._header_ids = lru_cache(maxsize=4096)(lambda text: tuple(self._backend(text).ids))
        self._after_special: str | None = None

    def specials_at(self, text: str, place: int) -> Iterator[int]:
        """The ends of the special tokens that stand at a place in the text, with nothing but white space between."""
        while True:
            place += len(text[place:]) - len(text[place:].lstrip())
            match = self.special_pattern.match(text, place)
            if match is None:
                return
            place = match.end()
            yield place

    def encode(self, text: str, spelled: SpelledTokens | None = None) -> Encoded:
        """The text's tokens; a private character of `spelled` becomes its special token's name, encoded as text.

        Raises ValueError where the tokenizer encodes pieces otherwise than the whole.
        """
        encoding = self._backend(text)
        encoded = Encoded(encoding.ids, encoding.offsets)
        if spelled is None or not any(character in text for character in spelled.names):
            return encoded
        ids: list[int] = []
        offsets: list[Span] = []
        run_start, run_ids, run_offsets = 0, list[int](), list[Span]()
        # the tokenizer, too, encodes what stands between two special tokens by itself
        for token, (start, end) in [*zip(encoded.ids, encoded.offsets, strict=True), (None, (len(text), len(text)))]:
            if token is not None and token not in self.special:
                run_ids.append(token)
                run_offsets.append((start, end))
                continue
            run = text[run_start:start]
            if any(character in run for character in spelled.names):
                run_ids, run_offsets = self._literal(run, run_start, spelled)
            ids += run_ids
            offsets += run_offsets
            run_start, run_ids, run_offsets = end, [], []
            if token is not None:
                ids.append(token)
                offsets.append((start, end))
        return Encoded(ids, offsets)

    def encode_apart(self, text: str, place: int) -> Encoded | None:
        """The text's tokens, those up to `place` as they are alone; None where no anchor shows what follows alone."""
        before = self.encode(text[:place])
        for anchor in ANCHORS:
            whole, alone = self._backend(anchor + text[place:]), self._backend(anchor).ids
            rest = whole.offsets[len(alone) :]
            if whole.ids[: len(alone)] == alone and all(start >= len(anchor) for start, _ in rest):
                shift = place - len(anchor)
                offsets = [(start + shift, end + shift) for start, end in rest]
                return Encoded(before.ids + whole.ids[len(alone) :], before.offsets + offsets)
        return None

    def is_prefix(self, encoded: Encoded, text: str, end: int, first: int, spelled: SpelledTokens | None) -> bool:
        """Whether the text up to `end`, encoded alone as for generation, gives the first `first` tokens."""
        start = next((i for i in range(first - 1, -1, -1) if encoded.ids[i] in self.special), None)
        header = text[:end] if start is None else text[encoded.offsets[start][0] : end]
        if spelled is not None and any(character in header for character in spelled.names):
            return self.encode(text[:end], spelled).ids == encoded.ids[:first]
        return list(self._header_ids(header)) == encoded.ids[start or 0 : first]

    def _backend(self, text: str, as_text: bool = False) -> Any:
        """What the tokenizer makes of a text, without the begin and end tokens that it adds to single texts."""
        backend = self.tokenizer.backend_tokenizer
        backend.no_padding()
        backend.no_truncation()
        backend.encode_special_tokens = as_text
        return backend.encode(text, add_special_tokens=False)

    def _literal(self, run: str, start: int, spelled: SpelledTokens) -> tuple[list[int], list[Span]]:
        """Ids and offsets of what stands between two special tokens, itself free of them."""
        restored = spelled.restore(run)
        # where each character of the restored run stands in the text
        places: list[int] = []
        for position, character in enumerate(run):
            places += [start + position] * len(spelled.names.get(character, character))
        places.append(start + len(run))
        ids: list[int] = []
        offsets: list[Span] = []
        for begin, piece in _cut(restored, self._unmarked):
            anchors = ANCHORS if begin else (self._anchor() if start else "",)
            for token, (first, end) in self._behind(anchors, piece):
                last = places[begin + end - 1] + 1 if end > first else places[begin + first]
                ids.append(token)
                offsets.append((places[begin + first], last))
        return ids, offsets

    def _behind(self, anchors: Sequence[str], piece: str) -> list[tuple[int, Span]]:
        """The tokens of a text as it is encoded behind one of the anchors, of which it changes no token."""
        for anchor in anchors:
            encoding, alone = self._backend(anchor + piece, as_text=True), self._backend(anchor, as_text=True).ids
            tokens = list(zip(encoding.ids, encoding.offsets, strict=True))[len(alone) :]
            if encoding.ids[: len(alone)] == alone and all(first >= len(anchor) for _, (first, _) in tokens):
                return [(token, (first - len(anchor), end - len(anchor))) for token, (first, end) in tokens]
        raise ValueError("it spells a special token that this tokenizer cannot encode as text; take it out of the row")

    def _anchor(self) -> str:
        """A text that stands for the special token before a run; empty if a run is encoded as it is alone."""
        if self._after_special is not None:
            return self._after_special
        name = self.tokenizer.eos_token
        after = [self._backend(name + probe).ids[1:] for probe in PROBES]
        for anchor in ("", *ANCHORS):
            alone = self._backend(anchor).ids
            if [self._backend(anchor + probe).ids for probe in PROBES] == [alone + ids for ids in after]:
                self._after_special = anchor
                return anchor
        raise ValueError(
            "it spells a special token, and this tokenizer encodes text after a special token as it does nowhere else, "
            "so it cannot be encoded as text; take the special token out of the row"
        )


def _cut(text: str, names: Sequence[str]) -> list[tuple[int, str]]:
    """(begin, piece) of a text cut within each of the names, behind its first character."""
    cuts = {place + 1 for name in names for place in _places(text, name)}
    edges = [0, *sorted(cuts), len(text)]
    return [(begin, text[begin:end]) for begin, end in pairwise(edges) if end > begin]


def _places(text: str, name: str) -> Iterator[int]:
    place = text.find(name)
    while place >= 0:
        yield place
        place = text.find(name, place + 1)

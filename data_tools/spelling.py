"""What may have been meant by a word that is not known."""

import difflib
from collections.abc import Iterable


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The one of `known` that `word` begins, or that is most like it by difflib's ratio; empty if none comes near.

    Hyphens and underscores are the same, and so are capitals and small letters.
    """
    plain = {_plain(each): each for each in known}
    begun = [name for name in plain if name.startswith(_plain(word))] if len(word) > 1 else []
    found = begun if len(begun) == 1 else difflib.get_close_matches(_plain(word), plain, n=1, cutoff=cutoff)
    return plain[found[0]] if found else ""


def _plain(word: str) -> str:
    return word.lower().replace("-", "_")

"""Equal and nearly equal texts are found from hashes."""

import numpy as np
import pytest

from data_tools import similarity
from data_tools.similarity import NEAR_SIMILARITY, first_equal, first_near, normalise, sketches


def test_normalisation() -> None:
    """Case, white space, width and punctuation are removed; symbols and marks of other scripts stay."""
    assert normalise("  Hello,\tWORLD!\n") == normalise("hello world") == "hello world"
    assert normalise("\uff12 + \uff12") == "2 + 2" != normalise("2 2")
    assert normalise("Straße") == "strasse"
    assert normalise("कि") != normalise("क")


def test_near_duplicates_agree_with_the_true_similarity() -> None:
    """Over random edits, the estimate finds pairs well above the threshold and not those well below it."""
    generator = np.random.default_rng(0)
    hits = {True: [0, 0], False: [0, 0]}
    for _ in range(150):
        words = [str(n) for n in generator.integers(10**6, size=100)]
        edited = list(words)
        for place in generator.integers(100, size=generator.integers(1, 15)):
            edited[place] = "x"
        first, second = ({tuple(w[i : i + 5]) for i in range(96)} for w in (words, edited))
        similarity = len(first & second) / len(first | second)
        if abs(similarity - NEAR_SIMILARITY) > 0.15 or similarity > 0.9:
            is_found = first_near(sketches([" ".join(words), " ".join(edited)])).tolist() == [0, 0]
            tally = hits[similarity > NEAR_SIMILARITY]
            tally[0] += is_found
            tally[1] += 1
    assert hits[True][1] > 5
    assert hits[True][0] >= 0.9 * hits[True][1]
    assert hits[False][1] > 50
    assert hits[False][0] <= 0.02 * hits[False][1]


def test_first_equal() -> None:
    """Each item maps to the first equal one; empty input gives empty output."""
    assert first_equal(np.array([3, 1, 3, 2, 1, 3], np.uint64)).tolist() == [0, 1, 0, 3, 1, 0]
    assert first_equal(np.zeros(0, np.uint64)).tolist() == []
    assert first_near(sketches(["", ""])).tolist() == [0, 1]


def test_sketches_do_not_depend_on_their_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text has the same sketch alone, beside others, empty ones among them, and in pieces where it is long."""
    texts = ["", "one two", " ".join(f"word{i}" for i in range(300)), "", "five words are one gram", "x " * 40]
    alone = np.stack([sketches([text])[0] for text in texts])
    assert (sketches(texts) == alone).all()
    assert (alone[0] == alone[3]).all()
    assert len({row.tobytes() for row in alone}) == 5
    monkeypatch.setattr(similarity, "CHUNK", 7)
    assert (sketches(texts) == alone).all()
    assert sketches([]).shape == (0, similarity.NUM_MINIMA)

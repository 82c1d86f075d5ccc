"""Finds texts that are equal, equal after normalisation, or nearly equal, from hashes of a fixed size."""

import hashlib
import unicodedata
import zlib
from collections.abc import Sequence
from functools import cache

import numpy as np

# Near-duplicates as in Lee et al. 2022, "Deduplicating Training Data Makes Language Models Better": word 5-grams.
GRAM_WORDS = 5
NEAR_SIMILARITY = 0.8  # Jaccard, estimated: share of equal minima
# 8 bands of 4 minima: a pair of similarity 0.8 agrees in some band with probability 0.98; one of 0.5 with probability
# 0.4, and the estimate then rejects it.
NUM_MINIMA, NUM_BANDS = 32, 8
CHUNK = 2**14  # grams hashed at once: 4 MiB, whatever the length of the text
_GENERATOR = np.random.default_rng(0)
_FACTORS = _GENERATOR.integers(2**63, size=NUM_MINIMA, dtype=np.uint64) * 2 + 1  # odd
_OFFSETS = _GENERATOR.integers(2**63, size=NUM_MINIMA, dtype=np.uint64)
_GRAM_FACTORS = _GENERATOR.integers(2**63, size=GRAM_WORDS, dtype=np.uint64) * 2 + 1
_EMPTY = np.full(NUM_MINIMA, 2**32 - 1, dtype=np.uint32)


def fingerprint(text: str) -> int:
    """A 64-bit hash of the text, never 0; among a million texts a collision has probability 3e-8."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) or 1


def normalise(text: str) -> str:
    """The text without case, punctuation and differences in white space; symbols (+, =, €) carry meaning and stay."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().translate(_punctuation()).split())


@cache
def _punctuation() -> dict[int, str]:
    return {number: " " for number in range(0x10000) if unicodedata.category(chr(number)).startswith("P")}


def sketches(texts: Sequence[str]) -> np.ndarray:
    """[texts, NUM_MINIMA] MinHash minima (Broder 1997) of each normalised text's word 5-grams, uint32.

    A shorter text is one gram; a text without words has the largest minima.
    """
    grams = [_grams(text) for text in texts]
    ends = np.cumsum([len(each) for each in grams])
    minima = np.full((len(texts), NUM_MINIMA), _EMPTY)
    hashed, start = np.concatenate([*grams, np.zeros(0, np.uint64)]), 0
    while start < len(texts):  # as many texts at once as fit into a chunk, or one that is longer
        begin = ends[start] - len(grams[start])
        stop = max(int(np.searchsorted(ends, begin + CHUNK, side="right")), start + 1)
        _fill(minima[start:stop], hashed[begin : ends[stop - 1]], [len(each) for each in grams[start:stop]])
        start = stop
    return minima


def _grams(normalised: str) -> np.ndarray:
    """The hashes of a text's word 5-grams, uint64."""
    words = np.array([zlib.crc32(word) for word in normalised.encode("utf-8", "surrogatepass").split()], np.uint64)
    width = min(GRAM_WORDS, len(words))
    count = len(words) - width + 1 if width else 0
    grams = np.zeros(count, np.uint64)
    for i in range(width):
        grams += words[i : i + count] * _GRAM_FACTORS[i]  # modulo 2**64
    return grams ^ (grams >> np.uint64(29))


def _fill(minima: np.ndarray, grams: np.ndarray, counts: Sequence[int]) -> None:
    """Writes the minima of some texts, whose grams stand behind one another, CHUNK of them at a time."""
    starts = np.cumsum([0, *counts[:-1]])
    filled = np.flatnonzero(counts)
    for begin in range(0, len(grams), CHUNK):
        part = grams[begin : begin + CHUNK]
        hashes = (np.outer(_FACTORS, part) + _OFFSETS[:, None]) >> np.uint64(32)  # [minima, grams], modulo 2**64
        if len(filled) == 1:
            minima[filled[0]] = np.minimum(minima[filled[0]], hashes.min(axis=1).astype(np.uint32))
        else:
            minima[filled] = np.minimum.reduceat(hashes, starts[filled], axis=1).T.astype(np.uint32)


def first_equal(hashes: np.ndarray) -> np.ndarray:
    """For each item, the index of the first item with the same hash, which may be its own."""
    order = np.argsort(hashes, kind="stable")
    begins = np.ones(len(order), dtype=bool)
    begins[1:] = hashes[order[1:]] != hashes[order[:-1]]
    group = np.maximum.accumulate(np.where(begins, np.arange(len(order)), 0))
    first = np.empty_like(order)
    first[order] = order[group]
    return first


def first_near(sketches: np.ndarray) -> np.ndarray:
    """For each row of [texts, NUM_MINIMA], the index of an earlier near-duplicate, or its own.

    A text is compared only with the first text of each of its bands, so of a chain of small changes some may be missed.
    """
    own = np.arange(len(sketches))
    nearest = own.copy()
    has_words = (sketches != _EMPTY).any(axis=1)
    for band in np.split(sketches.astype(np.uint64), NUM_BANDS, axis=1):
        first = first_equal((band * _GRAM_FACTORS[: band.shape[1]]).sum(axis=1, dtype=np.uint64))
        candidates = np.flatnonzero((first != own) & (nearest == own) & has_words)
        agreement = (sketches[candidates] == sketches[first[candidates]]).mean(axis=1)
        found = candidates[agreement >= NEAR_SIMILARITY]
        nearest[found] = first[found]
    return nearest

"""How an answer is compared with its reference, and how sure a share of few answers is."""

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Z_95 = 1.959964  # of the normal distribution: 95 % lie within
_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
NUMBERS = {word: str(number) for number, word in enumerate(_WORDS)}
_WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True)
class Score:
    """An answer beside its reference."""

    exact: bool  # the texts are equal
    normalised_exact: bool  # they are, but for case, punctuation, articles and white space
    contained: bool  # the normalised reference stands in the normalised answer, also if a number is spelled otherwise
    f1: float  # of their words, after the same normalisation


def score(answer: str, reference: str) -> Score:
    """The answer's score."""
    found, wanted = normalised(answer), normalised(reference)
    contained = f" {_in_digits(wanted)} " in f" {_in_digits(found)} "
    return Score(answer == reference, found == wanted, contained, token_f1(answer, reference))


def _in_digits(text: str) -> str:
    """Normalised text with English numbers up to twelve as digits: "7 days" is an answer to what wants "seven"."""
    return " ".join(NUMBERS.get(word, word) for word in text.split())


def normalised(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, one space between words.

    As SQuAD's evaluation script does (Rajpurkar et al. 2016, evaluate-v1.1.py, normalize_answer).
    """
    without = re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_WITHOUT_PUNCTUATION))
    return " ".join(without.split())


def token_f1(answer: str, reference: str) -> float:
    """Harmonic mean of precision and recall over the normalised words, as a bag; 1 where both have none.

    Rajpurkar et al. 2016; with no words on one side as in SQuAD 2.0. Text without spaces is one word.
    """
    found, wanted = Counter(normalised(answer).split()), Counter(normalised(reference).split())
    if not found or not wanted:
        return float(found == wanted)
    shared = (found & wanted).total()
    return 2 * shared / (found.total() + wanted.total())


def wilson(count: int, total: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson 1927), which stays within [0, 1] and is honest where `total` is small."""
    if not total:
        return 0.0, 1.0
    share, square = count / total, Z_95**2
    centre = share + square / (2 * total)
    half = Z_95 * math.sqrt(share * (1 - share) / total + square / (4 * total**2))
    scale = 1 + square / total
    return max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def rate(flags: Sequence[bool]) -> dict[str, Any]:
    """How many are true, of how many, with the share's 95 % interval, as compare.json has it."""
    count, total = sum(flags), len(flags)
    low, high = wilson(count, total)
    return {"count": count, "total": total, "share": count / total if total else None, "low": low, "high": high}

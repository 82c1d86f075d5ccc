"""Answers against references, and intervals of shares."""

import pytest

from train.deliver.scores import normalised, rate, score, token_f1, wilson


def test_an_exact_answer_scores_in_full() -> None:
    """A text equal to its reference is exact in both ways, with F1 1; one that differs in case and articles is not."""
    same = score("A bolt.", "A bolt.")
    assert (same.exact, same.normalised_exact, same.f1) == (True, True, 1.0)
    near = score("the  BOLT", "A bolt.")
    assert (near.exact, near.normalised_exact, near.f1) == (False, True, 1.0)
    other = score("a nut", "A bolt.")
    assert (other.exact, other.normalised_exact, other.f1) == (False, False, 0.0)


def test_an_answer_contains_its_reference_in_whole_words() -> None:
    """Among others, but for case and punctuation; not as a part of a word, nor in pieces."""
    for answer, reference, wanted in (
        ("The capital of France is Paris.", "paris", True),
        ("Red, green, and blue.", "Red, green and blue", True),
        ("Parisian", "Paris", False),
        ("red and blue", "red blue", False),
        ("", "Paris", False),
        ("A bolt.", "the bolt", True),
    ):
        assert score(answer, reference).contained == wanted, (answer, reference)


def test_numbers_in_words_and_digits() -> None:
    """Both say the same; inside a longer number or word neither does."""
    assert score("A week has 7 days.", "Seven").contained
    assert score("There are twelve.", "12").contained
    assert not score("It has 17 days.", "Seven").contained
    assert not score("Seventeen", "7").contained


def test_normalisation_is_squad_s() -> None:
    """Case, ASCII punctuation, articles as whole words and white space go; everything else stays."""
    assert normalised("The cat's  (best)\tan-other, Anna: 1,000!") == "cats best another anna 1000"
    assert normalised("a") == ""


@pytest.mark.parametrize(
    ("answer", "reference", "wanted"),
    [
        ("red and green", "red green blue", 2 * 2 / (3 + 3)),  # by hand: 2 shared words of 3 and 3
        ("red red red", "red", 2 * 1 / (3 + 1)),  # a word counts as often as both have it
        ("", "", 1.0),
        ("the", "", 1.0),
        ("", "red", 0.0),
    ],
)
def test_f1_counts_shared_words(answer: str, reference: str, wanted: float) -> None:
    """F1 is that of two bags of words, whichever of them is the reference."""
    assert token_f1(answer, reference) == token_f1(reference, answer) == pytest.approx(wanted)


def test_wilson_solves_its_equation() -> None:
    """Each bound p lies where (share - p)^2 = z^2 p (1 - p) / n, on its side of the share and within [0, 1]."""
    for total in (1, 2, 10, 32, 500):
        for count in {0, 1, total // 2, total}:
            low, high = wilson(count, total)
            share = count / total
            assert 0 <= low <= share + 1e-12
            assert share - 1e-12 <= high <= 1
            for bound in (low, high):
                square = 1.959964**2 * bound * (1 - bound) / total
                assert (share - bound) ** 2 == pytest.approx(square, abs=1e-9)
    assert wilson(0, 0) == (0.0, 1.0)


def test_a_rate_says_of_how_many() -> None:
    """A share stands beside its counts and its interval; of nothing there is none."""
    found = rate([True, False, False, False])
    assert (found["count"], found["total"], found["share"]) == (1, 4, 0.25)
    assert (found["low"], found["high"]) == wilson(1, 4)
    assert rate([])["share"] is None

"""Settings of sampling: what is taken, and what is refused."""

import pytest

from train.deliver.sampling import RANGES, Sampling


def test_values_are_taken_by_name() -> None:
    """Each setting is replaced by its name, in either spelling; the default is greedy."""
    found = Sampling()
    assert found.is_greedy
    texts = {"temperature": "0.7", "top-p": "0.9", "top_k": "40", "repetition-penalty": "1.2", "seed": "3"}
    for name, text in {**texts, "max_new_tokens": "9"}.items():
        found = found.with_value(name, text)
    assert found == Sampling(0.7, 0.9, 40, 1.2, 9, 3)
    settings = found.settings(5, [1, 2], 0)
    assert (settings.do_sample, settings.temperature, settings.top_p, settings.top_k) == (True, 0.7, 0.9, 40)
    assert (settings.max_new_tokens, settings.eos_token_id, settings.repetition_penalty) == (5, [1, 2], 1.2)
    assert Sampling().settings(5, [1], 0).do_sample is False


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("temperature", "-1", RANGES["temperature"]),
        ("temperature", "nan", RANGES["temperature"]),
        ("temperature", "inf", RANGES["temperature"]),
        ("temperature", "warm", "must be a number"),
        ("top_p", "0", RANGES["top_p"]),
        ("top_p", "1.1", RANGES["top_p"]),
        ("top_k", "1.5", "must be an integer"),
        ("top_k", "-1", RANGES["top_k"]),
        ("repetition_penalty", "0", RANGES["repetition_penalty"]),
        ("max_new_tokens", "0", RANGES["max_new_tokens"]),
        ("seed", "-2", RANGES["seed"]),
        ("top", "1", "no setting; there are temperature, top_p"),
    ],
)
def test_impossible_values_are_refused(name: str, text: str, reason: str) -> None:
    """The message says what would work."""
    with pytest.raises(ValueError, match=name) as refused:
        Sampling().with_value(name, text)
    assert reason in str(refused.value)

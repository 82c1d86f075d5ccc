"""Which tokens of a conversation longer than data.max_length each policy keeps."""

from typing import Any, get_args, get_type_hints

import pytest

from data_tools.samples import Sample
from data_tools.truncation import Policy, fit
from train.config import DataConfig

# the begin token 0, a prompt 1 2, an answer 3 4 with end token 5, a prompt 6 7, an answer 8 9 10 with end token 11
IDS = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
TRAINED = [i in (3, 4, 5, 8, 9, 10, 11) for i in IDS]
SAMPLE = Sample("x:1", IDS, TRAINED)

CASES = [
    ("drop", 11, [], False),
    ("drop", 12, [(IDS, TRAINED)], False),
    ("left", 9, [([0, 4, 5, 6, 7, 8, 9, 10, 11], [False, *TRAINED[4:]])], True),
    ("left", 7, [([0, 6, 7, 8, 9, 10, 11], [False, *TRAINED[6:]])], False),
    ("left", 4, [([0, 9, 10, 11], [False, True, True, True])], True),
    ("right", 11, [(IDS[:6], TRAINED[:6])], True),
    ("right", 7, [(IDS[:6], TRAINED[:6])], True),
    ("right", 5, [], False),
    ("split", 7, [(IDS[:7], TRAINED[:7]), ([0, *IDS[7:]], [False, *TRAINED[7:]])], False),
    ("split", 5, [(IDS[:5], TRAINED[:5]), ([0, 5, 6, 7, 8], [False, True, False, False, True]),
                  ([0, 9, 10, 11], [False, True, True, True])], True),
]  # fmt: skip


@pytest.mark.parametrize(("policy", "max_length", "kept", "cut"), CASES, ids=lambda value: str(value)[:12])
def test_what_each_policy_keeps(policy: Policy, max_length: int, kept: list, cut: bool) -> None:
    """Ids, masks and `is_answer_cut` are as expected; the begin token stays first."""
    fitted = fit(SAMPLE, max_length, policy, begin=[0])
    assert [(sample.input_ids, sample.trained) for sample in fitted.samples] == kept
    assert fitted.is_answer_cut == cut


@pytest.mark.parametrize("policy", ["drop", "left", "right", "split"])
def test_samples_fit_and_keep_the_end_token(policy: Policy) -> None:
    """For every max_length, samples fit in it, and except with `split` the last trained token is an end token."""
    for max_length in range(2, 14):
        for sample in fit(SAMPLE, max_length, policy, begin=[0]).samples:
            assert len(sample.input_ids) <= max_length
            assert sample.num_supervised_tokens > 0
            if policy != "split":
                last_trained = max(i for i, on in enumerate(sample.trained) if on)
                assert sample.input_ids[last_trained] in (5, 11)


def test_an_unknown_policy_is_an_error() -> None:
    """An unknown policy raises ValueError; the configuration offers exactly the policies that exist."""
    wrong: Any = "middle"
    with pytest.raises(ValueError, match=r"data\.truncation 'middle': use drop, left, right or split"):
        fit(SAMPLE, 5, wrong, begin=[0])
    assert get_args(get_type_hints(DataConfig)["truncation"]) == get_args(Policy)


@pytest.mark.parametrize("max_length", [2, 3, 5, 7])
def test_without_begin_tokens_split_loses_no_token(max_length: int) -> None:
    """Nothing predicts the first token of a piece, so a masked one of the piece before it comes first."""
    fitted = fit(Sample("x", IDS, TRAINED, ("q",)), max_length, "split", [])
    assert all(len(sample.input_ids) <= max_length and not sample.trained[0] for sample in fitted.samples)
    pairs = [
        token
        for sample in fitted.samples
        for token, is_trained in zip(sample.input_ids, sample.trained, strict=True)
        if is_trained
    ]
    assert pairs == [token for token, is_trained in zip(IDS, TRAINED, strict=True) if is_trained]

"""The chunked loss is the plain one, in value and gradient."""

import pytest
import torch
import torch.nn.functional as F

from train import loss
from train.collate import collate, collate_packed

ROWS = [
    {"input_ids": [5, 6, 7, 8], "trained": [False, False, True, True]},
    {"input_ids": [1, 2], "trained": [False, True]},
    {"input_ids": [9, 3, 4], "trained": [True, False, False]},
]


@pytest.mark.parametrize("num_rows", [0, 1, 16, 50])
def test_summed_cross_entropy_is_torchs(num_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Value and gradient, with chunks of 16 rows: none, a part of one, exactly one, several with a rest."""
    monkeypatch.setattr(loss, "CHUNK_BYTES", 1)
    torch.manual_seed(0)
    weight = torch.randn(101, 32)
    targets = torch.randint(101, (num_rows,))
    ours, theirs = (
        torch.randn(num_rows, 32, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in "ab"
    )
    value = loss.summed_cross_entropy(ours, loss.Head(weight), targets)
    expected = F.cross_entropy(theirs @ weight.T, targets, reduction="sum")
    torch.testing.assert_close(value, expected)
    (value * 0.5).backward()
    (expected * 0.5).backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("cap", [0.0, 3.0])
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("has_bias", [False, True])
def test_heads_that_add_scale_and_cap(
    has_bias: bool, scale: float, cap: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Value and gradient of every combination, over several chunks, are those of torch's formula."""
    monkeypatch.setattr(loss, "CHUNK_BYTES", 1)
    torch.manual_seed(0)
    weight, targets = torch.randn(101, 32), torch.randint(101, (37,))
    bias = torch.randn(101) if has_bias else None
    hidden = torch.randn(37, 32)
    ours, theirs = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    value = loss.summed_cross_entropy(ours, loss.Head(weight, bias, scale, cap), targets)
    logits = scale * F.linear(theirs, weight, bias)
    logits = cap * torch.tanh(logits / cap) if cap else logits
    expected = F.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(value, expected)
    value.backward()
    expected.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_targets_are_found_by_position() -> None:
    """Hand-counted: padding may be any token, also one that is a target; a trained first token has no predictor."""
    for pad in (0, 8):
        batch = collate(ROWS, pad_token_id=pad)
        assert batch.input_ids.tolist() == [[5, 6, 7, 8], [1, 2, pad, pad], [9, 3, 4, pad]]
        assert batch.target_rows.tolist() == [1, 2, 4]
        assert batch.targets.tolist() == [7, 8, 2]
        assert batch.position_ids.tolist() == [[0, 1, 2, 3]] * 3


def test_packed_targets_are_found_by_position() -> None:
    """Hand-counted: rows stand behind one another, positions start again, no token is predicted across a border."""
    batch = collate_packed(ROWS)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 1, 2, 9, 3, 4]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 0, 1, 2]]
    assert batch.target_rows.tolist() == [1, 2, 4]
    assert batch.targets.tolist() == [7, 8, 2]

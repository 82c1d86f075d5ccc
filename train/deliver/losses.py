"""The loss per supervised token of the base and of the tuned model, on the same samples."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from train.collate import collate
from train.deliver.generation import in_batches
from train.models.language_model import LanguageModel

MAX_BATCH_TOKENS = 8192  # padded, in one forward pass


@dataclass(frozen=True)
class TokenLoss:
    """Cross entropy summed over supervised tokens, without and with the adapters."""

    before: float
    after: float
    num_tokens: int
    num_samples: int

    def as_json(self) -> dict[str, Any]:
        """The means per token and their difference beside the sums, as compare.json has them."""
        means = {"before": self.before / self.num_tokens, "after": self.after / self.num_tokens}
        sums = {"before_sum": self.before, "after_sum": self.after}
        counts = {"num_tokens": self.num_tokens, "num_samples": self.num_samples}
        return {**means, "difference": means["after"] - means["before"], **sums, **counts}


def losses_of(model: LanguageModel, samples: Sequence[dict[str, Any]], pad_token_id: int) -> TokenLoss:
    """The loss on at least one sample of `input_ids` and `trained`; by transformers, in padded batches.

    A batch that runs out of GPU memory is halved. Long samples come first, so that this happens at once.
    """

    @torch.no_grad()
    def both(batch: Sequence[dict[str, Any]]) -> tuple[float, float, int]:
        micro_batch = collate(batch, pad_token_id).to(model.head.weight.device)
        with model.without_adapters():
            before = float(model(micro_batch))
        return before, float(model(micro_batch)), len(micro_batch.targets)

    ordered = sorted(samples, key=lambda sample: -len(sample["input_ids"]))
    size = max(1, MAX_BATCH_TOKENS // len(ordered[0]["input_ids"]))
    sums = [0.0, 0.0, 0]
    with model.generating():
        for _, found in in_batches(ordered, both, lambda: False, size):
            sums = [total + part for total, part in zip(sums, found, strict=True)]
    return TokenLoss(sums[0], sums[1], int(sums[2]), len(ordered))

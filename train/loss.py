"""Cross entropy summed over the supervised tokens, without ever holding the logits of all of them."""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from train.engine.operations import cross_entropy

# Logits of one chunk in the compute type: 1,046 rows of Llama-3's vocabulary of 128,256 in bf16. Longer products are no
# faster on an H200. On a CPU, and without Triton, an fp32 copy of them and half as much again come on top.
CHUNK_BYTES = 2**28


@dataclass(frozen=True)
class Head:
    """The frozen layer that makes logits of hidden states: c tanh(s (h W^T + b) / c), or s (h W^T + b) without c."""

    weight: torch.Tensor  # W [V, H]
    bias: torch.Tensor | None = None  # b [V]
    scale: float = 1.0  # s (Cohere, Granite)
    cap: float = 0.0  # c, the soft cap (Gemma 2); 0: none

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[N, V] of hidden states [N, H]."""
        logits = F.linear(hidden, self.weight, self.bias)
        if self.scale != 1.0:
            logits *= self.scale
        return logits.div_(self.cap).tanh_().mul_(self.cap) if self.cap else logits


class _SummedCrossEntropy(torch.autograd.Function):
    """loss = sum_i logsumexp(l_i) - l_i[t_i] of logits l = Head.logits(h);   dloss/dh_i = dl_i W, where without a cap

    dl_i = s (softmax(l_i) - onehot(t_i)), and with one 1 - (l_i / c)^2 times that. The forward pass computes the
    gradient too, chunk by chunk, while it has the logits; W is frozen.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, head: Head, targets: torch.Tensor) -> torch.Tensor:
        weight = head.weight
        rows_per_chunk = max(16, CHUNK_BYTES // (weight.element_size() * weight.shape[0]))
        loss = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, hidden.shape[0], rows_per_chunk):
            rows = slice(start, start + rows_per_chunk)
            logits = head.logits(hidden[rows])  # [rows, V]
            slope = 1 - (logits.float() / head.cap).square_() if head.cap else None  # of the cap
            loss += cross_entropy(logits, targets[rows]).sum()
            if grad_hidden is not None:
                if slope is not None:
                    logits *= slope.to(logits.dtype)
                if head.scale != 1.0:
                    logits *= head.scale
                torch.mm(logits, weight, out=grad_hidden[rows])
            del logits, slope  # or two chunks would be in memory at once
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad_loss,) = grad_outputs
        (grad_hidden,) = ctx.saved_tensors
        return (grad_hidden.float() * grad_loss).to(grad_hidden.dtype), None, None


def summed_cross_entropy(hidden: torch.Tensor, head: Head, targets: torch.Tensor) -> torch.Tensor:
    """Sum over N rows of -log softmax(logits)[target], an fp32 scalar.

    hidden [N, H] and the frozen head have the compute type; targets [N] are token ids.
    """
    assert not head.weight.requires_grad, "the head must be frozen: no gradient is made for it"
    return _SummedCrossEntropy.apply(hidden, head, targets)

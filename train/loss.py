"""Cross entropy summed over the supervised tokens, without ever holding the logits of all of them."""

from typing import Any

import torch
import torch.nn.functional as F

from train.engine.operations import cross_entropy

# Logits of one chunk in the compute type: 1,046 rows of Llama-3's vocabulary of 128,256 in bf16. Longer products are no
# faster on an H200. On a CPU, and without Triton, an fp32 copy of them and half as much again come on top.
CHUNK_BYTES = 2**28


class _SummedCrossEntropy(torch.autograd.Function):
    """loss = sum_i logsumexp(h_i W^T) - (h_i W^T)[t_i];   dloss/dh_i = (softmax(h_i W^T) - onehot(t_i)) W.

    The forward pass computes the gradient too, chunk by chunk, while it has the logits; W is frozen.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        rows_per_chunk = max(16, CHUNK_BYTES // (weight.element_size() * weight.shape[0]))
        loss = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, hidden.shape[0], rows_per_chunk):
            rows = slice(start, start + rows_per_chunk)
            logits = F.linear(hidden[rows], weight)  # [rows, V]
            loss += cross_entropy(logits, targets[rows]).sum()
            if grad_hidden is not None:
                torch.mm(logits, weight, out=grad_hidden[rows])
            del logits  # or two chunks would be in memory at once
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (grad_loss,) = grad_outputs
        (grad_hidden,) = ctx.saved_tensors
        return (grad_hidden.float() * grad_loss).to(grad_hidden.dtype), None, None


def summed_cross_entropy(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Sum over N rows of -log softmax(hidden W^T)[target], an fp32 scalar.

    hidden [N, H] and the frozen head's weight [V, H] have the compute type; targets [N] are token ids.
    """
    assert not weight.requires_grad, "the head must be frozen: no gradient is made for it"
    return _SummedCrossEntropy.apply(hidden, weight, targets)

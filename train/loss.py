"""Cross entropy summed over the supervised tokens, without ever holding the logits of all of them."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F

from train.engine.layers import TrainedRows
from train.engine.operations import cross_entropy

# Logits of one chunk in the compute type: 1,046 rows of Llama-3's vocabulary of 128,256 in bf16. Longer products are no
# faster on an H200. On a CPU, and without Triton, an fp32 copy of them and half as much again come on top.
CHUNK_BYTES = 2**28


@dataclass(frozen=True)
class Head:
    """The layer that makes logits of hidden states: c tanh(s (h W^T + b) / c), or s (h W^T + b) without c.

    It is frozen, unless rows of W are trained, or the whole.
    """

    weight: torch.Tensor  # W [V, H], frozen; of a head that is trained whole its shape and type are read alone
    bias: torch.Tensor | None = None  # b [V]
    scale: float = 1.0  # s (Cohere, Granite)
    cap: float = 0.0  # c, the soft cap (Gemma 2); 0: none
    rows: TrainedRows | None = None  # in the place of W's
    whole: torch.nn.Parameter | None = None  # fp32 [V, H], in the place of W

    @property
    def trained(self) -> torch.nn.Parameter | None:
        """What of it is trained."""
        return self.rows.values if self.rows is not None else self.whole

    def matrix(self) -> torch.Tensor:
        """W in the compute type, but for trained rows."""
        return self.weight if self.whole is None else self.whole.detach().to(self.weight.dtype)

    def logits(self, hidden: torch.Tensor, matrix: torch.Tensor | None = None) -> torch.Tensor:
        """[N, V] of hidden states [N, H]; `matrix` is that of the method, where it has been made already."""
        hidden = hidden.to(self.weight.dtype)
        matrix = self.matrix() if matrix is None else matrix
        logits = _aligned(hidden, matrix.shape[0])
        for part in _parts(matrix):
            torch.mm(hidden, matrix[part].t(), out=logits[:, part])
        if self.bias is not None:
            logits += self.bias
        if self.rows is not None:
            bias = None if self.bias is None else self.bias[self.rows.ids]
            logits[:, self.rows.ids] = F.linear(hidden, self.rows.values.detach().to(hidden.dtype), bias)
        if self.scale != 1.0:
            logits *= self.scale
        return logits.div_(self.cap).tanh_().mul_(self.cap) if self.cap else logits


def _aligned(hidden: torch.Tensor, num_columns: int) -> torch.Tensor:
    """Room for [N, V], on a GPU in rows of whole 128 bytes.

    On a CPU without gaps: a bf16 product reads a column of the gap where V is odd, and multiplies it by 0 (torch 2.13).
    """
    width = -(-num_columns // 64) * 64 if hidden.is_cuda else num_columns
    return hidden.new_empty(hidden.shape[0], width)[:, :num_columns]


def _parts(matrix: torch.Tensor) -> list[slice]:
    """The rows of W [V, H]; on a GPU as a multiple of 64 and the rest.

    There a product over 49,159 columns takes 2.5 times as long as one over 49,152.
    """
    num_rows = matrix.shape[0]
    whole = num_rows // 64 * 64 if matrix.is_cuda and num_rows > 64 else num_rows
    return [part for part in (slice(0, whole), slice(whole, num_rows)) if part.stop > part.start]


def _times_matrix(grad_logits: torch.Tensor, matrix: torch.Tensor, out: torch.Tensor) -> None:
    """out [N, H] = dl W, of dl [N, V]."""
    first, *rest = _parts(matrix)
    torch.mm(grad_logits[:, first], matrix[first], out=out)
    for part in rest:
        out.addmm_(grad_logits[:, part], matrix[part])


class _SummedCrossEntropy(torch.autograd.Function):
    """loss = sum_i logsumexp(l_i) - l_i[t_i] of logits l = Head.logits(h);   dloss/dh_i = dl_i W, where without a cap

    dl_i = s (softmax(l_i) - onehot(t_i)), and with one 1 - (l_i / c)^2 times that. The forward pass computes the
    gradients too, chunk by chunk, while it has the logits: also dloss/dW = sum_i dl_i^T h_i of what is trained of W.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, head: Head, targets: torch.Tensor, trained: torch.Tensor | None
    ) -> torch.Tensor:
        weight = head.matrix()
        rows_per_chunk = max(16, CHUNK_BYTES // (weight.element_size() * weight.shape[0]))
        loss = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.empty_like(hidden) if any(ctx.needs_input_grad) else None
        ctx.grad_trained = torch.zeros_like(trained) if trained is not None and grad_hidden is not None else None
        for start in range(0, hidden.shape[0], rows_per_chunk):
            rows = slice(start, start + rows_per_chunk)
            logits = head.logits(hidden[rows], weight)  # [rows, V]
            slope = 1 - (logits.float() / head.cap).square_() if head.cap else None  # of the cap
            loss += cross_entropy(logits, targets[rows]).sum()
            if grad_hidden is not None:
                if slope is not None:
                    logits *= slope.to(logits.dtype)
                if head.scale != 1.0:
                    logits *= head.scale
                _add_gradients(head, weight, logits, hidden[rows], (grad_hidden[rows], ctx.grad_trained))
            del logits, slope  # or two chunks would be in memory at once
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden)
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor, None, None, torch.Tensor | None]:
        (grad_loss,) = grad_outputs
        (grad_hidden,) = ctx.saved_tensors
        grad_trained = None if ctx.grad_trained is None else ctx.grad_trained.mul_(grad_loss)
        return (grad_hidden.float() * grad_loss).to(grad_hidden.dtype), None, None, grad_trained


def _add_gradients(
    head: Head,
    weight: torch.Tensor,
    grad_logits: torch.Tensor,
    hidden: torch.Tensor,
    out: tuple[torch.Tensor, torch.Tensor | None],
) -> None:
    """From a chunk's dl [n, V]: dh [n, H] is written, and what is trained of W [k or V, H] added, in fp32."""
    grad_hidden, grad_trained = out
    if head.rows is not None and grad_trained is not None:
        of_rows = grad_logits[:, head.rows.ids]  # [n, k]
        grad_trained += of_rows.t().float() @ hidden.float()
        grad_logits[:, head.rows.ids] = 0  # of the frozen rows, which are not read
        _times_matrix(grad_logits, weight, grad_hidden)
        grad_hidden += of_rows @ head.rows.values.to(hidden.dtype)
        return
    if grad_trained is not None:
        is_half = hidden.dtype == torch.float16  # which a sum over rows exceeds
        grad_trained += grad_logits.t().float() @ hidden.float() if is_half else grad_logits.t() @ hidden
    _times_matrix(grad_logits, weight, grad_hidden)


def summed_cross_entropy(hidden: torch.Tensor, head: Head, targets: torch.Tensor) -> torch.Tensor:
    """Sum over N rows of -log softmax(logits)[target], an fp32 scalar.

    hidden [N, H] and the head's frozen matrix have the compute type; targets [N] are token ids.
    """
    assert not head.weight.requires_grad, "it must be frozen: no gradient is made for it, but for what is trained"
    if head.scale != 1.0 and math.frexp(head.scale)[0] == 0.5:  # a power of two scales what it multiplies as exactly
        hidden = hidden * head.scale
        head = replace(head, scale=1.0, bias=None if head.bias is None else head.bias * head.scale)
    return _SummedCrossEntropy.apply(hidden, head, targets, head.trained)

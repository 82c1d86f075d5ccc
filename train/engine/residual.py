"""How a half of a block, attention or MLP, reads the residual stream and adds to it."""

from dataclasses import dataclass

import torch

from train.engine.layers import Norm
from train.engine.operations import normalize, normalize_backward


@dataclass
class Branch:
    """What attention or the MLP made, before the norm behind it."""

    output: torch.Tensor  # [T, H]
    rstd: torch.Tensor  # [T]


@dataclass(frozen=True)
class Residual:
    """x + scale after(half(before(x))); either norm may be missing."""

    before: Norm | None
    after: Norm | None
    scale: float

    def read(self, x: torch.Tensor, out: torch.Tensor) -> torch.Tensor | None:
        """out [T, H] is what the half reads of x [T, H]; returns the norm's rstd [T], if there is one."""
        if self.before is None:
            out.copy_(x)
            return None
        return normalize(x, self.before, out)

    def add(self, output: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, Branch | None]:
        """The sum [T, H] of x and the half's output; and, where a norm is behind it, what its backward reads.

        Without such a norm `output` becomes the sum.
        """
        branch = None
        if self.after is not None:
            normed = torch.empty_like(output)
            branch = Branch(output, normalize(output, self.after, normed))
            output = normed
        torch.add(x, output, alpha=self.scale, out=output)
        return output, branch

    def output_gradient(self, grad: torch.Tensor, branch: Branch | None, width: int, rank: int) -> torch.Tensor:
        """[T, H + R]: the gradient of the half's output, of that of the sum in grad, and adapters' columns.

        H is `width`, R `rank`. It is grad itself where nothing is between the two.
        """
        if self.after is None and self.scale == 1.0:
            return grad[:, : width + rank]
        found = grad.new_empty(grad.shape[0], width + rank)
        if self.after is None:
            torch.mul(grad[:, :width], self.scale, out=found[:, :width])
            return found
        assert branch is not None
        normalize_backward(grad[:, :width], branch.output, self.after, branch.rstd, found[:, :width], add=False)
        if self.scale != 1.0:
            found[:, :width] *= self.scale
        return found

    def read_backward(
        self, grad_read: torch.Tensor, x: torch.Tensor, rstd: torch.Tensor | None, grad: torch.Tensor
    ) -> None:
        """Adds to grad [T, H], of x, what comes back from what was read of it."""
        if self.before is None:
            grad += grad_read
        else:
            assert rstd is not None
            normalize_backward(grad_read, x, self.before, rstd, grad, add=True)

"""The input embedding in host memory: a step reads a few thousand of its rows, and 1 GB of the GPU is free."""

import torch

from train.engine.copies import page_locked
from train.engine.layers import CausalLM
from train.engine.operations import gather_rows


class HostEmbedding(torch.nn.Module):
    """A frozen embedding [V, H] in page-locked host memory, whose rows the GPU fetches itself.

    8,192 rows of 8 KB take about 1.5 ms over PCIe 5, and the host waits for nothing. Without Triton it copies them.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        # transformers takes a model's type and device from its first parameter
        self.kind = torch.nn.Parameter(weight.new_zeros(1), requires_grad=False)
        self.weight = page_locked(weight.shape, weight.dtype).copy_(weight.detach())

    @property
    def num_embeddings(self) -> int:
        """Rows."""
        return self.weight.shape[0]

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Rows [..., H] on the GPU of `input_ids` [...] there."""
        return gather_rows(self.weight, input_ids.flatten()).view(*input_ids.shape, -1)


def offload_embedding(causal_lm: CausalLM) -> None:
    """Moves the input embedding to host memory, where the head does not share it."""
    embedding = causal_lm.get_input_embeddings()
    is_tied = embedding.weight is causal_lm.get_output_embeddings().weight
    if embedding.weight.is_cuda and not is_tied:
        causal_lm.set_input_embeddings(HostEmbedding(embedding.weight))

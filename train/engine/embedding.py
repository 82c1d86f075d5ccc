"""The input embedding in host memory, which saves 1 GB of GPU memory: a step reads a few thousand of its rows."""

from typing import Any

import torch
import torch.nn.functional as F

from train.engine.layers import CausalLM, Vocabulary
from train.engine.machine_memory import HostMemory
from train.engine.operations import gather_rows


class HostEmbedding(torch.nn.Module):
    """A frozen embedding [V, H] in pinned host memory, whose rows the GPU reads itself.

    8,192 rows of 8 KB take about 1.5 ms over PCIe 5, without a host sync. Without Triton the host copies the rows.
    """

    def __init__(self, weight: torch.Tensor, memory: HostMemory, scale: torch.Tensor | None = None) -> None:
        """`scale`: what rows are multiplied by (Gemma)."""
        super().__init__()
        # transformers takes a model's type and device from its first parameter, which this is
        self.kind = torch.nn.Parameter(weight.new_zeros(1), requires_grad=False)
        (room,) = memory.buffers([weight.nbytes])
        self.weight = room.view(weight.dtype).view(weight.shape)
        if memory.writes(0):
            self.weight.copy_(weight.detach())
        self.scale = scale

    @property
    def num_embeddings(self) -> int:
        """V."""
        return self.weight.shape[0]

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`input_ids` [...] on the GPU -> rows [..., H] there."""
        rows = gather_rows(self.weight, input_ids.flatten()).view(*input_ids.shape, -1)
        return rows if self.scale is None else rows * self.scale.to(rows.dtype)


class RowsInPlace:
    """An embedding of which some rows are trained, without the copy of the whole matrix that PEFT's layer makes in each
    forward pass."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        assert vocabulary.rows is not None
        self.frozen, self.values = vocabulary.layer, vocabulary.rows.values
        self.scale: Any = getattr(self.frozen, "embed_scale", None)
        ids = vocabulary.rows.ids
        # the trained row of each token, or -1
        self.places = torch.full((self.frozen.weight.shape[0],), -1, device=ids.device)
        self.places[ids] = torch.arange(len(ids), device=ids.device)
        padding = getattr(self.frozen, "padding_idx", None)  # whose row learns nothing by what is embedded
        self.padding = int(self.places[padding]) if padding in ids.tolist() else None

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`input_ids` [T] -> rows [T, H]."""
        frozen, places = self.frozen(input_ids), self.places[input_ids]
        trained = F.embedding(places.clamp(min=0), self.values, self.padding).to(frozen.dtype)
        if self.scale is not None:  # which the frozen layer has applied itself
            trained = trained * self.scale.to(frozen.dtype)
        return torch.where((places >= 0)[:, None], trained, frozen)


def offload_embedding(causal_lm: CausalLM, memory: HostMemory) -> None:
    """Moves the input embedding to this host memory, unless the head shares it or it is not on a GPU."""
    embedding = causal_lm.get_input_embeddings()
    is_tied = embedding.weight is causal_lm.get_output_embeddings().weight
    if embedding.weight.is_cuda and not is_tied:
        scale: Any = getattr(embedding, "embed_scale", None)
        causal_lm.set_input_embeddings(HostEmbedding(embedding.weight, memory, scale))

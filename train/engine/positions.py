"""What depends on a token's position: rotary tables for each kind of layer, and a family's factor of queries."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch

from train.engine.layers import Decoder, DecoderLayer, Heads
from train.engine.operations import Rotation

Tables = Callable[..., tuple[torch.Tensor, torch.Tensor]]


class TableRow(Enum):
    """How a rotary table's row holds the frequencies of a head's pairs."""

    TWICE = auto()  # all of them, then all again
    IN_PAIRS = auto()  # each twice in a row
    ONCE = auto()


@dataclass(frozen=True)
class Positions:
    """Of one micro-batch, one tensor for all tables, so that a CUDA graph has one buffer for them."""

    values: torch.Tensor  # [T, C]: cos and sin of each kind of layer, then the factor of queries
    num_pairs: Mapping[str, int]  # P of each kind of layer's table, in the order of the tables
    has_query_factor: bool

    @property
    def query_factor(self) -> torch.Tensor | None:
        """[T, 1]."""
        return self.values[:, -1:] if self.has_query_factor else None

    def rotation(self, kind: str, size: int, is_interleaved: bool) -> Rotation:
        """Of heads of `size` elements in layers of this kind."""
        kinds, widths = list(self.num_pairs), [2 * num_pairs for num_pairs in self.num_pairs.values()]
        number = kinds.index(kind)
        start = sum(widths[:number])
        cos, sin = self.values[:, start : start + widths[number]].chunk(2, 1)
        return Rotation(cos, sin, size, is_interleaved)


class PositionTables:
    """Makes the Positions of micro-batches, by transformers' own rotary embedding."""

    def __init__(
        self,
        decoder: Decoder,
        layers: Sequence[DecoderLayer],
        row: TableRow,
        query_factor: Callable[[torch.Tensor], torch.Tensor] | None,
    ) -> None:
        self.rotary_emb: Tables = decoder.rotary_emb
        self.has_sections = hasattr(
            decoder.rotary_emb, "mrope_section"
        )  # positions in three dimensions, equal for text
        rotary = {layer.heads.rotary for layer in layers if isinstance(layer.heads, Heads)}
        self.kinds = sorted(kind for kind in rotary if kind is not None)
        self.row = row
        self.query_factor = query_factor

    def __call__(self, like: torch.Tensor, position_ids: torch.Tensor) -> Positions:
        """For position_ids [1, T]; transformers' tables read type and device of `like`."""
        columns: list[Any] = []
        num_pairs = {}
        places = position_ids[None] if self.has_sections else position_ids
        for kind in self.kinds:
            for table in self.rotary_emb(like[None], places, *([kind] if kind else [])):  # [1, T, 2 P], or [1, T, P]
                num_pairs[kind] = table.shape[2] // (1 if self.row is TableRow.ONCE else 2)
                is_paired = self.row is TableRow.IN_PAIRS
                columns.append(table[0, :, ::2] if is_paired else table[0, :, : num_pairs[kind]])
        if self.query_factor is not None:
            columns.append(self.query_factor(position_ids[0])[:, None].to(columns[0].dtype if columns else like.dtype))
        values = torch.cat(columns, 1) if columns else like.new_empty(position_ids.shape[1], 0)
        return Positions(values, num_pairs, self.query_factor is not None)

"""Linear attention by the gated delta rule as transformers' layers hold it: names of modules, and what they compute."""

import sys
from dataclasses import dataclass
from typing import Any

from train.engine.delta_rule import torch_code
from train.engine.layers import DeltaHeads
from train.engine.linears import Projection

KIND = "linear_attention"  # what configurations call such a layer


@dataclass(frozen=True)
class DeltaNet:
    """The names of modules; the defaults are Qwen3.5's."""

    attention: str = "linear_attn"  # of a layer
    projections: tuple[str, ...] = (
        "in_proj_qkv",
        "in_proj_z",
        "in_proj_b",
        "in_proj_a",
    )  # as delta_rule.mix reads them
    o: str = "out_proj"

    def parts(self, layer: Any) -> tuple[list[Projection], Projection, DeltaHeads] | None:
        """Projections, out_proj and the rest of a layer's linear attention; None where it has none."""
        if not hasattr(layer, self.attention):
            return None
        attention: Any = getattr(layer, self.attention)
        code: Any = sys.modules[type(attention).__module__]
        heads = DeltaHeads(
            num_key=attention.num_k_heads,
            num_value=attention.num_v_heads,
            key_size=attention.head_k_dim,
            value_size=attention.head_v_dim,
            weight=attention.conv1d.weight.squeeze(1),
            bias=attention.conv1d.bias,
            activation=attention.activation,
            log_decay=attention.A_log,
            gate_bias=attention.dt_bias,
            norm=attention.norm,
            rule=torch_code(code.torch_chunk_gated_delta_rule),
            convolve=torch_code(code.causal_conv1d_fn),
        )
        projections = [Projection.of(getattr(attention, name)) for name in self.projections]
        return projections, Projection.of(getattr(attention, self.o)), heads

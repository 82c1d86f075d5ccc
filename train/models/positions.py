"""Whether a base can take more positions than its config.json says (model.max_positions)."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from train.config import ModelConfig
from train.models.base import skeleton
from train.models.shape import POSITIONS, max_positions, model_shape, text_shape
from train.run.exits import ExitCode, ExitWith

EXACT = 2**24  # rotary angles are products of positions in fp32, which has every whole number up to here


def check_positions(config: ModelConfig) -> None:
    """Raises ExitWith(BAD_INPUT) where model.max_positions is not more than the base's own, or changes what it
    computes of shorter texts.

    Plain rotary embeddings, `linear`, `llama3` and `proportional` scaling, and `yarn` and `longrope` with a factor of
    their own, have frequencies that do not depend on it: longer texts are rotated on by the same ones. `dynamic`
    scaling begins at it, and `yarn` and `longrope` without a factor take their scale from it.
    """
    if not config.max_positions:
        return
    if config.max_positions > EXACT:
        raise _refused(config, f"positions are told apart up to {EXACT:,}; take no more")
    plain = replace(config, max_positions=0)
    own, name = max_positions(plain), config.name_or_path
    if not own:
        raise _refused(config, f"{name}: config.json names no {POSITIONS}, so there is no limit; leave it out")
    if own >= config.max_positions:
        raise _refused(config, f"{name} takes {own} already; leave it out (--data.max_length limits samples)")
    before, after = text_shape(model_shape(plain)), text_shape(model_shape(config))
    for kind in _kinds(before):
        if any(_differ(kind, before, after, length) for length in (None, config.max_positions)):
            reason = f"{name}: its rotary scaling ({kind[0]}) depends on {POSITIONS}, so that shorter texts would be"
            raise _refused(config, f"{reason} read otherwise, too; take a base that was made for longer ones")
    tables = {key: parameter.shape for key, parameter in skeleton(plain, torch.float32).named_parameters()}
    for key, parameter in skeleton(config, torch.float32).named_parameters():
        if parameter.shape != tables.get(key):
            raise _refused(config, f"{name}: its positions are a learned table ({key}) of {own}, which has no more")


def _kinds(shape: Any) -> Iterator[tuple[str, str | None]]:
    """The rotary scalings with frequencies of their own, each with the kind of layer that it belongs to, or None."""
    rope = getattr(shape, "rope_parameters", None) or {}
    nested = {layer: value for layer, value in rope.items() if isinstance(value, dict)}
    for layer, value in nested.items() or [(None, rope)]:
        if value.get("rope_type") in ROPE_INIT_FUNCTIONS:
            yield value["rope_type"], layer


def _differ(kind: tuple[str, str | None], before: Any, after: Any, length: int | None) -> bool:
    """Whether a text of `length` tokens, or one of any, has other frequencies or another scale of attention."""
    cpu = torch.device("cpu")
    (old, old_scale), (new, new_scale) = (
        ROPE_INIT_FUNCTIONS[kind[0]](shape, cpu, seq_len=length, layer_type=kind[1]) for shape in (before, after)
    )
    return old_scale != new_scale or not torch.equal(old, new)


def _refused(config: ModelConfig, reason: str) -> ExitWith:
    return ExitWith(ExitCode.BAD_INPUT, f"--model.max_positions {config.max_positions}: {reason}")

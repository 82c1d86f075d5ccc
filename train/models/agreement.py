"""Before the first step: what we compute ourselves is compared with transformers, whole, on a sample of the run.

A family's table or a head's formula that is a little wrong trains another model, and no loss curve shows it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from train.collate import MicroBatch, collate_packed
from train.engine.block import ForwardContext
from train.engine.decoder import FusedDecoder
from train.models.language_model import LanguageModel
from train.run.exits import ExitCode, ExitWith

MAX_TOKENS = 256  # of the sample that is compared: blocks and head cost little then
MAX_HEAD_ROWS = 64  # logits that are compared
# Share of a block's own contribution by which its output may differ, by type. Measured: docs/LOG.md, 2026-11-26.
BLOCK_TOLERANCE = {torch.float32: 5e-4, torch.float16: 0.004, torch.bfloat16: 0.02}
HEAD_ULPS = 4  # of a logit and of the mean logit
PACKING_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.01, torch.bfloat16: 0.05}


@dataclass
class _Seen:
    """What went in and out of transformers' modules in one forward pass, in host memory."""

    inputs: list[torch.Tensor] = field(default_factory=list)  # [T, H] of each block
    outputs: list[torch.Tensor] = field(default_factory=list)
    hidden: torch.Tensor | None = None  # [T, H], what the head reads


@torch.no_grad()
def check_agreement(model: LanguageModel, name: str, ids: Sequence[int]) -> None:
    """Compares the head, and on the fused engine every block, on one sample; adapters get random values meanwhile.

    Raises ExitWith(BAD_INPUT) where they differ by more than rounding.
    """
    ids = list(ids)[:MAX_TOKENS]
    ids = ids if len(ids) > 1 else [*ids, 0]
    batch = collate_packed([{"input_ids": ids, "trained": [True] * len(ids)}]).to(model.causal_lm.device)
    with _random_adapters(model):
        seen, logits = _by_transformers(model, batch)
        _check_head(model, name, seen, logits)
        if model.engine is not None:
            model.eval()
            _check_blocks(model.engine, name, batch, seen)
            model.train()


@torch.no_grad()
def check_packing(model: LanguageModel, name: str, ids: Sequence[int]) -> None:
    """Raises ExitWith(BAD_INPUT) where, on the reference engine, a packed sample sees the one before it.

    Attention ends at sequence boundaries; a recurrent or convolutional layer may carry its state across them.
    """
    second = list(ids)[: MAX_TOKENS // 2]
    second = second if len(second) > 1 else [*second, 0]
    vocabulary = model.causal_lm.get_input_embeddings().num_embeddings
    firsts = [second[::-1], [(token * 7919 + 1) % vocabulary for token in second]]

    def hidden(*samples: list[int]) -> torch.Tensor:
        rows = [{"input_ids": sample, "trained": [True] * len(sample)} for sample in samples]
        batch = collate_packed(rows).to(model.causal_lm.device)
        return model.reference_hidden(batch)[-len(second) :].float()

    model.eval()
    try:
        alone = hidden(second)
        difference = max(_relative(hidden(first, second), alone) for first in firsts)
        reason = f"hidden states differ by {difference:.1%}"
        is_isolated = difference <= PACKING_TOLERANCE[model.compute_dtype]
    except (ValueError, NotImplementedError) as error:  # transformers' own refusal
        is_isolated, reason = False, str(error).strip().partition("\n")[0]
    model.train()
    if not is_isolated:
        raise ExitWith(
            ExitCode.BAD_INPUT,
            f"--data.packing true: a layer of {name} carries its state from one packed sample to the next ({reason}); "
            "leave packing off: --data.group_by_length true saves padding",
        )


def _by_transformers(model: LanguageModel, batch: MicroBatch) -> tuple[_Seen, torch.Tensor]:
    """What transformers' modules see, and the first logits [t, V]."""
    seen = _Seen()
    causal_lm: Any = model.causal_lm
    hooks = [causal_lm.base_model.register_forward_hook(lambda _, __, out: setattr(seen, "hidden", out[0][0]))]
    if model.engine is not None:
        for layer in model.engine.layers:
            hooks.append(layer.module.register_forward_pre_hook(_keeper(seen.inputs), with_kwargs=True))
            hooks.append(layer.module.register_forward_hook(lambda _, __, out: seen.outputs.append(_first(out))))
    try:
        with model.generating():
            out = causal_lm(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return seen, out.logits[0][-MAX_HEAD_ROWS:]


def _keeper(kept: list[torch.Tensor]) -> Any:
    def keep(_: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        kept.append(_first(args or (kwargs["hidden_states"],)))

    return keep


def _first(out: Any) -> torch.Tensor:
    """The hidden states [T, H] of a layer's input or output, in host memory."""
    tensor = out if isinstance(out, torch.Tensor) else out[0]
    return tensor[0].to("cpu", copy=True)


def _check_head(model: LanguageModel, name: str, seen: _Seen, logits: torch.Tensor) -> None:
    assert seen.hidden is not None
    ours, theirs = model.head.logits(seen.hidden[-MAX_HEAD_ROWS:]).float(), logits.float()
    epsilon = max(HEAD_ULPS * torch.finfo(logits.dtype).eps, 1e-5)
    allowed = epsilon * (theirs.abs() + theirs.abs().mean())
    wrong = (ours - theirs).abs() > allowed
    if wrong.any() or not ours.isfinite().all():
        share = (ours - theirs).norm() / theirs.norm()
        raise ExitWith(
            ExitCode.BAD_INPUT,
            f"{name}: {wrong.float().mean():.1%} of the logits that our head makes differ from transformers', by "
            f"{share:.2%} altogether: its head does more than multiply, add a bias, scale and cap. It is not trained",
        )


def _check_blocks(engine: FusedDecoder, name: str, batch: MicroBatch, seen: _Seen) -> None:
    stack = engine.stack
    context = engine.context(batch)  # without dropout: the model is in evaluation mode
    stack.store.invalidate_adapters()
    stack.store.begin(stack.forward_order)
    for block, x, theirs in zip(stack.blocks, seen.inputs, seen.outputs, strict=True):
        difference = _block_difference(engine, block.number, x, theirs, context)
        if not difference <= BLOCK_TOLERANCE[x.dtype]:  # also NaN
            engine.release()
            raise ExitWith(
                ExitCode.BAD_INPUT,
                f"{name}: block {block.number} on the fused engine differs from transformers' by {difference:.1%} of "
                "what it adds; this is not rounding. Train with --engine.kind reference",
            )
    engine.release()


def _block_difference(
    engine: FusedDecoder, number: int, x: torch.Tensor, theirs: torch.Tensor, context: ForwardContext
) -> float:
    """Norm of the difference beyond the rounding of each sum, as a share of the norm of what the block adds."""
    block, store = engine.stack.blocks[number], engine.stack.store
    matrices = store.matrices(number)
    own = x.to(store.like.device)
    ours, _ = block.finish(matrices, block.forward(matrices, own, context), context)
    ours, theirs, x = (each.to("cpu").float() for each in (ours, theirs, x))
    rounding = torch.finfo(own.dtype).eps * theirs.abs()  # of the sum, which a few large elements would else dominate
    beyond = ((ours - theirs).abs() - rounding).clamp(min=0)
    return float(beyond.norm() / (theirs - x).norm())


def _relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


@contextmanager
def _random_adapters(model: LanguageModel) -> Iterator[None]:
    """While entered, the adapters' B are not zero, or their part of the computation would be compared with nothing."""
    generator = torch.Generator().manual_seed(0)
    zeros = [p for name, p in model.trainable().items() if name.endswith("lora_B.weight")]
    for parameter in zeros:
        values = torch.randn(parameter.shape, generator=generator) * 0.05 / parameter.shape[1] ** 0.5
        parameter.data.copy_(values)
    try:
        yield
    finally:
        for parameter in zeros:
            parameter.data.zero_()

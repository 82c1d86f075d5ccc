"""Before the first step: what we compute ourselves is compared with transformers, whole, on a sample of the run.

A family's table or a head's formula that is a little wrong trains another model, and no loss curve shows it.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import torch
import transformers

from train.collate import MicroBatch, collate_packed
from train.engine.block import Block
from train.engine.context import ForwardContext
from train.engine.decoder import FusedDecoder
from train.engine.linears import ADAPTER
from train.engine.lora_linear import Pass
from train.engine.mixture import Mixture
from train.engine.operations import normalize
from train.loss import Head
from train.models.adapters import is_adapted_layer
from train.models.language_model import LanguageModel
from train.models.parameters import values_in
from train.models.shape import BROKEN, told
from train.models.stored import named
from train.run.exits import ExitCode, ExitWith

MAX_TOKENS = 256  # of the sample that is compared: blocks and head cost little then
FEW_TOKENS = 16  # of a backward pass: 0.6 GB are kept of a 70B
MAX_HEAD_ROWS = 64  # logits that are compared
# Share of a block's own contribution by which its output may differ, by type. Measured: docs/LOG.md, 2026-11-26.
BLOCK_TOLERANCE = {torch.float32: 5e-4, torch.float16: 0.004, torch.bfloat16: 0.02}
HEAD_ULPS = 4  # of a logit and of the mean logit
# Of hidden states that should not change at all; experts are products of other sizes then
CAUSAL_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.01, torch.bfloat16: 0.03}
INT8_TOLERANCE = 0.2  # LLM.int8 rounds a row by what is in the others


@dataclass
class _Seen:
    """What went in and out of transformers' modules in one forward pass."""

    inputs: list[torch.Tensor] = field(default_factory=list)  # [T, H] of each block, in host memory
    outputs: list[torch.Tensor] = field(default_factory=list)
    routed: list[Any] = field(default_factory=list)  # what a mixture's routers returned
    hidden: torch.Tensor | None = None  # [T, H], what the head reads in training
    logits: torch.Tensor | None = None  # [t, V], the last ones


@torch.no_grad()
def check_agreement(model: LanguageModel, name: str, ids: Sequence[int]) -> None:
    """Compares the head, and on the fused engine every block, on one sample; adapters get random values meanwhile.
    Layers whose adapters get no gradient are added to the notes on the base.

    Raises ExitWith(BAD_INPUT) where they differ by more than rounding, where transformers cannot run the base, and
    where its tokens see later ones: it would be trained on answers that it reads.
    """
    ids = list(ids)[:MAX_TOKENS]
    ids = ids if len(ids) > 1 else [*ids, 0]
    batch = collate_packed([{"input_ids": ids, "trained": [True] * len(ids)}]).to(model.causal_lm.device)
    with random_adapters(model):
        try:
            seen = _by_transformers(model, batch)
            _check_causal(model, name, batch, seen)
            if model.engine is None:  # some bases ask for more in training
                model.about.notes.extend(_idle_adapters(model, ids[:FEW_TOKENS]))
        except torch.OutOfMemoryError:
            raise
        except BROKEN as error:
            version, what = transformers.__version__, f"{type(error).__name__}: {told(error)}"
            reason = f"{name}: transformers {version} cannot run this base ({what})"
            if model.about.held.quantized:  # it may compute with weights that are codes now, as Gemma 3n
                reason += "; --model.quantization none may train it"
            raise ExitWith(ExitCode.BAD_INPUT, reason) from error
        _check_finite(model, name, seen)
        _choose_head(model, name, seen)
        if model.engine is not None:
            model.eval()
            _check_blocks(model.engine, name, batch, seen)
            model.train()


def _by_transformers(model: LanguageModel, batch: MicroBatch) -> _Seen:
    """What transformers computes of one sample, and what its blocks see of it."""
    seen, hooks = _Seen(), []
    if model.engine is not None:
        for layer in model.engine.layers:
            hooks.append(layer.module.register_forward_pre_hook(_keeper(seen.inputs), with_kwargs=True))
            hooks.append(layer.module.register_forward_hook(lambda _, __, out: seen.outputs.append(_first(out))))
            if isinstance(layer.router, torch.nn.Module):
                hooks.append(layer.router.register_forward_hook(lambda _, __, out: seen.routed.append(out)))
    try:
        with model.generating():
            seen.hidden = model.reference.eager(alone(batch))
            for hook in hooks:  # once is enough
                hook.remove()
            logits = model.causal_lm(input_ids=batch.input_ids, use_cache=False).logits
            seen.logits = logits[0][-MAX_HEAD_ROWS:]
    finally:
        for hook in hooks:
            hook.remove()
    return seen


def _idle_adapters(model: LanguageModel, ids: Sequence[int]) -> list[str]:
    """A note on adapted layers that get no gradient in training: a BART decoder's for what an encoder says are never
    called, what an indexer says only chooses what is attended to, and some layers take longer samples.

    Of numbered ones, as a mixture's experts, one that gets some speaks for all. Raises what transformers raises.
    """
    layers: dict[str, Any] = {n: each for n, each in model.causal_lm.named_modules() if is_adapted_layer(each)}
    weights = [module.lora_B[ADAPTER].weight for module in layers.values()]
    batch = alone(collate_packed([{"input_ids": list(ids), "trained": [True] * len(ids)}]).to(model.causal_lm.device))
    with torch.set_grad_enabled(bool(weights)):
        hidden = model.reference.eager(batch)
        found = torch.autograd.grad(hidden.float().sum(), weights, allow_unused=True) if weights else ()
    kinds = [re.sub(r"\.\d+(?=\.)", "", name) for name in layers]
    taught = {kind for kind, gradient in zip(kinds, found, strict=True) if gradient is not None}
    idle = [kind for kind in kinds if kind not in taught]
    what = f"of its layers with adapters got no gradient from {len(ids)} tokens and may learn nothing: "
    what += named(sorted(set(idle)))
    return [f"{len(idle)} {what}"] if idle else []


def alone(batch: MicroBatch) -> MicroBatch:
    """The one sample as a padded micro-batch, which it fills."""
    return replace(batch, cu_seqlens=None, max_length=0)


def _check_causal(model: LanguageModel, name: str, batch: MicroBatch, seen: _Seen) -> None:
    """Raises ExitWith(BAD_INPUT) where the first half's hidden states change with the tokens of the second."""
    assert seen.hidden is not None
    half = batch.input_ids.shape[1] // 2
    other = batch.input_ids.clone()
    other[:, half:] = other[:, half:].flip(1) * 7919 % model.head.weight.shape[0]
    with model.generating():
        hidden = model.reference.eager(replace(alone(batch), input_ids=other))
    difference = relative(hidden[:half].float(), seen.hidden[:half].float())
    is_int8 = "LLM.int8" in model.about.held.quantized
    if difference > (INT8_TOLERANCE if is_int8 else CAUSAL_TOLERANCE[model.compute_dtype]):
        raise ExitWith(
            ExitCode.BAD_INPUT,
            f"{name}: its tokens see later ones (hidden states change by {difference:.1%} with what follows), so it "
            "would be trained on answers that it reads; it is no causal language model by its config.json",
        )


def _check_finite(model: LanguageModel, name: str, seen: _Seen) -> None:
    """Raises ExitWith(BAD_INPUT) where there is NaN or infinity, also in rows that this sample does not touch."""
    assert seen.logits is not None
    broken = [
        each.replace(".base_layer", "").removeprefix("base_model.model.")
        for each, parameter in model.adapted.named_parameters()
        if not all(part.isfinite().all() for part in values_in(parameter))
    ]
    if broken or not seen.logits.isfinite().all():
        reason = f"it computes NaN or infinity in {model.compute_dtype}; try another --model.dtype"
        if broken:
            reason = f"{len(broken)} of its weights hold NaN or infinity: {', '.join(broken[:3])}"
        raise ExitWith(ExitCode.BAD_INPUT, f"{name}: {reason}")


def _keeper(kept: list[torch.Tensor]) -> Any:
    def keep(_: torch.nn.Module, args: tuple, kwargs: dict) -> None:
        kept.append(_first(args or (kwargs["hidden_states"],)))

    return keep


def _first(out: Any) -> torch.Tensor:
    """The hidden states [T, H] of a layer's input or output, in host memory."""
    tensor = out if isinstance(out, torch.Tensor) else out[0]
    return tensor[0].to("cpu", copy=True)


def _choose_head(model: LanguageModel, name: str, seen: _Seen) -> None:
    """Takes the formula that gives transformers' logits: that of config.json, or where that sets what its architecture
    does not read, without its cap, its scale or both. Raises ExitWith(BAD_INPUT) where none does.
    """
    head, shares = model.head, []
    for cap, scale in product(dict.fromkeys((head.cap, 0.0)), dict.fromkeys((head.scale, 1.0))):
        candidate = replace(head, scale=scale, cap=cap)
        wrong, share = _head_difference(candidate, seen)
        if not wrong:
            model.head = candidate
            return
        shares.append((wrong, share))
    wrong, share = shares[0]
    raise ExitWith(
        ExitCode.BAD_INPUT,
        f"{name}: {wrong:.1%} of the logits that our head makes differ from transformers', by {share:.2%} altogether: "
        "its head does more than multiply, add a bias, scale and cap. It is not trained",
    )


def _head_difference(head: Head, seen: _Seen) -> tuple[float, float]:
    """(share of the logits that differ by more than rounding, norm of the difference as a share)."""
    assert seen.hidden is not None
    assert seen.logits is not None
    if seen.hidden.shape[1] != head.weight.shape[1]:  # RemBERT's reads what another layer makes of them
        return 1.0, 1.0
    ours, theirs = head.logits(seen.hidden[-MAX_HEAD_ROWS:]).float(), seen.logits.float()
    epsilon = max(HEAD_ULPS * torch.finfo(seen.logits.dtype).eps, 1e-5)
    wrong = (ours - theirs).abs() > epsilon * (theirs.abs() + theirs.abs().mean())
    return float(wrong.float().mean()), float((ours - theirs).norm() / theirs.norm())


def _check_blocks(engine: FusedDecoder, name: str, batch: MicroBatch, seen: _Seen) -> None:
    stack = engine.stack
    context = engine.context(batch)  # without dropout: the model is in evaluation mode
    _check_ends(engine, name, batch, seen)
    stack.store.invalidate_adapters()
    stack.store.begin(stack.forward_order)
    for block, x, theirs in zip(stack.blocks, seen.inputs, seen.outputs, strict=True):
        with _choosing(block, seen):
            difference = _block_difference(engine, block.number, x, theirs, context)
        if not difference <= BLOCK_TOLERANCE[x.dtype]:  # also NaN
            engine.release()
            raise ExitWith(
                ExitCode.BAD_INPUT,
                f"{name}: block {block.number} on the fused engine differs from transformers' by {difference:.1%} of "
                "what it adds; this is not rounding. Train with --engine.kind reference",
            )
    engine.release()


@contextmanager
def _choosing(block: Block, seen: _Seen) -> Iterator[None]:
    """While entered, a mixture takes the experts that transformers took: of two that are nearly as good, rounding
    decides which it is (2.8 % of what a block adds, of 128 experts with random weights)."""
    if not isinstance(block.mlp, Mixture):
        yield
        return
    router = block.mlp.router
    block.mlp.router = lambda _: seen.routed[block.number]
    try:
        yield
    finally:
        block.mlp.router = router


def _check_ends(engine: FusedDecoder, name: str, batch: MicroBatch, seen: _Seen) -> None:
    """What the first block reads, and the norm behind the last one."""
    assert seen.hidden is not None
    last = seen.outputs[-1].to(engine.stack.store.like.device)
    normed = torch.empty_like(last)
    normalize(last, engine.stack.norm, normed)
    pairs = {
        "embedding": (engine.embed(batch.input_ids[0]), seen.inputs[0]),
        "last norm": (normed, seen.hidden),
    }
    for part, (ours, theirs) in pairs.items():
        difference = relative(ours.to("cpu").float(), theirs.to("cpu").float())
        if not difference <= BLOCK_TOLERANCE[last.dtype]:
            raise ExitWith(
                ExitCode.BAD_INPUT,
                f"{name}: the {part} of the fused engine differs from transformers' by {difference:.1%}; this is not "
                "rounding. Train with --engine.kind reference",
            )


def _block_difference(
    engine: FusedDecoder, number: int, x: torch.Tensor, theirs: torch.Tensor, context: ForwardContext
) -> float:
    """Norm of the difference beyond the rounding of each sum, as a share of the norm of what the block adds."""
    block, store = engine.stack.blocks[number], engine.stack.store
    matrices = store.matrices(number, Pass.CHECKED)
    own = x.to(store.like.device)
    ours, _ = block.finish(matrices, block.forward(matrices, own, context), context)
    ours, theirs, x = (each.to("cpu").float() for each in (ours, theirs, x))
    rounding = torch.finfo(own.dtype).eps * theirs.abs()  # of the sum, which a few large elements would else dominate
    beyond = ((ours - theirs).abs() - rounding).clamp(min=0)
    return float(beyond.norm() / (theirs - x).norm())


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Norm of the difference as a share."""
    return float((ours - theirs).norm() / theirs.norm())


@contextmanager
def random_adapters(model: LanguageModel) -> Iterator[None]:
    """While entered, the adapters' B are not zero and trained rows are not the base's, or their part of the computation
    would be compared with nothing."""
    generator = torch.Generator().manual_seed(0)
    changed = [p for name, p in model.trainable().items() if name.endswith(("lora_B.weight", "trainable_tokens_delta"))]
    kept = [parameter.data.clone() for parameter in changed]
    for parameter in changed:
        values = torch.randn(parameter.shape, generator=generator) * 0.05 / parameter.shape[1] ** 0.5
        parameter.data.copy_(values)
    try:
        yield
    finally:
        for parameter, values in zip(changed, kept, strict=True):
            parameter.data.copy_(values)

"""Whether packed samples see one another under transformers; tested, since no table of families says it."""

from collections.abc import Sequence

import torch

from train.collate import MicroBatch, collate_packed
from train.engine.attention import has_flash
from train.models.agreement import MAX_TOKENS, alone, relative
from train.models.language_model import LanguageModel
from train.models.shape import BROKEN, told
from train.run.exits import ExitCode, ExitWith

# Share by which a sample's hidden states may differ behind another one; sums are only rounded otherwise
PACKING_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.01, torch.bfloat16: 0.05}


def isolate(model: LanguageModel, ids: Sequence[int]) -> str:
    """Gives transformers the fastest attention under which no packed sample sees another; the reason where none does.

    Attention over packed rows ends at cu_seqlens where there is a flash kernel. Otherwise transformers makes a block
    mask of position_ids, for some models none. A recurrent or convolutional layer may carry its state on whatever
    attention does.
    """
    causal_lm = model.causal_lm
    own, reason = causal_lm.config._attn_implementation, ""
    has_kernel = own == "sdpa" and has_flash(model.compute_dtype, causal_lm.device)
    for kind in ["varlen", own] if has_kernel else [own]:
        causal_lm.set_attn_implementation(kind)
        reason = _leak(model, ids)
        if not reason:
            break
    return reason


def check_packing(model: LanguageModel, name: str, ids: Sequence[int]) -> None:
    """As isolate; raises ExitWith(BAD_INPUT) where, on the reference engine, a packed sample sees the one before it."""
    if reason := isolate(model, ids):
        raise ExitWith(
            ExitCode.BAD_INPUT,
            f"--data.packing true: {name} does not compute a packed sample as it computes it alone ({reason}): a layer "
            "carries its state on, or its attention or positions know no boundaries within a row; leave packing off: "
            "--data.group_by_length true saves padding",
        )


@torch.no_grad()
def _leak(model: LanguageModel, ids: Sequence[int]) -> str:
    """What a sample's hidden states show of the one packed before it; nothing where they are those it has alone."""
    second = list(ids)[: MAX_TOKENS // 2]
    second = second if len(second) > 1 else [*second, 0]
    vocabulary = model.head.weight.shape[0]
    firsts = [second[::-1], [(token * 7919 + 1) % vocabulary for token in second]]

    def packed(*samples: list[int]) -> MicroBatch:
        rows = [{"input_ids": sample, "trained": [True] * len(sample)} for sample in samples]
        return collate_packed(rows).to(model.causal_lm.device)

    try:
        with model.generating():  # by an attention that knows nothing of packing
            expected = model.reference.eager(alone(packed(second))).float()
        model.eval()
        found = [model.reference.eager(packed(first, second))[-len(second) :].float() for first in firsts]
        difference = max(relative(hidden, expected) for hidden in found)
    except torch.OutOfMemoryError:
        raise
    except (*BROKEN, NotImplementedError) as error:  # transformers' own refusal
        return told(error)
    finally:
        model.train()
    return "" if difference <= PACKING_TOLERANCE[model.compute_dtype] else f"hidden states differ by {difference:.1%}"

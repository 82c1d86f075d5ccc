"""Whether a model, parts of which are replaced, still computes of a sample what it did before."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from train.collate import collate_packed
from train.models.adapters import is_adapted_layer
from train.models.agreement import MAX_TOKENS, alone, relative
from train.models.language_model import LanguageModel

TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.05}  # of hidden states; twice it of gradients
# A deep base multiplies what it rounds: Gemma 2's shape with random weights differs by 30 % in bf16. Layers that are
# rounded once more differ by 1.1 to 1.2 times as much as ours do from PEFT's (StableLM, Llama, Gemma 2)
ROUNDINGS = 3


class SampleCheck:
    """Hidden states and gradients of a sample, and by how much another rounding of every layer changes them."""

    def __init__(self, model: LanguageModel, ids: Sequence[int]) -> None:
        """Computes them; `ids` are the sample's, of which the first MAX_TOKENS are taken."""
        self.model = model
        self.ids = list(ids)[:MAX_TOKENS]
        self.before = computed(model, self.ids)
        with _rounded_again(model):
            self.noise = [relative(*pair) for pair in zip(computed(model, self.ids), self.before, strict=True)]

    def problem(self) -> str:
        """By how much the model differs now, in words; nothing where it is only rounded otherwise."""
        found, tolerance = computed(self.model, self.ids), TOLERANCE[self.model.compute_dtype]
        limits = [max(share * tolerance, ROUNDINGS * noise) for share, noise in zip((1, 2), self.noise, strict=True)]
        names = ("hidden states", "gradients")
        for what, limit, one, other in zip(names, limits, found, self.before, strict=True):
            difference = relative(one, other)
            if not difference <= limit:  # also NaN
                return f"{what} differ by {difference:.1%}"
        return ""


def computed(model: LanguageModel, ids: Sequence[int]) -> list[torch.Tensor]:
    """Hidden states of a sample, and all gradients of a fixed function of them, as two vectors."""
    trained = list(model.trainable().values())
    model.eval()
    try:
        hidden = _hidden(model, ids)
        weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0)).to(hidden.device)
        gradients = torch.autograd.grad((hidden * weights).sum(), trained, allow_unused=True)
    finally:
        model.train()
    return [hidden.detach().flatten(), torch.cat([g.float().flatten() for g in gradients if g is not None])]


@torch.no_grad()
def call(model: LanguageModel, ids: Sequence[int]) -> None:
    """Computes a sample's hidden states, without gradients, for what a first call does beside."""
    model.eval()
    try:
        _hidden(model, ids)
    finally:
        model.train()


def _hidden(model: LanguageModel, ids: Sequence[int]) -> torch.Tensor:
    batch = collate_packed([{"input_ids": list(ids), "trained": [True] * len(ids)}]).to(model.causal_lm.device)
    return model.reference.eager(alone(batch)).float()


@contextmanager
def _rounded_again(model: LanguageModel) -> Iterator[None]:
    """While entered, every adapted layer's output is off by up to half a unit in the last place."""
    device = model.causal_lm.device
    generator = torch.Generator(device).manual_seed(0)

    def off(_: torch.nn.Module, __: Any, out: torch.Tensor) -> torch.Tensor:
        half = torch.finfo(out.dtype).eps / 2
        return out * (1 + torch.empty_like(out).uniform_(-half, half, generator=generator))

    hooks = [each.register_forward_hook(off) for each in model.adapted.modules() if is_adapted_layer(each)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

"""Full fine-tuning (train.method full): the base itself is trained, in fp32, in the place of adapters on it."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from transformers import PreTrainedModel

from train.config import Config
from train.models.experts import packed_experts
from train.models.targets import Targets, decoder_name
from train.run.exits import ExitCode, ExitWith

WHOLE = "train.method full; the fused engine trains adapters alone"


class WholeModel(torch.nn.Module):
    """A base all of whose language model is trained; it stands where PEFT's model does."""

    def __init__(self, base: PreTrainedModel) -> None:
        super().__init__()
        self.base = base

    def get_base_model(self) -> PreTrainedModel:
        """As PEFT's."""
        return self.base

    def forward(self, *args: Any, **options: Any) -> Any:
        """As transformers' model."""
        return self.base(*args, **options)


def train_whole(base: PreTrainedModel, config: Config) -> tuple[WholeModel, Targets]:
    """Makes decoder, embedding and head trainable; what is beside them, such as a vision tower, stays frozen.

    Raises ExitWith(BAD_INPUT) where the head has a bias, for which our loss makes no gradient, and where experts are
    codes.
    """
    if packed_experts(base):
        reason = f"{config.model.name_or_path}: its experts are stored in MXFP4, which has no gradient"
        raise ExitWith(ExitCode.BAD_INPUT, f"--train.method full: {reason}; train adapters")
    head: Any = base.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        reason = f"{config.model.name_or_path}: its head has a bias, for which the loss makes no gradient"
        raise ExitWith(ExitCode.BAD_INPUT, f"--train.method full: {reason}; train adapters")
    start = decoder_name(base)
    decoder = base.get_submodule(start)
    for module in (decoder, base.get_input_embeddings(), head):
        module.requires_grad_(True)
    linear = sum(isinstance(module, torch.nn.Linear) for module in decoder.modules())
    return WholeModel(base), Targets([], {}, linear, "", {})


def trained_weights(base: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The trained parameters, by the names that transformers gives them in model.safetensors; a tied head is none."""
    return {name: parameter for name, parameter in base.named_parameters() if parameter.requires_grad}


def computing_in(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """While entered, products of fp32 weights are computed in the type, as torch's autocast does."""
    return nullcontext() if dtype == torch.float32 else torch.autocast(device.type, dtype)

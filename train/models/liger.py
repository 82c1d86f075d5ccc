"""Liger's kernels in transformers' modules, for the reference engine on a GPU; taken back where they do not agree.

liger-kernel (https://github.com/linkedin/Liger-Kernel) is optional. Norms, MLPs and rotary embeddings are its; the head
and the loss stay ours, and experts transformers': its backward pass makes the gradient of frozen ones as well.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch

from train.models.agreement import random_adapters
from train.models.language_model import LanguageModel
from train.models.sample_check import SampleCheck, call
from train.models.shape import BROKEN, told
from train.run.versions import package_version

PATCHES = "liger_kernel.transformers.monkey_patch"
LOSSES = {"cross_entropy": False, "fused_linear_cross_entropy": False}


def use_liger(model: LanguageModel, wanted: str, ids: Sequence[int]) -> str:
    """Puts the kernels in place, if `wanted` is not off and they compute what transformers does of a sample.

    Returns what was done and why, in words; whatever is refused is taken back.
    """
    restore_functions(model)  # what another run in this process has left
    causal_lm: Any = model.causal_lm
    kind = causal_lm.config.model_type
    if reason := not_tried(kind, wanted):
        return reason
    patches: Any = importlib.import_module(PATCHES)
    with random_adapters(model):
        check = SampleCheck(model, ids)
        found = _Before(causal_lm)
        options = LOSSES | ({"swiglu": False} if _has_experts(causal_lm) else {})
        try:
            patches._apply_liger_kernel_to_instance(model=causal_lm, **options)
            found.confine()
            # At its first call it imports what it may need and logs the errors of what is missing. A handler that keeps
            # one keeps the frames behind it and their tensors; a graph of a pass that is alive breaks every capture
            call(model, check.ids)
            problem = check.problem()
        except torch.OutOfMemoryError:
            raise
        except (*BROKEN, NotImplementedError) as error:
            problem = told(error)
    if problem:
        found.take_back()
        return f"transformers' own kernels: liger-kernel's were tried and taken back ({problem})"
    return in_place(kind)


def not_tried(kind: str, wanted: str) -> str:
    """Why the kernels are not tried on a model of this type, in words; empty where they are."""
    if wanted == "off":
        return "transformers' own kernels: engine.liger off"
    if importlib.util.find_spec("liger_kernel") is None:
        return "transformers' own kernels: liger-kernel is not installed"
    try:
        patches: Any = importlib.import_module(PATCHES)
        known = patches.MODEL_TYPE_TO_APPLY_LIGER_FN
    except BROKEN as error:
        return f"transformers' own kernels: liger-kernel cannot be used ({told(error)})"
    return "" if kind in known else f"transformers' own kernels: liger-kernel does not know {kind}"


def in_place(kind: str) -> str:
    """What the kernels are in a model of this type, in words."""
    return f"liger-kernel {package_version('liger-kernel')}: norms, MLPs and rotary embeddings that it has for {kind}"


def _has_experts(causal_lm: Any) -> bool:
    return any(parameter.dim() == 3 for parameter in causal_lm.parameters())


class _Before:
    """What a model, its classes and the files with their code were before Liger came."""

    def __init__(self, causal_lm: Any) -> None:
        self.modules = {module: dict(vars(module)) for module in causal_lm.modules()}
        classes = {type(module) for module in self.modules}
        self.forwards = {each: each.forward for each in classes if "forward" in vars(each)}
        self.files = {file: dict(vars(file)) for file in _files(causal_lm)}

    def confine(self) -> None:
        """Leaves the changes in this model alone: later ones of the family are transformers', CPU tensors as well.

        A function of the file, such as apply_rotary_pos_emb, serves all models: it becomes one that looks.
        """
        self._restore_classes()
        for file, name, own in self._changed():
            theirs = getattr(file, name)
            setattr(file, name, own if isinstance(own, type) else _OnGpu(theirs, own))

    def take_back(self) -> None:
        """Undoes everything."""
        self._restore_classes()
        for module, attributes in self.modules.items():
            vars(module).clear()
            vars(module).update(attributes)
        for file, name, own in self._changed():
            setattr(file, name, own)

    def _restore_classes(self) -> None:
        for each, forward in self.forwards.items():
            if each.forward is not forward:
                each.forward = forward

    def _changed(self) -> list[tuple[ModuleType, str, Any]]:
        return [
            (file, name, own)
            for file, names in self.files.items()
            for name, own in names.items()
            if getattr(file, name, None) is not own
        ]


def restore_functions(model: LanguageModel) -> None:
    """Gives the family's file its own functions back."""
    for file in _files(model.causal_lm):
        for name, value in list(vars(file).items()):
            if isinstance(value, _OnGpu):
                setattr(file, name, value.own)


def _files(causal_lm: Any) -> set[ModuleType]:
    """The files of transformers that define the model's modules."""
    names = {type(module).__module__ for module in causal_lm.modules()}
    return {sys.modules[name] for name in names if name.startswith("transformers.models.")}


class _OnGpu:
    """A function that is Liger's for tensors on a GPU and transformers' for others."""

    def __init__(self, theirs: Callable[..., Any], own: Callable[..., Any]) -> None:
        self.theirs, self.own = theirs, own

    def __call__(self, tensor: torch.Tensor, *args: Any, **options: Any) -> Any:
        return (self.theirs if tensor.is_cuda else self.own)(tensor, *args, **options)

"""Liger's kernels are taken where they agree with transformers, and leave nothing behind where they do not."""

import importlib
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers as T
from accelerate import Accelerator
from transformers.models.stablelm import modeling_stablelm

from tests.conftest import training_of
from tests.unit.models.test_agreement import SIZES, for_all_linear, write
from train.config import Config
from train.models import liger
from train.models.language_model import LanguageModel
from train.models.liger import restore_functions, use_liger
from train.models.sample_check import computed

IDS = list(range(5, 60))
EXPERTS: dict[str, Any] = {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


@pytest.fixture
def model(config: Config, tmp_path: Path) -> LanguageModel:
    return training_of(
        for_all_linear(config, write(tmp_path / "base", T.StableLmConfig(**SIZES))), Accelerator(cpu=True)
    ).model


def stand_in(monkeypatch: pytest.MonkeyPatch, apply: Callable[..., None], known: str = "stablelm") -> None:
    """Installs a package whose public function is `apply`."""
    patches: Any = ModuleType(liger.PATCHES)
    patches.MODEL_TYPE_TO_APPLY_LIGER_FN = {known: apply}
    patches._apply_liger_kernel_to_instance = apply
    monkeypatch.setitem(sys.modules, liger.PATCHES, patches)
    monkeypatch.setattr(liger.importlib.util, "find_spec", lambda name: object())


class Kernels:
    """Patches a model, its file and its class as Liger does, with an error of `factor` in each MLP."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.options: dict[str, Any] = {}

    def __call__(self, model: Any, **options: Any) -> None:
        self.options = options
        own, factor = modeling_stablelm.apply_rotary_pos_emb, self.factor
        monkey: Any = modeling_stablelm
        monkey.apply_rotary_pos_emb = lambda *arguments, **named: own(*arguments, **named)
        monkey.StableLmMLP = type("LigerMLP", (torch.nn.Module,), {})
        for layer in model.model.layers:
            inner = layer.mlp.forward
            layer.mlp.__dict__["forward"] = lambda x, inner=inner: factor * inner(x)
            layer.mlp.offset = 0.0


def state(model: LanguageModel) -> list[Any]:
    """What a patch changes."""
    file: Any = modeling_stablelm
    causal_lm: Any = model.causal_lm
    mlps = [layer.mlp for layer in causal_lm.model.layers]
    return [file.apply_rotary_pos_emb, file.StableLmMLP, *(sorted(vars(mlp)) for mlp in mlps)]


def test_kernels_that_agree_are_taken_for_this_model_alone(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its losses; later models of the family, and CPU tensors, are computed by transformers."""
    kernels, before = Kernels(factor=1.0), state(model)
    stand_in(monkeypatch, kernels)
    assert use_liger(model, "auto", IDS).startswith("liger-kernel ")
    assert kernels.options == liger.LOSSES
    rotary, mlp, *attributes = state(model)
    assert mlp is before[1]
    assert attributes != before[2:]
    assert rotary.own is before[0]
    tensors = [torch.randn(1, 2, 4, 8) for _ in range(2)] + [torch.ones(1, 4, 8)] * 2
    monkeypatch.setattr(rotary, "theirs", None)  # which would fail
    assert torch.equal(rotary(*tensors)[0], before[0](*tensors)[0])
    restore_functions(model)
    assert state(model)[:2] == before[:2]


def fails(model: Any, **options: Any) -> None:
    Kernels(factor=1.0)(model, **options)
    raise NotImplementedError("no kernel for this card")


@pytest.mark.parametrize(
    ("apply", "reason"),
    [
        (Kernels(factor=1.5), "hidden states differ by"),
        (fails, "no kernel for this card"),
        (Kernels(float("nan")), "nan"),
    ],
)
def test_kernels_that_do_not_agree_are_taken_back(
    apply: Any, reason: str, model: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Model, file and class are as they were, to the bit of what is computed; the adapters start where they did."""
    before, values = state(model), [p.clone() for p in model.trainable().values()]
    wanted = computed(model, IDS)
    stand_in(monkeypatch, apply)
    note = use_liger(model, "auto", IDS)
    assert "taken back" in note
    assert reason in note
    assert state(model) == before
    assert all(torch.equal(a, b) for a, b in zip(wanted, computed(model, IDS), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(values, model.trainable().values(), strict=True))
    assert model.training


def test_a_record_that_is_kept_keeps_no_graph(
    model: LanguageModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its first call logs an exception, whose traceback holds the frames of the pass that called."""
    found: list[Any] = []

    def apply(model: Any, **_: Any) -> None:
        inner = model.model.layers[1].mlp.forward

        def forward(x: torch.Tensor) -> torch.Tensor:
            if not found:
                try:
                    importlib.import_module("no_such_kernels")
                except ImportError as error:
                    logging.getLogger("liger").warning("not imported: %s", error)
                found.append(x.grad_fn)
            return inner(x)

        model.model.layers[1].mlp.__dict__["forward"] = forward

    stand_in(monkeypatch, apply)
    assert use_liger(model, "auto", IDS).startswith("liger-kernel ")
    assert caplog.records
    assert found == [None]


def test_it_says_why_there_are_none(model: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Off, not installed, broken, or a family that the package does not know."""
    assert "engine.liger off" in use_liger(model, "off", IDS)
    monkeypatch.setattr(liger.importlib.util, "find_spec", lambda name: None)
    assert "not installed" in use_liger(model, "auto", IDS)
    monkeypatch.setattr(liger.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, liger.PATCHES, None)
    assert "cannot be used" in use_liger(model, "auto", IDS)
    stand_in(monkeypatch, Kernels(1.0), known="llama")
    assert "does not know stablelm" in use_liger(model, "auto", IDS)


def test_experts_stay_transformers(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Liger's make the gradient of frozen experts, too."""
    shape = T.Qwen3MoeConfig(**SIZES | EXPERTS)
    sparse = training_of(for_all_linear(config, write(tmp_path / "base", shape)), Accelerator(cpu=True)).model
    given: dict[str, Any] = {}
    stand_in(monkeypatch, lambda model, **options: given.update(options), known="qwen3_moe")
    assert use_liger(sparse, "auto", IDS).startswith("liger-kernel ")
    assert given == liger.LOSSES | {"swiglu": False}


def test_a_cpu_run_does_not_look_for_it(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels are Triton's."""
    monkeypatch.setattr("train.assemble.use_liger", lambda *_: pytest.fail("asked"))
    training_of(replace(config), Accelerator(cpu=True))

"""The reference engine on a GPU: passes as CUDA graphs, and layers whose boundaries nobody hands on."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as T
from accelerate import Accelerator
from packaging.version import Version

from tests.conftest import training_of
from tests.parity.test_adapted_linear import share_of
from tests.parity.test_operations import kept_of_small_adapters
from tests.unit.models.test_agreement import SIZES, SPARSE, for_all_linear, write
from train.config import Config
from train.models import adapted_linear
from train.models.adapted_linear import restore_products, use_own_products
from train.models.agreement import random_adapters
from train.models.graph_trial import take_graphs
from train.models.pass_graphs import PassGraphs
from train.step import Training, optimizer_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; tests/parity covers eager passes"),
]
IDS = list(range(5, 60))
SHAPES: dict[str, Any] = {
    "gemma2": lambda: T.Gemma2Config(**SIZES, head_dim=16, sliding_window=16, attn_logit_softcapping=5.0),
    "gpt_neox": lambda: T.GPTNeoXConfig(**SPARSE, hidden_dropout=0.0, attention_dropout=0.0),
    "stablelm": lambda: T.StableLmConfig(**SIZES),
}


def build(config: Config, folder: Path, name: str, dropout: float = 0.0) -> Training:
    config = for_all_linear(config, write(folder / "base", SHAPES[name]()))
    config = replace(config, model=replace(config.model, dtype="bf16"), batch=replace(config.batch, merge="auto"))
    config = replace(config, run=replace(config.run, device="cuda"), lora=replace(config.lora, dropout=dropout))
    return training_of(config, Accelerator())


def gradient(training: Training, step: int, seed: int = 0) -> torch.Tensor:
    """Of all micro-batches of the step."""
    training.flat.zero_grad()
    torch.manual_seed(seed)
    for batch in training.data.batch(step, training.plan).micro_batches:
        training.model(batch.to(torch.device("cuda"))).backward()
    return torch.cat([p.grad.flatten() for p in training.parameters.values() if p.grad is not None]).clone()


@pytest.mark.parametrize("name", SHAPES)
def test_graphs_give_peft_s_gradient(name: str, config: Config, tmp_path: Path) -> None:
    """Steps of several lengths, captured and replayed: the gradient of PEFT's layers without graphs, every time."""
    if name == "gemma2" and Version(T.__version__) < Version("5.23"):
        pytest.skip("transformers copies the mask's smallest value from the CPU, which no graph records")
    training = build(config, tmp_path, name)
    assert training.plan.micro_batch_shape.layout == "unpadded"
    model, steps = training.model, (0, 1, 2, 0, 1)
    with random_adapters(model):
        model.reference.graphs = None
        restore_products(model)
        wanted = {step: gradient(training, step) for step in set(steps)}
        assert use_own_products(model, IDS).startswith("adapters: ")
        model.reference.graphs = graphs = PassGraphs(model.reference.eager, list(training.parameters.values()))
        for step in steps:
            found = gradient(training, step)
            assert (found - wanted[step]).norm() < 0.05 * wanted[step].norm()
    assert graphs.graphs
    assert optimizer_step(training, 0).grad_norm > 0


def test_graphs_draw_dropout_anew(config: Config, tmp_path: Path) -> None:
    """A replay draws the masks of the seed that was set before it, also the one behind its capture."""
    training = build(config, tmp_path, "gpt_neox", dropout=0.5)
    model = training.model
    with random_adapters(model):
        model.reference.graphs = PassGraphs(model.reference.eager, list(training.parameters.values()))
        captured, again, other = (gradient(training, 0, seed) for seed in (5, 5, 6))
    assert (captured - again).norm() < 0.02 * again.norm()
    assert (other - again).norm() > 0.1 * again.norm()


def test_a_trial_that_fails_leaves_nothing(config: Config, tmp_path: Path) -> None:
    """A layer that reads a value on the host ends the capture; dropout draws, memory is given back, graphs work."""
    training = build(config, tmp_path, "stablelm", dropout=0.5)
    model, plan = training.model, training.plan
    batch = training.data.batch(0, plan).micro_batches[0].to(torch.device("cuda"))
    model.reference.graphs = None
    wanted = gradient(training, 0, 5)
    layer: Any = model.causal_lm
    hook = layer.model.layers[1].mlp.register_forward_hook(lambda _, args, out: out * float(bool(args[0].sum() < 1e9)))
    assert "not permitted when stream is capturing" in take_graphs(model, batch, 1e12)
    hook.remove()
    reserved = torch.cuda.memory_reserved()
    torch.empty(1 << 30, device="cuda")
    torch.cuda.empty_cache()
    assert torch.cuda.memory_reserved() <= reserved
    assert (gradient(training, 0, 5) - wanted).norm() < 0.02 * wanted.norm()
    assert "not permitted" not in take_graphs(model, batch, 1e12)


def test_boundaries_reach_layers_that_do_not_hand_them_on(config: Config, tmp_path: Path) -> None:
    """StableLM's layers drop what the decoder is called with; its packed samples are isolated by varlen attention."""
    training = build(config, tmp_path, "stablelm")
    assert training.model.causal_lm.config._attn_implementation == "varlen"


def test_a_small_adapter_is_not_lost_on_the_fused_engine() -> None:
    """cuBLAS on Hopper rounds a product before it adds to it: half of an adapter's output of a thousandth was gone."""
    assert kept_of_small_adapters("cuda") == pytest.approx([1, 1], abs=0.05)


@pytest.mark.parametrize("few", [0, 4])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_small_adapter_is_not_lost_on_the_reference_engine(
    dim: int, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same of its products, forward and backward, with the weight copied and with sums in fp32."""
    monkeypatch.setattr(adapted_linear, "FEW_TOKENS", few)
    torch.manual_seed(0)
    base = torch.nn.Linear(512, 1536, bias=False, device="cuda", dtype=torch.bfloat16).requires_grad_(False)
    torch.nn.init.normal_(base.weight)
    width, rank = base.weight.shape[dim], 12
    x, low_rank = (torch.randn(2048, size, device="cuda").bfloat16() for size in (width, rank))
    adapter = torch.randn((1536, rank) if dim else (rank, 512), device="cuda") * 2.0**-10 * (width / rank) ** 0.5
    adapter = adapter.bfloat16()
    out = adapted_linear._rounded_once(x, low_rank, base, adapter, dim).double()
    plain = x.double() @ (base.weight.double().T if dim else base.weight.double())
    wanted = low_rank.double() @ (adapter.double().T if dim else adapter.double())
    assert share_of(out - plain, wanted) == pytest.approx(1, abs=0.05)

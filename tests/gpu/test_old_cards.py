"""Cards without bf16, flash kernels or Triton, simulated on a newer one by their compute capability."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Literal

import bitsandbytes as bnb
import pytest
import torch
from accelerate import Accelerator

from tests.conftest import BUNDLED_BASE, training_of
from tests.gpu import kernel_calls
from train.config import Config
from train.engine import attention, operations
from train.engine.embedding import HostEmbedding
from train.engine.lora_linear import dequantize
from train.engine.machine_memory import OwnMemory
from train.run import devices
from train.step import StepResult, Training, optimizer_step

GPU = torch.device("cuda", 0)
Choose = Callable[[tuple[int, int]], None]


def has_bf16() -> bool:
    return torch.cuda.is_available() and devices.capability(GPU) >= devices.BF16


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not has_bf16(), reason="needs a CUDA device with bf16; what is chosen is tested on a CPU"),
]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Choose]:
    """Makes the GPU one of an older capability."""

    def choose(number: tuple[int, int]) -> None:
        operations.kernels_for.cache_clear()
        monkeypatch.setattr(devices, "capability", lambda device: number)
        # a real one would have no such kernel
        monkeypatch.setattr(attention, "varlen_attn", lambda *_, **__: pytest.fail("flash kernels on an old card"))

    yield choose
    operations.kernels_for.cache_clear()


@pytest.fixture
def real(config: Config) -> Config:
    """Twelve steps on the bundled base in NF4."""
    config = replace(config, model=replace(config.model, name_or_path=str(BUNDLED_BASE), random_init=False))
    config = replace(config, run=replace(config.run, device="cuda"), optim=replace(config.optim, lr=1e-3))
    return replace(config, train=replace(config.train, epochs=4))


def run(config: Config, scale: float = 2.0**16) -> tuple[Training, list[StepResult]]:
    training = training_of(config, Accelerator())
    assert training.model.engine_name == "fused"
    if training.scaler.is_enabled():
        training = replace(training, scaler=torch.amp.GradScaler("cuda", init_scale=scale))
    results = [optimizer_step(training, step) for step in range(12)]
    assert not any(result.is_skipped for result in results)
    return training, results


def apart(some: list[StepResult], others: list[StepResult]) -> float:
    """The largest distance of two loss curves, in first losses."""
    pairs = zip(some, others, strict=True)
    return max(abs(one.loss - other.loss) for one, other in pairs) / others[0].loss


@pytest.mark.parametrize(
    ("number", "dtype", "has_triton"), [((7, 5), torch.float16, True), ((6, 1), torch.float32, False)]
)
def test_an_old_card_follows_a_new_one(
    number: tuple[int, int], dtype: torch.dtype, has_triton: bool, real: Config, card: Choose
) -> None:
    """The type that auto takes, SDPA, no graphs, below 7.0 no Triton: losses within 2 % of the first of bf16's."""
    new, wanted = run(real)
    assert new.model.adapted.get_base_model().dtype == torch.bfloat16
    card(number)
    old, found = run(real)
    engine: Any = old.model.engine
    causal_lm: Any = old.model.adapted.get_base_model()
    assert causal_lm.dtype == dtype
    assert old.scaler.is_enabled() == (dtype == torch.float16)
    assert engine.graphs is None
    assert isinstance(causal_lm.get_input_embeddings(), HostEmbedding)
    if not has_triton:
        assert operations.kernels_for(causal_lm.device) is None
    assert wanted[-1].loss < 0.8 * wanted[0].loss
    assert apart(found, wanted) < 0.02


def test_packed_rows_on_an_old_card(real: Config, card: Choose) -> None:
    """Rows of several samples go through SDPA one sample at a time: losses within 2 % of the first of varlen_attn's."""
    packed = replace(real, data=replace(real.data, packing=True), train=replace(real.train, epochs=40))
    wanted = run(packed)[1]
    card((7, 5))
    training, found = run(packed)
    causal_lm: Any = training.model.adapted.get_base_model()
    assert causal_lm.config._attn_implementation == "sdpa"
    assert apart(found, wanted) < 0.02


@pytest.mark.parametrize("is_old", [True, False])
@pytest.mark.parametrize("optimizer", ["paged_adamw_8bit", "adamw"])
def test_an_overflow_is_computed_again(
    optimizer: Literal["paged_adamw_8bit", "adamw"], is_old: bool, real: Config, card: Choose
) -> None:
    """A scale that is far too high is halved within the first step, and the run is that of a start with the lower one.

    With torch's fused AdamW, which the scaler treats in another way; eagerly on an old card, as graphs on a new.
    """
    half = replace(real, model=replace(real.model, dtype="fp16"), optim=replace(real.optim, name=optimizer))
    if is_old:
        card((7, 5))
    _, high = run(half, 2.0**40)
    assert high[0].num_overflows > 2
    _, low = run(half, high[-1].loss_scale)
    assert not any(result.num_overflows for result in low)
    assert [result.learning_rate for result in high] == [result.learning_rate for result in low]
    assert apart(high, low) < 5e-3


@pytest.mark.parametrize(
    "operation",
    [
        kernel_calls.norms,
        kernel_calls.rotate,
        kernel_calls.gates,
        kernel_calls.dropout,
        kernel_calls.cross_entropy,
    ],
)
def test_kernels_in_fp16_are_their_torch_lines(
    operation: Callable[[], list[torch.Tensor]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same fp16 inputs through Triton and through torch: equal up to fp16's last bit."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=GPU, dtype=torch.float16)

    monkeypatch.setattr(kernel_calls, "random", random)
    assert operations.kernels_for(GPU) is not None
    results = []
    for _ in range(2):
        torch.manual_seed(0)
        results.append(operation())
        monkeypatch.setattr(operations, "kernels_for", lambda _: None)
    for found, wanted in zip(*results, strict=True):
        assert (found.float() - wanted.float()).norm() <= 1e-3 * wanted.float().norm()


def test_weights_and_rows_without_triton(card: Choose) -> None:
    """Dequantised by one launch and by bitsandbytes: the same fp16 bits; the embedding's rows by the host."""
    kind: Any = bnb.nn.Params4bit
    weight = kind(torch.randn(256, 2048), requires_grad=False, compress_statistics=True, quant_type="nf4").to(GPU)
    outs = [torch.zeros(256, 2112, device=GPU, dtype=torch.float16) for _ in range(2)]
    dequantize(weight, outs[0][:, :2048])
    card((6, 1))
    assert operations.kernels_for(GPU) is None
    dequantize(weight, outs[1][:, :2048])
    assert torch.equal(*outs)
    table, ids = torch.randn(1000, 100, device=GPU), torch.randint(1000, (3, 57), device=GPU)
    found = HostEmbedding(table, OwnMemory(pin=True))(ids)
    assert found.is_cuda
    assert torch.equal(found, table[ids])

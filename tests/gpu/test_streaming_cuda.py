"""What only a GPU can show of streaming: copies beside kernels and inside graphs, the cap, answers."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from tests.conftest import BUNDLED_BASE, asked_in, training_of, with_batch
from train.config import Config, LoraConfig, ModelConfig
from train.deliver.compare import compare
from train.deliver.generation import Generator
from train.engine.families import decoder_layers
from train.models.tokenizer import load_tokenizer
from train.step import Training, optimizer_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device; the CPU suite covers the same code"),
]


@pytest.fixture
def deep(config: Config) -> Config:
    """The bundled base: eight blocks or so, of real weights, with dropout, on the GPU."""
    return replace(
        with_batch(config, 2, 4),
        model=ModelConfig(name_or_path=str(BUNDLED_BASE)),
        run=replace(config.run, device="cuda"),
        lora=LoraConfig(r=4, dropout=0.1),
    )


def build(config: Config) -> Training:
    return training_of(config, Accelerator())


@pytest.fixture
def _same_bits() -> Any:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_same_bits")
@pytest.mark.parametrize("uses_graphs", [False, True])
@pytest.mark.parametrize("offloads_inputs", [False, True])
@pytest.mark.parametrize("which", ["all", "odd"])
def test_streamed_steps_have_the_resident_bits(
    deep: Config, uses_graphs: bool, offloads_inputs: bool, which: str
) -> None:
    """Twelve steps eagerly or as graphs, block inputs on the host or not: losses and adapters to the bit."""
    found = []
    for is_streamed in (False, True):
        training = build(deep)
        numbers = range(0 if which == "all" else 1, training.plan.num_blocks, 1 if which == "all" else 2)
        plan = replace(training.plan, num_kept=1, num_cached=0, uses_graphs=uses_graphs)
        if is_streamed:
            plan = replace(plan, streamed=tuple(numbers), offloads_inputs=offloads_inputs)
        training.model.execute(plan)
        if is_streamed:
            assert training.model.away.host.numbers == list(numbers)
            assert all(buffer.is_pinned() for buffer in training.model.away.host.buffers.values())
        losses = [optimizer_step(training, step).loss for step in range(12)]
        found.append((losses, [p.detach().clone() for p in training.parameters.values()]))
    assert found[0][0] == found[1][0]
    assert all(torch.equal(a, b) for a, b in zip(found[0][1], found[1][1], strict=True))


def test_a_streamed_model_answers(deep: Config) -> None:
    """Streamed weights are in pinned host memory, and the answers are the resident model's."""
    tokenizer = load_tokenizer(deep).backend
    asked = asked_in(deep, 3)
    answers = []
    for offload, place in (("none", "cuda"), ("stream", "cpu")):
        memory: Any = replace(deep.memory, offload=offload)
        training = build(replace(deep, memory=memory))
        causal_lm: Any = training.model.adapted.get_base_model()
        for _ in range(2):
            answers.append(compare(Generator(training.model, tokenizer, [0], 12), asked, lambda: False))
            weights = [linear.weight for layer in decoder_layers(causal_lm) for linear in layer.linears]
            assert {weight.device.type for weight in weights} == {place}
            assert optimizer_step(training, 0).loss > 0
    assert answers[0] == answers[2]
    assert answers[1] == answers[3]

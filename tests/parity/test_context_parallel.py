"""Context parallelism: the processes of a group together compute what one does, hidden states and every gradient."""

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import LlamaConfig

from tests.compare_runs import at, start_processes
from tests.conftest import arguments, run_command, training_of
from tests.parity.models import ALL, FAMILIES, NOTHING, SIZES, adapted_model, close, gradients_of, packed, plan
from train.assemble import longest_micro_batch
from train.collate import Part, StepBatch, collate_packed, part_of
from train.config import BatchConfig, Config, EngineConfig, MemoryConfig, OptimConfig
from train.engine.decoder import FusedDecoder
from train.engine.support import undivided_reason
from train.models.agreement import random_adapters
from train.models.language_model import choose_engine, sketch
from train.models.rotary import isolate_rotary
from train.run.exits import ExitWith
from train.run.processes import UNWATCHED
from train.step import step_gradient
from train.track.metrics_file import read_metrics

FAMILIES_OF_SOFTMAX = [name for name in FAMILIES if "qwen3.5" not in name]


class Threads:
    """A group whose processes are threads of this one."""

    def __init__(self, count: int) -> None:
        self.count, self.barrier = count, Barrier(count, timeout=60)
        self.sent: list[Any] = [None] * count

    def _told(self, number: int, word: Any) -> list[Any]:
        self.sent[number] = word
        self.barrier.wait()
        words = list(self.sent)
        self.barrier.wait()
        return words

    def part(self, number: int) -> Part:
        def swap(chunks: torch.Tensor) -> torch.Tensor:
            return torch.stack([theirs[number] for theirs in self._told(number, chunks)])

        return Part(number, self.count, swap, lambda flag: any(self._told(number, flag)))

    def run(self, work: Callable[[int], Any]) -> Sequence[Any]:
        """What `work` returns for each process's number."""
        with ThreadPoolExecutor(self.count) as pool:
            return list(pool.map(work, range(self.count)))


@pytest.mark.parametrize("family", FAMILIES_OF_SOFTMAX)
@pytest.mark.parametrize(("count", "num_kept", "tile"), [(2, 1, 0), (2, 3, 4), (4, 2, 0)])
def test_every_family_of_models(family: str, count: int, num_kept: int, tile: int) -> None:
    """Parts of 15 packed tokens, padded and with samples across them; key and value heads fewer than processes, too."""
    adapted, batch, group = adapted_model(*FAMILIES[family]), packed(), Threads(count)
    upstream = torch.randn(16, 64)
    models = [copy.deepcopy(adapted) for _ in range(count)]
    for each in (parameter for model in models for parameter in model.parameters() if parameter.requires_grad):
        each.grad = torch.zeros_like(each)
    whole = FusedDecoder(adapted.get_base_model(), plan(num_kept, 0, tile), NOTHING)(batch)
    whole.backward(upstream[:15])

    def work(number: int) -> torch.Tensor:
        engine = FusedDecoder(models[number].get_base_model(), plan(num_kept, 0, tile), NOTHING)
        hidden = engine(part_of(batch, group.part(number)))
        gradient = upstream.clone()
        gradient[15:] = 0
        hidden.backward(gradient[group.part(number).rows(16)])
        return hidden.detach()

    close(torch.cat(list(group.run(work)))[:15], whole.detach())
    found = [gradients_of(model) for model in models]
    for name, gradient in gradients_of(adapted).items():
        close(torch.stack([each[name] for each in found]).sum(0), gradient)


def two_groups(config: Config) -> Config:
    """In fp32 with torch's AdamW, whose state is not quantised: what is apart is rounding. Boundaries cross parts."""
    model = replace(config.model, quantization="none")
    config = replace(config, model=model, optim=OptimConfig("adamw", lr=1e-3), engine=EngineConfig(kind="fused"))
    config = replace(config, data=replace(config.data, validation_fraction=0.2))
    return replace(config, validate=replace(config.validate, at_start=True, num_questions=2, max_new_tokens=4))


@pytest.mark.slow
@pytest.mark.parametrize(("count", "split", "shard"), [(2, 2, False), (4, 2, True), (4, 4, False)])
def test_runs_of_groups(count: int, split: int, shard: bool, config: Config, tmp_path: Path) -> None:
    """Losses, gradients, validations and adapters of a run of one process; two groups, sharded weights, replicated
    heads."""
    config = two_groups(config)
    alone = replace(config, batch=BatchConfig(2, 0, samples=8))
    assert run_command(arguments(at(alone, tmp_path / "alone"))).returncode == 0
    batch = replace(alone.batch, context_parallel=split)
    together = replace(config, batch=batch, memory=MemoryConfig(shard=shard))
    ends = [run.wait() for run in start_processes(arguments(at(together, tmp_path / "split")), [None] * count)]
    assert [end.returncode for end in ends] == [0] * count, ends[0].stderr[-500:]
    assert f"{count} processes in groups of {split} = 8 samples" in ends[0].stdout
    rows = [read_metrics(tmp_path / name / "metrics.jsonl") for name in ("alone", "split")]
    assert len(rows[0]) > 2
    for one, other in zip(*rows, strict=True):
        for name in one.keys() & {"train/loss", "train/grad_norm", "eval/loss", "eval/tokens", "data/tokens"}:
            assert other[name] == pytest.approx(one[name], rel=1e-4), name
    saved = [load_file(tmp_path / name / "final" / "adapter_model.safetensors") for name in ("alone", "split")]
    for name, tensor in saved[0].items():
        assert (saved[1][name] - tensor).norm() <= 1e-3 * tensor.norm(), name


def streams() -> None:
    """A process that was given another option than the others."""
    from train import main

    changed: Any = main
    parse = changed.parse
    changed.parse = lambda argv: parse([*argv, "--memory.offload", "stream"])


def test_processes_that_would_exchange_otherwise_are_refused(config: Config, tmp_path: Path) -> None:
    """All end before the first exchange that not all make, with 78."""
    words = arguments(at(replace(config, memory=MemoryConfig()), tmp_path / "run"))
    place = words.index("--memory.offload")
    del words[place : place + 2]
    ends = [run.wait() for run in start_processes(words, [None, streams])]
    assert [end.returncode for end in ends] == [78, 78], ends[0].stderr[-500:]
    assert "the processes were not given the same options: --memory.offload" in ends[0].stderr


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("count", [2, 4])
def test_a_step_s_loss_and_gradient(count: int, quantization: Any, config: Config) -> None:
    """The parts' losses and every adapter's gradients add up, also where the next part's first token is the target, and
    where a part has none."""
    model = replace(config.model, quantization=quantization)
    config = replace(config, model=model, engine=EngineConfig(kind="fused"), optim=OptimConfig(max_grad_norm=1e9))
    draw = torch.Generator().manual_seed(0)
    batches = []
    for lengths in ((40, 3, 61, 20), (9, 70)):
        samples = [torch.randint(100, (length,), generator=draw).tolist() for length in lengths]
        rows = [{"input_ids": ids, "trained": [number > 0] * len(ids)} for number, ids in enumerate(samples)]
        batches.append(collate_packed(rows))
    assert len(part_of(batches[0], Part(0, 4)).targets) == 0
    assert batches[1].input_ids.numel() % 2

    def step(number: int, part: Part) -> tuple[float, dict[str, torch.Tensor]]:
        training = trainings[number]
        training.data.part = part
        batch = StepBatch([part_of(each, part) for each in batches], 100, 200, [])
        stats = step_gradient(training, batch, 0, UNWATCHED)
        return stats.loss_sum, {name: p.grad.clone() for name, p in training.parameters.items() if p.grad is not None}

    with ExitStack() as stack:
        trainings = [training_of(config, Accelerator(cpu=True)) for _ in range(count + 1)]
        for training in trainings:
            stack.enter_context(random_adapters(training.model))
        group = Threads(count)
        loss, gradients = step(count, Part())
        found = group.run(lambda number: step(number, group.part(number)))
    assert sum(part for part, _ in found) == pytest.approx(loss, rel=1e-6)
    assert len(gradients) > 10
    for name, gradient in gradients.items():
        assert gradient.norm() > 0
        close(torch.stack([each[name] for _, each in found]).sum(0), gradient)


def test_parts_are_the_whole() -> None:
    """Tokens and targets of all parts are those of the micro-batch, behind them padding that nobody predicts."""
    batch = collate_packed([{"input_ids": list(range(1, n + 1)), "trained": [True] * n} for n in (5, 1, 9)])
    assert part_of(batch, Part()) is batch
    for count in (2, 4, 7):
        parts = [part_of(batch, Part(number, count)) for number in range(count)]
        width = -(-15 // count)
        tokens = torch.cat([part.input_ids for part in parts], 1)
        assert torch.equal(tokens, F.pad(batch.input_ids, (0, count * width - 15)))
        rows = torch.cat([part.target_rows + width * number for number, part in enumerate(parts)])
        assert torch.equal(rows, batch.target_rows)
        assert torch.equal(torch.cat([part.targets for part in parts]), batch.targets)
        for part in parts:
            assert part.cu_seqlens is not None
            assert part.cu_seqlens.tolist() == [0, 5, 6, 15, *([count * width] if count * width > 15 else [])]
            assert part.position_ids.shape[1] == count * width
            assert part.max_length == 9


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_that_depend_on_a_sample_s_length(kind: str) -> None:
    """Are those of the whole sample, whichever part of it a process has."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [3.0] * 8, "original_max_position_embeddings": 6}
    rope = {"rope_type": kind, "rope_theta": 100.0, "factor": 4.0} | (factors if kind == "longrope" else {})
    shape = LlamaConfig(**SIZES, max_position_embeddings=6, rope_parameters=rope)
    adapted, group = adapted_model(shape, ALL), Threads(2)
    isolate_rotary(adapted.get_base_model())
    batch = packed()
    engine = FusedDecoder(adapted.get_base_model(), plan(3, 0), NOTHING)

    def work(number: int) -> torch.Tensor:
        own = copy.deepcopy(adapted).get_base_model()
        own.base_model.rotary_emb.lengths = batch.lengths
        with torch.no_grad():
            return FusedDecoder(own, plan(3, 0), NOTHING)(part_of(batch, group.part(number)))

    with torch.no_grad():
        as_one = engine(batch)
        engine.decoder.rotary_emb.lengths = batch.lengths  # type: ignore[attr-defined]
        whole = engine(batch)
    close(torch.cat(list(group.run(work)))[:15], whole)
    assert (as_one - whole).norm() > 1e-3 * whole.norm()


def test_what_cannot_be_split_is_refused(config: Config) -> None:
    """Other engines, a state that goes from token to token, heads that do not divide: exit 78 with what is wrong."""
    split = replace(config, batch=replace(config.batch, context_parallel=2), engine=EngineConfig(kind="fused"))
    with pytest.raises(ExitWith, match="1 process makes no groups of 2"):
        training_of(split, Accelerator(cpu=True))
    for changed, reason in (
        (replace(split, engine=EngineConfig(kind="reference")), "only the fused engine splits rows"),
        (replace(split, train=replace(split.train, method="full")), "the fused engine trains adapters alone"),
        (replace(split, batch=replace(split.batch, context_parallel=0)), "must be at least 1"),
    ):
        assert any("batch.context_parallel" in told and reason in told for told in changed.problems())
    assert not [told for told in split.problems() if "context_parallel" in told]
    dtype = torch.float32
    for count, number in ((2, 2), (4, 4), (3, 3)):
        sketched = sketch(split, dtype)
        each = replace(split, batch=replace(split.batch, context_parallel=count), engine=EngineConfig())
        if 4 % number:
            with pytest.raises(ExitWith, match="3 processes cannot have equal shares of its 4 query and 2 key heads"):
                choose_engine(sketched, each, torch.device("cpu"))
        else:
            assert choose_engine(sketched, each, torch.device("cpu")) == (True, "")
    hybrid = adapted_model(*FAMILIES["qwen3.5"]).get_base_model()
    assert "carries a state from token to token" in undivided_reason(hybrid, 2)
    int8 = replace(split, model=replace(split.model, quantization="int8"))
    with pytest.raises(ExitWith, match=r"--batch.context_parallel 2: only the fused engine .* int8 layers round"):
        choose_engine(sketch(int8, dtype), int8, torch.device("cpu"))


def test_a_trial_waits_for_nobody(config: Config) -> None:
    """The longest micro-batch before the first step: a process that ran out of memory in it would leave the others."""
    training = training_of(replace(config, engine=EngineConfig(kind="fused")), Accelerator(cpu=True))
    training.data.part = Part(1, 2)
    batch = longest_micro_batch(training, training.plan)
    assert 2 * batch.input_ids.numel() == batch.position_ids.numel()
    training.model(batch).backward()
    with pytest.raises(AssertionError, match="exchanges nothing"):
        training.model(replace(batch, part=training.data.part))

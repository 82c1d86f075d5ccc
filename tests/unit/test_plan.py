"""The plan fits what it is given, spends what is left, and is the one that a resumed run was started with."""

import math
from dataclasses import replace
from itertools import pairwise
from statistics import fmean, pstdev
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from data_tools.prepare import prepare
from tests.conftest import SHARED, arguments, needs_shared, training_of
from tests.parity.test_engine import ALL, FAMILIES, adapted_model
from train import assemble as assembling
from train import main as command
from train.assemble import fitted
from train.batching import LengthStatistics, MicroBatchShape, regroup
from train.checkpoints.resume import layout, saved_shape
from train.collate import collate_packed
from train.config import BatchConfig, Config, EngineConfig, LoraConfig, MemoryConfig, ModelConfig, OptimConfig
from train.data import BatchLayout, hold_out, prepare_settings
from train.engine.block import Pass
from train.engine.decoder import Engine
from train.engine.packed_weights import HostBlocks, Packing, linear_layers, packed_bytes
from train.engine.plan import Plan, reference_plan
from train.memory import outlook
from train.memory import search as planning
from train.memory.gpus import KNOWN, known_gpu
from train.memory.outlook import Outlook
from train.memory.search import MARGIN, MLP_TILE, Planner
from train.memory.sizes import ModelSizes, model_sizes
from train.models.language_model import sketch
from train.models.tokenizer import load_tokenizer
from train.run.exits import ExitCode, ExitWith
from train.step import optimizer_step

GIB = 2**30
H200: Any = replace(known_gpu("H200"), has_graphs=True)  # type: ignore[type-var]
LLAMA_8B = ModelSizes(
    num_blocks=32,
    hidden=4096,
    heads=6144,
    query=4096,
    inner=14336,
    extra=64,
    normed_qk=0,
    has_dropout=False,
    element_bytes=2,
    matrix_bytes=2 * 225_000_000,
    packed_bytes=112_500_000,
    norm_bytes=32 * 16384,
    embedding_bytes=1_050_673_152,
    embedding_on_host=True,
    head_bytes=1_050_673_152,
    chunk_bytes=2**28,
    vocabulary=128_256,
    adapter_bytes=8 * 41_943_040,
    paged_bytes=2 * 41_943_040,
)
SHORT = LengthStatistics(longest=(500, 900), mean_micro_batch=334, deviation=120, mean_length=167)
PACKED = LengthStatistics(longest=(2048, 4096, 6144, 8192), mean_micro_batch=8000, deviation=50, mean_length=2000)
LONG = LengthStatistics(longest=(2048,), mean_micro_batch=2000, deviation=50, mean_length=2000)


def planned(rows: LengthStatistics, batch: BatchConfig, gib: float | None, memory: MemoryConfig | None = None) -> Plan:
    planner = Planner(LLAMA_8B, rows, batch, memory or MemoryConfig(), H200)
    return planner.best(None if gib is None else int(gib * GIB))


def test_more_memory_is_never_slower() -> None:
    """From 4 to 130 GiB the predicted time of a step does not rise, and every plan fits."""
    plans = [planned(PACKED, BatchConfig(4, 4), gib) for gib in range(4, 131, 3)]
    for gib, plan in zip(range(4, 131, 3), plans, strict=True):
        assert plan.peak_bytes <= MARGIN * gib * GIB
    for less, more in pairwise(plans):
        assert more.seconds <= less.seconds
    assert plans[0].streamed
    assert not plans[-1].streamed
    assert plans[-1].num_kept == plans[-1].num_cached == 32
    assert any(0 < plan.num_cached < 32 for plan in plans)
    assert any(1 < plan.num_kept < 32 for plan in plans)


def test_8b_in_four_gib_is_streamed_and_in_three_its_inputs_leave_too() -> None:
    """2,048 tokens a pass: in 4 GiB most blocks come from the host, in less all, and block inputs go there."""
    four = planned(LONG, BatchConfig(1, 4, merge="off"), 4)
    assert 16 <= len(four.streamed) <= 32
    assert four.micro_batch_tokens == 2048
    three = planned(LONG, BatchConfig(1, 4, merge="off"), 3)
    assert len(three.streamed) >= 28
    assert three.offloads_inputs
    assert three.peak_bytes <= MARGIN * 3 * GIB
    assert four.host_bytes > 2 * GIB


def test_tiles_are_for_rows_that_do_not_fit_without() -> None:
    """In 4 GiB 8,000 tokens go through the MLPs whole, 13,000 in tiles, and 20,000 not at all."""
    for length, tile in ((8000, 0), (13_000, MLP_TILE)):
        plan = planned(LengthStatistics((length,), length, 0, length), BatchConfig(1, 4), 4)
        assert plan.mlp_tile == tile
        assert plan.peak_bytes <= MARGIN * 4 * GIB
    assert planned(LengthStatistics((20_000,), 20_000, 0, 20_000), BatchConfig(1, 4), 4).peak_bytes > 4 * GIB
    planner = Planner(replace(LLAMA_8B, chunk_bytes=2**20), LONG, BatchConfig(1, 4), MemoryConfig(), H200)
    whole, wide, narrow = (replace(next(iter(planner._choices(True, 2000, 0))), tile=tile) for tile in (0, 1024, 128))
    assert planner.peak(whole) > planner.peak(wide) > planner.peak(narrow)
    one, other = (planner.seconds(replace(choice, graphs=True)) for choice in (whole, wide))
    assert one < other  # what is kept computes gate and up again
    short = planned(LengthStatistics((900,), 900, 0, 900), BatchConfig(1, 4), 1)  # does not fit either, and is one tile
    assert short.mlp_tile == 0


def test_a_small_model_is_not_streamed() -> None:
    """A sixteenth of the weights in 4 GiB: nothing is streamed, and that is said."""
    small = replace(LLAMA_8B, packed_bytes=7_000_000, matrix_bytes=28_000_000, head_bytes=131_072_000, hidden=2048)
    plan = Planner(small, LONG, BatchConfig(1, 16), MemoryConfig(), H200).best(4 * GIB)
    assert plan.streamed == ()
    assert "all weights are on the GPU, nothing is streamed" in str(plan)


def test_a_window_of_short_samples_is_one_pass() -> None:
    """2 x 4 short samples are merged where memory allows, never when that is off, and never beyond what helps."""
    roomy = planned(SHORT, BatchConfig(2, 4), 100)
    assert roomy.merges
    assert 4 * 334 < roomy.micro_batch_tokens <= 4 * 900
    literal = planned(SHORT, BatchConfig(2, 4, merge="off"), 100)
    assert not literal.merges
    assert literal.micro_batch_tokens == 900
    assert planned(PACKED, BatchConfig(4, 16), None).micro_batch_tokens <= 16384


def test_a_pass_that_is_too_large_is_cut() -> None:
    """Four rows of 2,048 tokens at once do not fit in 3 GiB; fewer do, unless merging is off."""
    plan = planned(PACKED, BatchConfig(4, 4), 3)
    assert plan.micro_batch_tokens < 8192
    assert plan.peak_bytes <= MARGIN * 3 * GIB
    assert planned(PACKED, BatchConfig(4, 4, merge="off"), 3).peak_bytes > 3 * GIB


@pytest.mark.parametrize(("checkpointing", "kept"), [("full", 1), ("none", 32), (0, 32), (8, 24), (31, 1), (99, 1)])
def test_what_is_asked_for_is_done(checkpointing: Any, kept: int) -> None:
    """full, none and a number of blocks hold whatever memory there is; the last block is always kept."""
    for gib in (6, 130):
        assert planned(PACKED, BatchConfig(4, 4), gib, MemoryConfig(checkpointing=checkpointing)).num_kept == kept


@pytest.mark.parametrize(("offload", "streamed"), [("none", 0), ("stream", 32)])
def test_streaming_can_be_forbidden_and_demanded(offload: Any, streamed: int) -> None:
    """Whatever memory there is; without it nothing goes to the host, not even inputs."""
    for gib in (3, 130):
        plan = planned(LONG, BatchConfig(1, 4), gib, MemoryConfig(offload=offload))
        assert len(plan.streamed) == streamed
        assert offload == "stream" or not plan.offloads_inputs


def test_a_resumed_run_keeps_its_passes() -> None:
    """Whatever is free now, passes hold what they held: other sums would be rounded otherwise."""
    for gib in (3, 20, 130):
        plan = Planner(LLAMA_8B, SHORT, BatchConfig(2, 4), MemoryConfig(), H200).best(gib * GIB, MicroBatchShape(1234))
        assert (plan.micro_batch_tokens, plan.merges) == (1234, True)


def test_graphs_are_for_cards_that_wait_for_their_host() -> None:
    """A short pass is recorded on an H200, not on a card that computes longer than the host launches."""
    slow: Any = replace(H200, flops=1e13, bandwidth=2e11)
    for card, graphs in ((H200, True), (slow, False)):
        plan = Planner(LLAMA_8B, SHORT, BatchConfig(2, 4), MemoryConfig(), card).best(24 * GIB)
        assert plan.uses_graphs == graphs
        assert (plan.graph_bytes > 0) == (plan.eager_bytes > 0) == graphs
        assert plan.graph_bytes + plan.eager_bytes < plan.peak_bytes


def test_what_graphs_have_beside_them() -> None:
    """Gaps are counted where lengths differ; a validation's longest row has room, and the head's is not exceeded."""
    several = replace(SHORT, length_deviation=85.0)
    for rows in (SHORT, several, replace(several, longest=(2000, 3000))):
        planner = Planner(LLAMA_8B, rows, BatchConfig(2, 4), MemoryConfig(), H200)
        plan = planner.best(24 * GIB)
        assert plan.uses_graphs
        width = math.ceil(plan.micro_batch_tokens / 128) * 128
        assert plan.fragmentation_bytes == plan.graph_bytes * 128 // width  # so many hidden states are 1 MiB
        assert dict(plan.parts)["gaps between graphs"] == (plan.fragmentation_bytes if rows.length_deviation else 0)
        assert rows.longest[0] <= plan.validation_tokens <= plan.micro_batch_tokens
        needed, head = plan.validation_tokens * planner._validated_bytes(), planner._head_bytes(width)
        assert plan.eager_bytes == max(head, needed)
        assert (needed > head) == (rows.longest[0] == 2000)
        assert needed > head - planner._validated_bytes()  # no token more would have room
    short = replace(several, longest=(100,), mean_micro_batch=100)
    plan = planned(short, BatchConfig(1, 1), 24)
    assert plan.uses_graphs
    assert plan.fragmentation_bytes == 0  # all that is small in a shorter pass is small in this one


def test_a_recorded_pass_is_counted_with_its_filling() -> None:
    """As long as the next multiple of 128 tokens; one that is launched has none."""
    planner = Planner(LLAMA_8B, replace(SHORT, longest=(1, 2)), BatchConfig(2, 4), MemoryConfig(), H200)
    first = next(iter(planner._choices(True, 1281, 0)))
    for graphs, tokens in ((True, 1408), (False, 1281)):
        choice = replace(first, graphs=graphs, num_kept=32)
        parts, longer = planner.parts(choice), planner.parts(replace(choice, tokens=tokens))
        assert parts == longer
        assert parts["kept activations"] < planner.parts(replace(choice, tokens=tokens + 1))["kept activations"]


def test_all_that_a_graph_needs_is_counted_with_its_filling() -> None:
    """Also of a run that is resumed, whose passes are no multiple of 128 tokens."""
    several = replace(SHORT, longest=(1250, 1300), length_deviation=85.0)
    planner = Planner(LLAMA_8B, several, BatchConfig(2, 4), MemoryConfig(checkpointing="none", offload="none"), H200)
    short, filled = (planner.best(24 * GIB, MicroBatchShape(tokens)) for tokens in (1281, 1408))
    assert short.uses_graphs
    assert (short.micro_batch_tokens, filled.micro_batch_tokens) == (1281, 1408)
    for name in ("graph_bytes", "fragmentation_bytes", "eager_bytes", "validation_tokens", "num_cached"):
        assert getattr(short, name) == getattr(filled, name) > 0


def test_recorded_passes_are_as_long_as_they_are_padded() -> None:
    """Room that padding takes holds samples; a step of padding fewer is tried too, where it holds the longest row."""
    for longest, given in ((500, 0), (1250, 0), (500, 1281)):
        rows = replace(SHORT, longest=(longest, longest + 400))
        planner = Planner(LLAMA_8B, rows, BatchConfig(2, 4), MemoryConfig(), H200)
        launched, recorded = (
            [n for n, graphs in planner._sizes(given) if graphs == wanted] for wanted in (False, True)
        )
        if given:
            assert launched == recorded == [given]
            continue
        assert len(launched) < len(recorded)
        assert all(n % 128 == 0 and n >= longest for n in recorded)
        for tokens in launched:
            padded = math.ceil(tokens / 128) * 128
            assert (padded in recorded) == (padded <= 4096)
            assert padded - 128 in recorded or padded - 128 < longest
    as_written = Planner(LLAMA_8B, SHORT, BatchConfig(2, 4, merge="off"), MemoryConfig(), H200)
    assert list(as_written._sizes(0)) == [(900, False), (900, True)]


def test_a_validation_s_longer_sample_has_room() -> None:
    """Beside graphs it is counted; where passes are launched only if it needs more than all that training keeps."""
    for longest in (900, 6000):
        rows = replace(SHORT, length_deviation=85.0, longest_validation=longest)
        plan = Planner(LLAMA_8B, rows, BatchConfig(2, 4), MemoryConfig(), H200).best(24 * GIB)
        assert plan.uses_graphs
        assert (plan.validation_tokens == longest) == (longest == 6000)
        assert plan.eager_bytes >= plan.validation_tokens * 2 * (2 * 4096 + 3 * 14336)
    peaks = []
    for longest in (0, 4096, 60_000):
        planner = Planner(LLAMA_8B, replace(LONG, longest_validation=longest), BatchConfig(1, 4), MemoryConfig(), H200)
        choice = replace(next(iter(planner._choices(True, 2048, 0))), graphs=False)
        peaks.append(planner.peak(choice))
    assert peaks[0] == peaks[1] < 60_000 * planner._validated_bytes() < peaks[2]


def test_a_validation_s_longer_sample_goes_in_tiles_where_it_must() -> None:
    """A sample of 14,000 tokens can be validated in 4 GiB whatever is trained on; advice tells how many could be."""
    rows = replace(LONG, longest=(512,), mean_micro_batch=200, deviation=50, mean_length=200)
    plans = [planned(replace(rows, longest_validation=n), BatchConfig(1, 4), 4) for n in (0, 2000, 14_000)]
    assert [plan.mlp_tile for plan in plans] == [0, 0, 1024]
    assert plans[2].peak_bytes <= 4 * GIB
    assert plans[2].micro_batch_shape.mlp_tile == 1024  # which a resumed run is given
    planner = Planner(LLAMA_8B, replace(rows, longest_validation=40_000), BatchConfig(1, 4), MemoryConfig(), H200)
    assert planner.best(4 * GIB).peak_bytes > 4 * GIB
    assert 14_000 < planner.longest_row(4 * GIB) < 20_000


def test_against_measured_peaks() -> None:
    """Within 5 % of what an H200 needed: 8,192 tokens, nothing recomputed, in 37 GiB, three blocks cached."""
    plan = planned(PACKED, BatchConfig(4, 4), 37, MemoryConfig(checkpointing="none"))
    assert plan.peak_bytes == pytest.approx(34.32 * GIB, rel=0.05)  # docs/LOG.md


@pytest.mark.parametrize("quantization", ["nf4", "none", "int8"])
def test_sizes_are_those_of_the_loaded_model(quantization: Any, config: Config) -> None:
    """What is computed from config.json is what the loaded model has: packed blocks, adapters, norms."""
    model = ModelConfig(config.model.name_or_path, quantization=quantization, random_init=True)
    config = replace(config, model=model, optim=OptimConfig(name="adamw"), engine=EngineConfig(kind="auto"))
    sizes = model_sizes(sketch(config, torch.float32).get_base_model(), config, on_gpu=False)
    training = training_of(config, Accelerator(cpu=True))
    causal_lm: Any = training.model.adapted.get_base_model()
    layers = linear_layers(causal_lm.base_model.layers[0])
    if quantization != "int8":
        assert sizes.packed_bytes == Packing(layers).num_bytes
    assert sizes.packed_bytes == sum(map(packed_bytes, layers))
    assert sizes.head_bytes == causal_lm.lm_head.weight.nbytes
    assert sizes.embedding_bytes == causal_lm.get_input_embeddings().weight.nbytes
    trained = sum(p.numel() for p in training.parameters.values())
    assert 16 * trained <= sizes.adapter_bytes <= 16 * trained + 4 * len(training.parameters)
    norms = [p for name, p in causal_lm.named_parameters() if "norm" in name]
    assert sizes.norm_bytes == sum(p.nbytes for p in norms)


def test_transformers_recomputes_all_or_nothing() -> None:
    """The reference engine's plan says so."""
    kept = {value: reference_plan(32, MemoryConfig(checkpointing=value)).num_kept for value in ("auto", "full", "none")}
    assert kept == {"auto": 0, "full": 0, "none": 32}


class Gpu:
    """Stands for a GPU that is out of memory the first `failures` times that a longest pass is tried."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.tried: list[Plan] = []

    def runs(self, training: Any, plan: Plan, longest_validation: int) -> bool:
        self.tried.append(plan)
        return len(self.tried) > self.failures


def on_a_gpu(monkeypatch: pytest.MonkeyPatch, card: Gpu) -> None:
    """Makes `fitted` believe that there is one."""
    monkeypatch.setattr(assembling, "_runs", card.runs)
    monkeypatch.setattr(assembling, "_is_gpu", lambda training: True)


def test_out_of_memory_is_answered_by_smaller_plans(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three failures: each next plan needs less, blocks move to the host, and the step is the same as without."""
    config = replace(config, engine=EngineConfig(kind="fused"), lora=LoraConfig(r=4, alpha=8))
    wanted = [optimizer_step(training_of(config, Accelerator(cpu=True)), 0).loss]
    training = training_of(config, Accelerator(cpu=True))
    card = Gpu(failures=3)
    on_a_gpu(monkeypatch, card)
    monkeypatch.setattr(planning, "CUBLAS_BYTES", 0)  # more than the whole of so small a model
    rows = training.data.length_statistics()
    largest = Outlook.of(config, torch.device("cpu"), rows, 10**12).first_plan()
    ahead = Outlook.of(config, torch.device("cpu"), rows, largest.peak_bytes)
    found = fitted(replace(training, plan=ahead.first_plan()), ahead)
    peaks = [plan.peak_bytes for plan in card.tried]
    assert peaks == sorted(peaks, reverse=True)
    assert len(set(peaks)) == 4
    assert found.plan == card.tried[-1]
    assert [optimizer_step(found, 0).loss] == pytest.approx(wanted, rel=1e-5)


def test_a_run_plans_for_the_longest_sample_of_its_validation(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """train/main.py looks it up in what is held out."""
    config = replace(config, data=replace(config.data, validation_fraction=0.2))
    tokenizer = load_tokenizer(config).backend
    prepared = prepare(prepare_settings(config, config.data.path), tokenizer)
    seen: list[LengthStatistics] = []

    def look(_: Any, __: Any, rows: LengthStatistics, *___: Any) -> None:
        seen.append(rows)
        raise ExitWith(ExitCode.INTERRUPTED, "seen")

    monkeypatch.setattr(outlook.Outlook, "of", look)
    for each in (config, replace(config, data=replace(config.data, validation_fraction=0.0))):
        assert command.main(arguments(each)) == ExitCode.INTERRUPTED
    held_out = hold_out(config, prepared, tokenizer)[1]
    assert held_out is not None
    assert [rows.longest_validation for rows in seen] == [max(held_out["num_tokens"]), 0]


@pytest.mark.parametrize("kind", ["fused", "reference"])
def test_a_validation_s_longer_sample_is_tried(kind: Any, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before training; where it does not fit, a smaller plan is taken, and where it is no longer none of it is run."""
    config = replace(config, engine=EngineConfig(kind=kind), batch=BatchConfig(2, 2))
    training = training_of(config, Accelerator(cpu=True))
    longest = max(training.data.num_tokens)
    monkeypatch.setattr(assembling, "_is_gpu", lambda training: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    tried: list[tuple[int, ...]] = []

    def look(_: Any, arguments: Any) -> None:
        shape = tuple(arguments[0].input_ids.shape)
        if not torch.is_grad_enabled():
            tried.append(shape)
            if len(tried) == 1:
                raise torch.OutOfMemoryError

    training.model.register_forward_pre_hook(look)
    rows = training.data.length_statistics()
    monkeypatch.setattr(planning, "CUBLAS_BYTES", 0)  # more than the whole of so small a model
    budget = Outlook.of(config, torch.device("cpu"), rows, 10**12).first_plan().peak_bytes
    plain = Outlook.of(config, torch.device("cpu"), rows, budget)
    training = replace(training, plan=plain.first_plan())
    assert fitted(training, plain).plan == training.plan
    assert tried == []
    longer = replace(plain, rows=replace(rows, longest_validation=longest + 7))
    found = fitted(training, longer)
    assert len(tried) == 2
    assert set(tried) == {(1 if kind == "fused" else 2, longest + 7)}
    assert found.plan != training.plan
    assert not any(leaf.grad is not None and leaf.grad.any() for leaf in training.flat.leaves)


def test_the_reference_engine_is_cut_into_smaller_passes(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """It recomputes first, then takes fewer rows at a time; the step's loss stays."""
    wanted = optimizer_step(training_of(config, Accelerator(cpu=True)), 0).loss
    training = training_of(config, Accelerator(cpu=True))
    card = Gpu(failures=2)
    on_a_gpu(monkeypatch, card)
    ahead = Outlook.of(config, torch.device("cpu"), training.data.length_statistics(), None)
    found = fitted(training, ahead)
    assert [plan.num_kept for plan in card.tried] == [2, 0, 0]
    longest = max(found.data.num_tokens)
    sizes = [batch.input_ids.numel() for batch in found.data.batch(0, found.plan).micro_batches]
    assert len(sizes) > 4
    assert max(sizes) <= longest
    assert optimizer_step(found, 0).loss == pytest.approx(wanted, rel=1e-5)


def test_when_nothing_smaller_is_left_that_is_said(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clear end before training instead of one at step 3,000."""
    training = training_of(config, Accelerator(cpu=True))
    on_a_gpu(monkeypatch, Gpu(failures=99))
    ahead = Outlook.of(config, torch.device("cpu"), training.data.length_statistics(), None)
    with pytest.raises(ExitWith, match="out of memory at the longest pass"):
        fitted(training, ahead)


@needs_shared
def test_what_would_fit_instead(config: Config) -> None:
    """An 8B with rows of 100,000 tokens in 4 GiB: refused before a weight is read, with a length that would fit."""
    config = replace(config, model=ModelConfig(str(SHARED / "llama31_8b"), dtype="bf16"), memory=MemoryConfig())
    rows = LengthStatistics((100_000,), 100_000, 0, 100_000)
    ahead = Outlook.on_card(config, H200, rows, 4 * GIB)
    with pytest.raises(ExitWith, match=r"What would fit: --data\.max_length \d+") as error:
        ahead.first_plan()
    length = int(str(error.value.reason).split("--data.max_length ")[1].split(",")[0])
    fits = Outlook.on_card(config, H200, LengthStatistics((length,), length, 0, length), 4 * GIB)
    assert fits.first_plan().peak_bytes <= 4 * GIB
    assert length > 2048


def test_cards_are_known_by_their_names() -> None:
    """As nvidia-smi has them, and as people write them; others are not guessed."""
    names = {
        "NVIDIA H200": "H200",
        "NVIDIA H100 80GB HBM3": "H100",
        "NVIDIA A100-SXM4-80GB": "A100-80",
        "NVIDIA A100-PCIE-40GB": "A100-40",
        "a100-40": "A100-40",
        "NVIDIA GeForce RTX 4090": "RTX-4090",
        "Tesla T4": "T4",
        "NVIDIA GeForce GTX 1050 Ti": "GTX-1050-Ti",
        "gtx-1050-ti": "GTX-1050-Ti",
    }
    for written, name in names.items():
        card = known_gpu(written)
        assert card is not None
        assert card.name == name
    assert known_gpu("NVIDIA L40") is None
    assert len({card.name for card in KNOWN}) == len(KNOWN)


def storages(thing: Any, found: dict[int, int]) -> dict[int, int]:
    """Bytes of every storage that tensors in a dataclass or list stand on, by address."""
    if isinstance(thing, torch.Tensor):
        storage = thing.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    elif isinstance(thing, list):
        for each in thing:
            storages(each, found)
    elif hasattr(thing, "__dataclass_fields__"):
        for each in vars(thing).values():
            storages(each, found)
    return found


@pytest.mark.parametrize("tile", [0, 128])
@pytest.mark.parametrize("family", FAMILIES)
def test_kept_activations_are_what_a_block_keeps(family: str, tile: int) -> None:
    """Of each family of models, within 5 %: the tensors that the backward pass of a block reads."""
    shape, targets = FAMILIES[family]
    config: Any = type("Config", (), {"optim": OptimConfig()})
    # on a card with flash kernels attention keeps no more than a CPU's, whose heads are not repeated here
    shape = type(shape)(**shape.to_dict() | {"num_key_value_heads": 4})
    causal_lm = adapted_model(shape, targets).get_base_model()
    sizes = model_sizes(causal_lm, config, on_gpu=False)
    batch = collate_packed([{"input_ids": [1] * 500, "trained": [True] * 500}])
    engine = Engine(causal_lm, Plan(True, True, 500, 3, 3), HostBlocks([], pin=False))
    kept: Any = []
    stack = engine.stack
    hidden = causal_lm.base_model.embed_tokens(batch.input_ids[0]).detach()
    cos, sin = causal_lm.base_model.rotary_emb(hidden[None], batch.position_ids)
    with torch.no_grad():
        stack.forward(hidden, Pass(cos[0], sin[0], engine.attend_for(batch), 0.0, torch.tensor(0), tile), kept)
    middle = storages(kept[1].activations, {})
    middle.pop(kept[1].activations.x.untyped_storage().data_ptr())  # counted among the inputs
    rows = LengthStatistics((500,), 500, 0, 500)
    card = replace(H200, has_graphs=False)
    planner = Planner(replace(sizes, element_bytes=4), rows, BatchConfig(1, 1), MemoryConfig(), card)
    choice = next(iter(planner._choices(True, 500, 0)))
    predicted = planner.parts(replace(choice, num_kept=1, tile=tile))["kept activations"]
    without_flash = 500 * 4 * 3 * sizes.query  # the plan counts with what fp32 on a GPU keeps more
    if targets == ALL:
        assert sum(middle.values()) == pytest.approx(predicted - without_flash, rel=0.05)
    else:  # adapters of all layers are counted
        assert sum(middle.values()) <= predicted - without_flash


def test_a_resumed_run_on_a_smaller_card_goes_on_in_smaller_passes(config: Config) -> None:
    """Passes that do not fit any more are given up, where they fit they are kept; nobody is told to change the data."""
    planner = Planner(LLAMA_8B, SHORT, BatchConfig(2, 16), MemoryConfig(), H200)
    ahead = Outlook(config, SHORT, planner, "", None, 32, None)
    started = replace(ahead, budget=130 * GIB).first_plan()
    again = replace(ahead, budget=100 * GIB, saved=started.micro_batch_shape).first_plan()
    assert again.micro_batch_tokens == started.micro_batch_tokens > 4000
    small = replace(ahead, budget=int(2.6 * GIB), saved=started.micro_batch_shape).first_plan()
    assert small.micro_batch_tokens < started.micro_batch_tokens
    assert small.peak_bytes <= int(2.6 * GIB)


def test_dropout_and_old_cards_take_more() -> None:
    """A model with dropout, one whose heads are normed, and a card without Triton are planned with more memory."""
    plain = Planner(LLAMA_8B, LONG, BatchConfig(1, 4), MemoryConfig(), H200)
    choice = replace(next(iter(plain._choices(True, 2048, 0))), num_kept=4)
    wide = replace(LLAMA_8B, inner=40_000)
    for less, more in ((wide, replace(wide, has_dropout=True)), (LLAMA_8B, replace(LLAMA_8B, normed_qk=5120))):
        peaks = [Planner(s, LONG, BatchConfig(1, 4), MemoryConfig(), H200).peak(choice) for s in (less, more)]
        assert peaks[0] < peaks[1]
    old: Any = replace(H200, capability=(6, 1))
    assert Planner(LLAMA_8B, LONG, BatchConfig(1, 4), MemoryConfig(), old).peak(choice) > plain.peak(choice)


def test_the_longest_pass_is_the_longest(config: Config) -> None:
    """Of packed rows on the reference engine all rows of a pass count; filling makes it no longer than the plan."""
    packed = replace(config, data=replace(config.data, packing=True), batch=BatchConfig(4, 2))
    training = training_of(packed, Accelerator(cpu=True))
    longest = assembling.longest_pass(training, training.plan)
    windows = [training.data.batch(step, training.plan) for step in range(training.data.steps_per_epoch)]
    assert longest.input_ids.numel() >= max(b.input_ids.numel() for w in windows for b in w.micro_batches)
    data = training.data
    data.num_tokens = [1000] * 6
    for total in (6000, 6144, 7000, 1000):
        plan = Plan(True, True, total, num_blocks=2, num_kept=2, uses_graphs=True, num_samples=40)
        longest = assembling.longest_pass(training, plan)
        assert longest.input_ids.numel() <= max(total, 1024)
        assert longest.cu_seqlens is not None
        assert len(longest.cu_seqlens) == 41
        assert longest.cu_seqlens[-1] == longest.input_ids.numel()


def test_padding_counts_where_micro_batches_are_merged() -> None:
    """Six samples of 1,000 tokens, each padded to 1,024: five are a micro-batch of 6,000 tokens, six one of 6,144."""
    for max_tokens, sizes in ((6000, [5, 1]), (6144, [6])):
        micro_batches = regroup([[i] for i in range(6)], [1000] * 6, is_padded=False, max_tokens=max_tokens)
        assert [len(members) for members in micro_batches] == sizes


@pytest.mark.parametrize("tokens", [2000, 800])
def test_grouped_samples_are_counted_at_their_most(tokens: int, config: Config) -> None:
    """A window of nothing but short samples has more of them in a pass than lengths drawn at random would have."""
    lengths = torch.randint(20, 401, (3200,), generator=torch.Generator().manual_seed(0)).tolist()
    grouped = replace(config, data=replace(config.data, group_by_length=True), batch=BatchConfig(1, 32))
    data = training_of(grouped, Accelerator(cpu=True)).data
    data.num_tokens, data.row_tokens = lengths, lengths
    data.rows, data.steps_per_epoch = [[i] for i in range(3200)], 100
    steps = [[[i] for i in data.row_ids(step)] for step in range(100)]
    seen = [max(map(len, regroup(passes, lengths, False, tokens))) for passes in steps]
    most = data.length_statistics().samples(32, tokens)
    assert max(seen) == most == 32
    assert replace(data.length_statistics(), length_deviation=pstdev(lengths)).samples(32, tokens) < 32


@pytest.mark.parametrize("per_device", [1, 2])
@pytest.mark.parametrize("tokens", [4300, 3700, 3400, 3000, 2000, 1300, 800])
def test_passes_are_counted_as_they_are_cut(tokens: int, per_device: int, config: Config) -> None:
    """Steps of 16 samples of 20 to 400 tokens: what is expected lies within 10 % of what cutting makes of them.

    No pass has more samples than memory was counted for.
    """
    data = training_of(config, Accelerator(cpu=True)).data
    lengths = torch.randint(20, 401, (3200,), generator=torch.Generator().manual_seed(0)).tolist()
    data.num_tokens, data.layout = lengths, BatchLayout(per_device, 16 // per_device, 1, 0)
    data.rows, data.row_tokens = [[i] for i in range(3200)], lengths
    rows = data.length_statistics()
    steps = []
    for first in range(0, 3200, 16):
        passes = [list(range(start, start + per_device)) for start in range(first, first + 16, per_device)]
        steps.append(regroup(passes, lengths, False, tokens))
    expected = rows.num_micro_batches(16 // per_device, tokens)
    assert expected == pytest.approx(fmean(map(len, steps)), rel=0.1)
    most = rows.samples(16 // per_device, tokens)
    assert 0.4 * most <= max(len(members) for step in steps for members in step) <= most


def test_passes_of_rows_of_one_length() -> None:
    """As many as it takes; rows that are seldom shorter need no more."""
    even = LengthStatistics((400,), 400, 0.0, 400)
    assert [even.num_micro_batches(16, n) for n in (400, 800, 1600, 6400, 9000)] == [16, 8, 4, 1, 1]
    assert LengthStatistics((2048,), 1500, 0.0, 1500).num_micro_batches(4, 2048) == 4  # two of 1,500 never are one pass
    nearly = LengthStatistics((2048,), 2000, 120, 2000)
    assert nearly.num_micro_batches(4, 8192) == 1
    assert nearly.num_micro_batches(4, 4096) == pytest.approx(2, rel=0.02)


def test_many_short_samples_take_memory() -> None:
    """Attention's backward pass keeps 128 rows of fp32 more for each: rows of 100 samples are planned with it."""
    sizes = replace(LLAMA_8B, inner=1000, chunk_bytes=2**20)  # so that attention is the worst moment
    few, many = PACKED, replace(PACKED, mean_length=20, max_samples=400)
    planners = [Planner(sizes, rows, BatchConfig(4, 4), MemoryConfig(), H200) for rows in (few, many)]
    choice = next(iter(planners[0]._choices(True, 8192, 0)))
    assert (few.samples(4, 8192), many.samples(4, 8192)) == (4, 410)
    assert planners[1].peak(choice) - planners[0].peak(choice) == (410 - 4) * 128 * 4096 * 4


def test_a_resumed_run_keeps_its_tiles(config: Config) -> None:
    """What a checkpoint says of a step's passes; other layouts, or nothing saved, begin anew."""
    planner = Planner(LLAMA_8B, LONG, BatchConfig(1, 4), MemoryConfig(), H200)
    for saved in (MicroBatchShape(2048, 1024), MicroBatchShape(2048)):
        assert planner.best(100 * GIB, saved).micro_batch_shape == saved
    training = training_of(config, Accelerator(cpu=True))
    tiled = replace(training, plan=replace(training.plan, micro_batch_tokens=96, mlp_tile=32))
    checkpoint: Any = SimpleNamespace(state=SimpleNamespace(layout=layout(tiled)))
    assert saved_shape(checkpoint, training.data, config.batch.merge) == MicroBatchShape(96, 32)
    assert saved_shape(None, training.data, config.batch.merge) is None
    del checkpoint.state.layout["tokens in a tile"]  # an older checkpoint
    assert saved_shape(checkpoint, training.data, config.batch.merge) == MicroBatchShape(96)
    checkpoint.state.layout["processes"] = 2
    assert saved_shape(checkpoint, training.data, config.batch.merge) is None


def test_host_memory_is_planned_too() -> None:
    """A host with little memory streams fewer blocks; one that has too little for any plan is told before loading."""
    planner = Planner(LLAMA_8B, LONG, BatchConfig(1, 4, merge="off"), MemoryConfig(), H200)
    rich = planner.best(6 * GIB)
    assert len(rich.streamed) > 8
    planner.host_room = 2 * GIB
    poor = planner.best(6 * GIB)
    assert poor.host_bytes <= 2 * GIB < rich.host_bytes
    assert poor.peak_bytes <= 6 * GIB
    config: Any = None  # not looked at
    ahead = Outlook(config, LONG, planner, "", 3 * GIB, 32, None)
    with pytest.raises(ExitWith, match=r"GiB of host memory and 2\.0 GiB may be taken"):
        ahead.check_host(ahead.first_plan())


@needs_shared
@pytest.mark.parametrize(
    ("offload", "gib", "r", "remedies"),
    [
        ("none", 2, 8, {"--memory.offload auto"}),
        ("auto", 2, 8, set()),
        ("auto", 3, 128, {"a lower --lora.r"}),
    ],
)
def test_remedies_are_those_that_help(offload: Any, gib: int, r: int, remedies: set[str], config: Config) -> None:
    """Streaming where it was forbidden, a lower rank where adapters are the matter, a budget where one was set."""
    memory = MemoryConfig(offload=offload, budget=f"{gib}GiB")
    asked = replace(config, model=ModelConfig(str(SHARED / "llama31_8b"), dtype="bf16"), memory=memory)
    ahead = Outlook.on_card(replace(asked, lora=LoraConfig(r=r)), H200, LONG, gib * GIB)
    with pytest.raises(ExitWith, match="What would fit") as error:
        ahead.first_plan()
    told = {each for each in ("--memory.offload auto", "a lower --lora.r") if each in error.value.reason}
    assert told == remedies
    assert "a larger --memory.budget" in error.value.reason


def test_streaming_that_is_not_needed_is_called_so() -> None:
    """In 12 GiB an 8B would fit without, in 4 it would not."""
    for gib, is_needed in ((4, True), (12, False)):
        plan = planned(LONG, BatchConfig(1, 4), gib)
        assert plan.streamed
        assert plan.needs_host == is_needed
        assert ("it would fit without" in str(plan)) != is_needed

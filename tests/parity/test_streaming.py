"""Blocks that come from host memory: the same bits, each copy in its turn, no slot written while it is read."""

import json
import time
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from data_tools.prepare import first_conversations
from tests.conftest import training_of
from tests.parity.models import ALL, SIZES, adapted_model, gradients_of, packed
from train.collate import MicroBatch
from train.config import Config, EngineConfig, LoraConfig, MemoryConfig, ModelConfig
from train.data import prepare_settings
from train.deliver.compare import compare
from train.deliver.generation import Generator
from train.engine import decoder
from train.engine.block import Block
from train.engine.copies import Copies, ThreadCopies
from train.engine.decoder import FusedDecoder
from train.engine.families import decoder_layers
from train.engine.host_stream import HostBlocks, HostStream
from train.engine.packed_source import packed_source
from train.engine.plan import Plan, spread
from train.engine.weight_store import WeightStore
from train.models.tokenizer import load_tokenizer
from train.step import optimizer_step

NUM_BLOCKS = 5


Clock = dict[str, int]  # of each queue, how much of its work is known to be done


@dataclass
class Access:
    """What has been done to a piece of memory, as (queue, number of the deed)."""

    last_write: tuple[str, int] = ("compute", 0)
    reads: list[tuple[str, int]] = field(default_factory=list)


@dataclass
class Queues:
    """The computation and the queues of copies as vector clocks: whatever is not ordered by an event is a race.

    Copies are made at once, which is as good as any order where the events order them, and the check does not depend
    on luck: it compares who knows of whom, not what happened to come first.
    """

    clocks: dict[str, Clock] = field(default_factory=lambda: {"compute": {}})
    touched: dict[int, Access] = field(default_factory=dict)  # by address
    copied: list[tuple[str, int]] = field(default_factory=list)

    def act(self, queue: str, reads: list[torch.Tensor], writes: list[torch.Tensor]) -> None:
        """Something that `queue` does; raises AssertionError where another may still be doing what excludes it."""
        clock = self.clocks.setdefault(queue, {})
        clock[queue] = clock.get(queue, 0) + 1
        now = (queue, clock[queue])
        for tensor in reads:
            access = self.touched.setdefault(tensor.data_ptr(), Access())
            assert self.knows(queue, access.last_write), f"{queue} reads what {access.last_write} may still write"
            access.reads.append(now)
        for tensor in writes:
            access = self.touched.setdefault(tensor.data_ptr(), Access())
            for other in (access.last_write, *access.reads):
                assert self.knows(queue, other), f"{queue} overwrites what {other} may still use"
            self.touched[tensor.data_ptr()] = Access(last_write=now)

    def knows(self, queue: str, deed: tuple[str, int]) -> bool:
        return self.clocks[queue].get(deed[0], 0) >= deed[1]

    def hear(self, queue: str, event: Clock) -> None:
        clock = self.clocks.setdefault(queue, {})
        for other, count in event.items():
            clock[other] = max(clock.get(other, 0), count)


class CheckedCopies:
    """Copies whose order is proved; `forget` names an event that is dropped, to see that it is needed."""

    def __init__(self, queues: Queues, name: str, forget: str = "") -> None:
        self.queues, self.name, self.forget = queues, name, forget

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Any) -> Any:
        if self.forget != "after":
            self.queues.hear(self.name, after)
        self.queues.act(self.name, [source], [target])
        self.queues.copied.append((self.name, source.data_ptr()))
        target.copy_(source)
        return dict(self.queues.clocks[self.name])

    def wait(self, event: Any) -> None:
        if self.forget != "wait":
            self.queues.hear("compute", event)

    def mark(self) -> Any:
        return dict(self.queues.clocks["compute"])


def streaming(numbers: list[int], **changes: Any) -> tuple[Any, Plan, HostBlocks]:
    """A model of five blocks with these in host memory, its plan, and the host's blocks."""
    adapted = adapted_model(LlamaConfig(**SIZES | {"num_hidden_layers": NUM_BLOCKS}), ALL, dropout=0.2)
    host = HostBlocks(numbers, pin=False)
    for number in range(NUM_BLOCKS):
        host.offload(number, decoder_layers(adapted.get_base_model())[number])
    plan = Plan(
        is_fused=True, merges=True, micro_batch_tokens=64, num_blocks=NUM_BLOCKS, num_kept=1, streamed=(*numbers,)
    )
    return adapted, replace(plan, **changes), host


def result(adapted: Any, plan: Plan, host: HostBlocks, batch: MicroBatch, passes: int = 3) -> torch.Tensor:
    """Outputs and gradients of some passes, with a validation in between, in one row."""
    engine = FusedDecoder(adapted.get_base_model(), plan, host)
    found = []
    for number in range(passes):
        torch.manual_seed(number)
        out = engine(batch)
        out.backward(torch.ones_like(out))
        found.append(out.detach().flatten())
        with torch.no_grad():
            found.append(engine(batch).flatten())
    return torch.cat([*found, *(gradient.flatten() for gradient in gradients_of(adapted).values())])


@pytest.mark.parametrize("num_kept", [1, 3, 5])
@pytest.mark.parametrize("numbers", [[0, 1, 2, 3, 4], [1, 3, 4], [0], [2, 4]])
@pytest.mark.parametrize("offloads_inputs", [False, True])
def test_streamed_blocks_give_the_same_bits(num_kept: int, numbers: list[int], offloads_inputs: bool) -> None:
    """All, some or one block streamed, inputs on the host or not, with dropout: outputs and gradients to the bit."""
    batch = packed()
    torch.manual_seed(0)
    wanted = result(*streaming([], num_kept=num_kept), batch)
    torch.manual_seed(0)
    found = result(*streaming(numbers, num_kept=num_kept, offloads_inputs=offloads_inputs), batch)
    assert wanted.norm() > 0
    assert torch.equal(found, wanted)


def checked(monkeypatch: pytest.MonkeyPatch, queues: Queues, forget: tuple[str, str] = ("", "")) -> None:
    """Makes engines copy by CheckedCopies, and reports what computation reads and writes."""
    names = iter(["weights", "out", "back"])

    def copies_for(_: torch.device) -> Copies:
        name = next(names)
        return CheckedCopies(queues, name, forget[1] if name == forget[0] else "")

    monkeypatch.setattr(decoder, "copies_for", copies_for)
    give, forward = HostStream.give, Block.forward

    def watched_give(self: HostStream, number: int) -> None:
        queues.act("compute", [self.slot_of[number].buffer], [])  # what was launched since `take` has read it
        give(self, number)

    def watched_forward(self: Any, matrices: Any, x: torch.Tensor, shared: Any) -> Any:
        queues.act("compute", [x], [])
        return forward(self, matrices, x, shared)

    monkeypatch.setattr(HostStream, "give", watched_give)
    monkeypatch.setattr(Block, "forward", watched_forward)


@pytest.mark.parametrize("numbers", [[0, 1, 2, 3, 4], [1, 3, 4], [2]])
def test_no_slot_is_written_while_it_is_read(numbers: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Three micro-batches and validations: a copy comes after its slot's last reader, every reader after its copy."""
    queues = Queues()
    checked(monkeypatch, queues)
    result(*streaming(numbers, offloads_inputs=True), packed())
    assert sum(name == "weights" for name, _ in queues.copied) >= 6 * max(0, len(numbers) - 2)
    assert any(name == "out" for name, _ in queues.copied)
    assert any(name == "back" for name, _ in queues.copied)


EVENTS = [(name, event) for name in ("weights", "out", "back") for event in ("after", "wait")]


@pytest.mark.parametrize("forget", EVENTS)
def test_every_event_is_needed(forget: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any one of the events the check finds a race: it can fail."""
    checked(monkeypatch, Queues(), forget)
    with pytest.raises(AssertionError, match="may still"):
        result(*streaming([0, 1, 2, 3, 4], offloads_inputs=True), packed())


def test_the_order_of_fetches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward 0, 1, ..., backward ..., 1, 0; what is still in a slot, or dequantised, is not fetched again."""
    queues = Queues()
    checked(monkeypatch, queues)
    adapted, plan, host = streaming([0, 1, 2, 3, 4])
    names = {buffer.data_ptr(): number for number, buffer in host.buffers.items()}
    engine = FusedDecoder(adapted.get_base_model(), plan, host)
    order = []
    for _ in range(2):
        queues.copied.clear()
        out = engine(packed())
        forward = len(queues.copied)
        out.backward(torch.ones_like(out))
        fetched = [names[address] for _, address in queues.copied]
        order.append((fetched[:forward], fetched[forward:]))
    assert order == [([0, 1, 2, 3, 4], [2, 1, 0]), ([2, 3, 4], [2, 1, 0])]


class Tape:
    """Copies that can be captured, as in a CUDA graph: what is captured does not happen until it is replayed."""

    def __init__(self) -> None:
        self.capturing: list[Any] | None = None
        self.num_copies = 0  # asked for, captured or not
        self.pending: dict[int, int] = {}  # target's address -> the copy into it that was not waited for

    def do(self, action: Any) -> None:
        if self.capturing is None:
            action()
        else:
            self.capturing.append(action)

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Any) -> Any:
        self.num_copies += 1
        self.do(lambda: target.copy_(source))
        if self.capturing is None:
            self.pending[target.data_ptr()] = self.num_copies
        return self.num_copies

    def wait(self, event: Any) -> None:
        self.pending = {target: copy for target, copy in self.pending.items() if copy != event}

    def mark(self) -> Any:
        return "now"


class Captured:
    """A store whose passes are captured once, and what else may happen between replays."""

    def __init__(self, numbers: list[int]) -> None:
        self.tape = Tape()
        adapted, plan, self.host = streaming(numbers)
        self.causal_lm: Any = adapted.get_base_model()
        blocks = FusedDecoder(self.causal_lm, plan, self.host).stack.blocks
        layers, like = decoder_layers(self.causal_lm), self.causal_lm.base_model.norm.weight
        self.source = packed_source(layers, self.host, like.device, lambda: self.tape)
        self.store = WeightStore(blocks, 0, like, self.source)
        self.store._fill_base = self.fill  # type: ignore[method-assign]
        self.layers = layers
        self.made: list[int] = []
        self.tapes: list[list[Any]] = [[], []]
        self.orders = (range(NUM_BLOCKS), range(NUM_BLOCKS - 1, -1, -1))
        self.store.before_replay(self.orders[0])
        for captured, ask in zip(self.tapes, (self.validate, self.back), strict=True):
            self.tape.capturing = captured
            ask()
        self.tape.capturing = None
        self.store.forget_shared()

    def fill(self, block: Any, matrices: Any) -> None:
        """Stands for WeightStore._fill_base: when it happens, the block's weights must be its own."""
        number = block.number
        weights = self.source.take(number)
        wanted = self.host.weights.get(number) or [linear.weight for linear in self.layers[number].linears]

        def check() -> None:
            self.made.append(number)
            for weight, own in zip(weights, wanted, strict=True):
                assert torch.equal(weight, own)

        self.tape.do(check)
        self.source.give(number)

    def ask(self, order: range) -> None:
        self.store.begin(order)
        for number in order:
            self.store.matrices(number)
            self.tape.do(partial(self.is_in_place, number))

    def is_in_place(self, number: int) -> None:
        assert self.made[-1] == number, "the shared place holds another block"

    def validate(self) -> None:
        self.ask(range(NUM_BLOCKS))

    def back(self) -> None:
        self.ask(range(NUM_BLOCKS - 1, -1, -1))

    def train_eagerly(self) -> None:
        self.validate()
        self.back()

    def replay(self, num_passes: int = 2) -> None:
        for captured, order in list(zip(self.tapes, self.orders, strict=True))[:num_passes]:
            self.store.before_replay(order)
            assert not self.tape.pending, "a graph cannot wait for a copy that began before it"
            for action in captured:
                action()
            self.store.after_replay(order)

    def replay_without_backward(self) -> None:
        """As where the loss runs out of memory."""
        self.replay(1)

    def answer(self) -> None:
        decoder, batch = self.causal_lm.base_model, packed()
        with self.source.lent(), torch.no_grad():
            decoder(batch.input_ids, position_ids=batch.position_ids, use_cache=False)


@pytest.mark.parametrize("numbers", [[0, 1, 2, 3, 4], [1, 3, 4], [0, 2], [4]])
def test_a_replay_finds_what_its_capture_found(numbers: list[int]) -> None:
    """Replays, validations, eager passes and answers in any order: every block is made of its own weights."""
    run = Captured(numbers)
    deeds = [run.replay, run.replay, run.validate, run.train_eagerly, run.answer, run.store.release]
    deeds.append(run.replay_without_backward)
    random = [deeds[number] for number in torch.randint(len(deeds), (60,)).tolist()]
    for deed in (run.train_eagerly, run.replay_without_backward, run.validate, *random):
        deed()
    assert len(run.made) > 100
    run.replay()
    before = run.tape.num_copies
    run.replay()
    assert run.tape.num_copies == before  # what one replay leaves is what the next one wants


class Slow(ThreadCopies):
    """A thread that takes its time."""

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Any) -> Any:
        def late() -> None:
            time.sleep(0.01)
            target.copy_(source)

        return self.thread.submit(late)


@pytest.mark.parametrize("offloads_inputs", [False, True])
@pytest.mark.parametrize("at_call", [1, 2, 4])
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_a_pass_that_raised_is_followed_by_a_right_one(
    name: str, at_call: int, offloads_inputs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copies that a failed pass had begun and not waited for are waited for by the next."""
    batch = packed()
    torch.manual_seed(0)
    wanted = result(*streaming([]), batch, passes=1)
    monkeypatch.setattr(decoder, "copies_for", lambda _: Slow())
    torch.manual_seed(0)
    adapted, plan, host = streaming([0, 1, 2, 3, 4], offloads_inputs=offloads_inputs)
    real, failures = getattr(Block, name), iter([False] * (at_call - 1) + [True])

    def failing(*arguments: Any) -> Any:
        if next(failures, False):
            raise torch.OutOfMemoryError("no more")
        return real(*arguments)

    monkeypatch.setattr(Block, name, failing)
    engine = FusedDecoder(adapted.get_base_model(), plan, host)
    with pytest.raises(torch.OutOfMemoryError):
        engine(batch).sum().backward()
    gradients_of(adapted)
    torch.manual_seed(0)  # as `result` has it
    out = engine(batch)
    out.backward(torch.ones_like(out))
    with torch.no_grad():
        found = [out.detach().flatten(), engine(batch).flatten()]
    found += [gradient.flatten() for gradient in gradients_of(adapted).values()]
    assert torch.equal(torch.cat(found), wanted)


def test_a_slow_bus_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Copies by a thread that takes its time: the same bits."""
    batch = packed()
    torch.manual_seed(0)
    wanted = result(*streaming([]), batch, passes=1)
    monkeypatch.setattr(decoder, "copies_for", lambda _: Slow())
    torch.manual_seed(0)
    assert torch.equal(result(*streaming([0, 1, 2, 3, 4], offloads_inputs=True), batch, passes=1), wanted)


def streamed(config: Config) -> Config:
    return replace(config, engine=EngineConfig(kind="fused"), memory=MemoryConfig(offload="stream"))


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_steps_streamed_and_not(quantization: Any, config: Config) -> None:
    """Losses and adapters of ten steps are equal to the bit, and every block's weights were in host memory."""
    config = replace(config, model=replace(config.model, quantization=quantization), lora=LoraConfig(r=4, dropout=0.1))
    fused = replace(config, engine=EngineConfig(kind="fused"))
    runs = [training_of(each, Accelerator(cpu=True)) for each in (fused, streamed(config))]
    assert [run.plan.streamed for run in runs] == [(), (0, 1)]
    curves = [[optimizer_step(run, step).loss for step in range(10)] for run in runs]
    assert curves[0] == curves[1]
    assert all(torch.equal(a, b) for a, b in zip(runs[0].parameters.values(), runs[1].parameters.values(), strict=True))


@pytest.mark.parametrize("names", ["model.layers", "layers"])
def test_a_base_is_read_block_by_block(names: str, config: Config, tmp_path: Any) -> None:
    """Weights from files, quantised one block after another, are those that transformers loads, to the bit."""
    shape = LlamaConfig(**SIZES | {"vocab_size": 600, "hidden_size": 128, "tie_word_embeddings": False})
    AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).save_pretrained(tmp_path, max_shard_size="200KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    GenerationConfig(repetition_penalty=1.5).save_pretrained(tmp_path)
    for file in Path(config.model.name_or_path).glob("*token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    if names == "layers":  # as a decoder that was saved without its head names them, but for the head
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        for file in set(index["weight_map"].values()):
            tensors = {name.removeprefix("model."): t for name, t in load_file(tmp_path / file).items()}
            save_file(tensors, tmp_path / file)
        index["weight_map"] = {name.removeprefix("model."): f for name, f in index["weight_map"].items()}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    config = replace(config, model=ModelConfig(name_or_path=str(tmp_path)))
    both = (replace(config, engine=EngineConfig(kind="fused")), streamed(config))
    found: list[Any] = [training_of(each, Accelerator(cpu=True)).model.adapted.get_base_model() for each in both]
    whole, parts = found
    for one, other in zip(decoder_layers(whole), decoder_layers(parts), strict=True):
        for a, b in zip(one.linears, other.linears, strict=True):
            first, second = cast(Any, a.weight), cast(Any, b.weight)
            assert torch.equal(first.data, second.data)
            assert torch.equal(first.quant_state.absmax, second.quant_state.absmax)
            assert torch.equal(first.quant_state.offset, second.quant_state.offset)
    assert torch.equal(whole.lm_head.weight, parts.lm_head.weight)
    assert parts.generation_config.repetition_penalty == whole.generation_config.repetition_penalty == 1.5
    # where a single file lies beside the index, it is the one that is read
    AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).save_pretrained(tmp_path / "other")
    (tmp_path / "other" / "model.safetensors").rename(tmp_path / "model.safetensors")
    again: list[Any] = [training_of(each, Accelerator(cpu=True)).model.adapted.get_base_model() for each in both]
    whole, parts = again
    assert torch.equal(whole.lm_head.weight, parts.lm_head.weight)


def test_a_model_that_is_streamed_answers(config: Config) -> None:
    """Generation by transformers gets each layer's weights in turn: the resident model's answers, twice."""
    tokenizer = load_tokenizer(config).backend
    asked = first_conversations(prepare_settings(config, config.data.path), 3)
    answers = []
    for each in (replace(config, engine=EngineConfig(kind="fused")), streamed(config)):
        training = training_of(each, Accelerator(cpu=True))
        for step in range(3):
            optimizer_step(training, step)
        answers.append([compare(Generator(training.model, tokenizer, [0], 12), asked, lambda: False) for _ in range(2)])
        assert optimizer_step(training, 3).loss > 0  # the engine takes its memory again
    assert answers[0] == answers[1]
    assert answers[0][0][0].after


def test_questions_are_asked_again_where_memory_ends_within_a_pass(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer that runs out of memory once: fewer questions at a time, the same answers, weights back on the host."""
    tokenizer = load_tokenizer(config).backend
    asked = first_conversations(prepare_settings(config, config.data.path), 4)
    training = training_of(streamed(config), Accelerator(cpu=True))
    wanted = compare(Generator(training.model, tokenizer, [0], 6), asked, lambda: False)
    causal_lm: Any = training.model.adapted.get_base_model()
    mlp, failures = causal_lm.base_model.layers[1].mlp, iter([False, True])
    real = mlp.forward

    def failing(x: torch.Tensor) -> torch.Tensor:
        if next(failures, False):
            raise torch.OutOfMemoryError("no more")
        return real(x)

    monkeypatch.setattr(mlp, "forward", failing)
    assert compare(Generator(training.model, tokenizer, [0], 6), asked, lambda: False) == wanted
    for number, layer in enumerate(decoder_layers(causal_lm)):
        for linear, weight in zip(layer.linears, training.model.host.weights[number], strict=True):
            assert linear.weight is weight


def test_streamed_blocks_are_spread() -> None:
    """As many as asked for, the last one among them, those of fewer among those of more, and about evenly."""
    for total in (1, 5, 22, 32):
        before: set[int] = set()
        for count in range(total + 1):
            numbers = spread(count, total)
            assert len(numbers) == count
            assert not count or numbers[-1] == total - 1
            assert before <= set(numbers)
            before = set(numbers)
            gaps = [b - a for a, b in pairwise([-1, *numbers])]
            assert not gaps or max(gaps) <= 2 * (total + 1) / (count + 0.5) + 1

"""The fused engine computes what transformers and PEFT compute: each function, each family of models, whole steps."""

import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.conftest import training_of, with_batch
from train.collate import MicroBatch, collate_packed
from train.config import LLAMA_LINEAR_LAYERS, Config, EngineConfig
from train.data import BatchLayout
from train.engine import families, operations
from train.engine.block import Block, ForwardContext
from train.engine.decoder import FusedDecoder
from train.engine.families import unsupported_reason
from train.engine.host_stream import HostBlocks
from train.engine.layers import Projection
from train.engine.lora_linear import LoraGroup, dequantize
from train.engine.operations import Dropout
from train.engine.plan import Plan
from train.models.language_model import choose_engine, sketch
from train.run.exits import ExitWith
from train.step import optimizer_step

CPU = torch.device("cpu")
NOTHING = HostBlocks([], pin=False)
LENGTHS = (5, 1, 9)  # one token alone, odd lengths
SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attn_implementation": "sdpa",
}
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FAMILIES: dict[str, tuple[PretrainedConfig, list[str]]] = {
    "llama": (LlamaConfig(**SIZES), ALL),
    "llama with biases": (LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True), ALL),
    "some layers adapted": (LlamaConfig(**SIZES), ["q_proj", "v_proj", "down_proj"]),
    "one layer adapted": (LlamaConfig(**SIZES), ["up_proj"]),
    "mistral with a window": (MistralConfig(**SIZES, sliding_window=4), ALL),
    "qwen2": (Qwen2Config(**SIZES), ALL),
    "qwen3": (Qwen3Config(**SIZES, head_dim=16), ALL),
    "qwen2 with a window": (Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=4, max_window_layers=0), ALL),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal up to the rounding of fp32 sums."""
    assert (found - wanted).norm() <= 2e-5 * wanted.norm()


def packed() -> MicroBatch:
    rows = [{"input_ids": torch.randint(100, (n,)).tolist(), "trained": [True] * n} for n in LENGTHS]
    return collate_packed(rows)


def test_rms_norm_and_its_gradient() -> None:
    """Value and input gradient are autograd's, added to what stands in the place."""
    x, weight = torch.randn(7, 24, requires_grad=True), torch.randn(24)
    wanted = F.rms_norm(x, (24,), weight, 1e-5)
    upstream, before = torch.randn(7, 24), torch.randn(7, 24)
    wanted.backward(upstream)
    wide, grad = torch.zeros(7, 30), before.clone()
    rstd = operations.rms_norm(x.detach(), weight, 1e-5, wide[:, :24])
    operations.rms_norm_backward(upstream, x.detach(), weight, rstd, grad, add=True)
    assert x.grad is not None
    close(wide[:, :24], wanted.detach())
    close(grad - before, x.grad)
    assert not wide[:, 24:].any()


def test_swiglu_and_its_gradient() -> None:
    """Gradients replace their inputs, and the product its gradient."""
    gate_up = torch.randn(7, 24, requires_grad=True)
    wanted = F.silu(gate_up[:, :12]) * gate_up[:, 12:]
    upstream = torch.randn(7, 12)
    wanted.backward(upstream)
    place, grad, out = torch.cat([gate_up.detach(), torch.ones(7, 3)], 1), upstream.clone(), torch.empty(7, 12)
    operations.swiglu(place, out)
    operations.swiglu_backward(place, grad)
    assert gate_up.grad is not None
    close(out, wanted.detach())
    close(grad, wanted.detach())
    close(place[:, :24], gate_up.grad)
    assert (place[:, 24:] == 1).all()


def test_turning_back_is_the_gradient_of_turning() -> None:
    """<turn(x), y> = <x, turn back(y)>, and turning back undoes turning."""
    angle = torch.randn(7, 8).repeat(1, 2)
    x, y, turned, back = (torch.randn(7, 48) for _ in range(4))
    operations.rotate(x, turned, angle.cos(), angle.sin())
    operations.rotate(y, back, angle.cos(), angle.sin(), sign=-1)
    torch.testing.assert_close((turned * y).sum(), (x * back).sum())
    operations.rotate(turned, back, angle.cos(), angle.sin(), sign=-1)
    torch.testing.assert_close(back, x)


def test_dropout_is_a_function_of_seed_and_place() -> None:
    """As many survive as p says, scaled; the same again for the same seed, others for another seed or place."""
    x = torch.ones(500, 400)
    masks = []
    for seed, place in ((1, 0), (1, 0), (2, 0), (1, 1)):
        out = torch.empty_like(x)
        operations.dropout(x, out, Dropout(0.25, torch.tensor(operations.mixed(seed)), place))
        assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
        assert (out > 0).float().mean() == pytest.approx(0.75, abs=0.005)
        masks.append(out > 0)
    assert torch.equal(masks[0], masks[1])
    rest = torch.empty(200, 400)
    operations.dropout(x[300:], rest, Dropout(0.25, torch.tensor(operations.mixed(1)), 0, first=300))
    assert torch.equal(rest > 0, masks[0][300:])
    for other in masks[2:]:  # independent: 0.75^2 + 0.25^2 agree
        assert (masks[0] == other).float().mean() == pytest.approx(0.625, abs=0.01)


def layers(bias: bool, quantized: bool, use_rslora: bool, targets: Sequence[str]) -> Any:
    """q, k and v as PEFT's layers with adapters that do something."""
    kind = (lambda i, o: bnb.nn.LinearNF4(i, o, bias=bias)) if quantized else (lambda i, o: torch.nn.Linear(i, o, bias))
    module = torch.nn.ModuleDict({"q": kind(64, 48), "k": kind(64, 24), "v": kind(64, 24)})
    module.to("cpu")  # bitsandbytes quantises here
    lora = peft.LoraConfig(r=3, lora_alpha=7, use_rslora=use_rslora, target_modules=list(targets))
    adapted: Any = peft.inject_adapter_in_model(lora, module)
    for name, parameter in adapted.named_parameters():
        parameter.requires_grad_("lora_" in name)
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    return adapted


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("quantized", [False, True])
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("targets", [("q", "k", "v"), ("k",), ("q", "v")])
@pytest.mark.parametrize("num_tokens", [1, 13])
def test_a_group_is_its_layers(
    bias: bool, quantized: bool, use_rslora: bool, targets: tuple[str, ...], num_tokens: int
) -> None:
    """Output, input gradient and every adapter's gradient are PEFT's own, also behind the input in one buffer."""
    adapted = layers(bias, quantized, use_rslora, targets)
    x, upstream = torch.randn(num_tokens, 64, requires_grad=True), torch.randn(num_tokens, 96)
    wanted = torch.cat([adapted[name](x) for name in "qkv"], dim=1)
    wanted.backward(upstream)
    group = LoraGroup([Projection.of(adapted[name]) for name in "qkv"])
    matrix = torch.zeros(group.shape)
    group.fill_base(matrix, [base.weight for base in group.bases])
    for place, parameter, factor in group.adapter_places(matrix):
        place.copy_(parameter.detach() * factor)
    wide = torch.zeros(num_tokens, 64 + group.padded_rank)
    wide[:, :64] = x.detach()
    for read, low in ((wide[:, :64], wide[:, 64:]), (x.detach(), torch.empty(num_tokens, group.padded_rank))):
        out, grad_x = torch.empty(num_tokens, 96), torch.empty(num_tokens, 64)
        group.forward(matrix, read, low, out, None)
        close(out, wanted.detach())
        grad_out = torch.cat([upstream, torch.full((num_tokens, group.padded_rank), torch.nan)], dim=1)
        group.input_gradient(matrix, grad_out, None, grad_x)
        gradients = group.adapter_gradients(grad_out, read, low, None)
        assert x.grad is not None
        close(grad_x, x.grad)
        for found, parameter in zip(gradients, group.parameters, strict=True):
            assert parameter.grad is not None
            assert parameter.grad.norm() > 0
            close(found, parameter.grad)


def test_a_group_with_dropout_is_its_layers_with_the_same_masks() -> None:
    """PEFT's layers given our masks: the same output and gradients. Each layer has a mask of its own."""
    adapted = layers(False, False, False, ("q", "k", "v"))
    group = LoraGroup([Projection.of(adapted[name]) for name in "qkv"])
    drop = Dropout(0.3, torch.tensor(operations.mixed(7)), 8)
    masks = []
    for number in range(3):
        mask = torch.empty(13, 64)
        operations.dropout(torch.ones(13, 64), mask, drop, number)
        masks.append(mask)
    assert not torch.equal(masks[0], masks[1])
    x, upstream = torch.randn(13, 64, requires_grad=True), torch.randn(13, 96)
    outs = []
    for mask, name in zip(masks, "qkv", strict=True):
        layer = adapted[name]
        low = F.linear(x * mask, layer.lora_A["default"].weight)
        outs.append(layer.base_layer(x) + layer.scaling["default"] * F.linear(low, layer.lora_B["default"].weight))
    wanted = torch.cat(outs, dim=1)
    wanted.backward(upstream)
    matrix, low, out, grad_x = torch.zeros(group.shape), torch.empty(13, 64), torch.empty(13, 96), torch.empty(13, 64)
    group.fill_base(matrix, [base.weight for base in group.bases])
    for place, parameter, factor in group.adapter_places(matrix):
        place.copy_(parameter.detach() * factor)
    group.forward(matrix, x.detach(), low, out, drop)
    grad_out = torch.cat([upstream, torch.empty(13, group.padded_rank)], dim=1)
    group.input_gradient(matrix, grad_out, drop, grad_x)
    close(out, wanted.detach())
    assert x.grad is not None
    close(grad_x, x.grad)
    for found, parameter in zip(
        group.adapter_gradients(grad_out, x.detach(), low, drop), group.parameters, strict=True
    ):
        assert parameter.grad is not None
        close(found, parameter.grad)


@pytest.mark.parametrize("compress", [False, True])
def test_dequantised_weights_are_bitsandbytes(compress: bool) -> None:
    """To the bit, into a range of columns."""
    kind: Any = bnb.nn.Params4bit
    weight = kind(torch.randn(48, 128), requires_grad=False, compress_statistics=compress, quant_type="nf4")
    weight = weight.to("cpu")
    out = torch.zeros(48, 130)
    dequantize(weight, out[:, :128])
    assert torch.equal(out[:, :128], bnb.functional.dequantize_4bit(weight.data, weight.quant_state))


def adapted_model(shape: PretrainedConfig, targets: list[str], dropout: float = 0.0) -> Any:
    """A model of the shape with norms that matter and adapters that do something."""
    base = AutoModelForCausalLM.from_config(shape)
    for name, parameter in base.named_parameters():
        if parameter.dim() == 1:
            parameter.data.normal_(float("norm" in name), 0.2)
    lora = peft.LoraConfig(r=3, lora_alpha=7, lora_dropout=dropout, target_modules=targets)
    adapted: Any = peft.get_peft_model(base, lora)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    return adapted.train()


def gradients_of(adapted: Any) -> dict[str, torch.Tensor]:
    """Of the adapters, by name; they are zeros afterwards."""
    found = {name: p.grad.clone() for name, p in adapted.named_parameters() if p.requires_grad}
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.grad.zero_()
    return found


def reference(causal_lm: Any, batch: MicroBatch) -> torch.Tensor:
    """Hidden states by transformers, which isolates the samples by a block mask."""
    outputs = causal_lm.base_model(batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    return outputs.last_hidden_state[0]


def test_every_family_has_a_parity_test() -> None:
    """The rows of the engine's table are the architectures compared here, and adapters go to all their projections."""
    compared = {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[shape.model_type] for shape, _ in FAMILIES.values()}
    assert set(families.FAMILIES) == compared
    for family in families.FAMILIES.values():
        assert (*family.qkv, family.o, *family.gate_up, family.down) == LLAMA_LINEAR_LAYERS


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("num_kept", "num_cached", "tile"), [(1, 0, 0), (2, 1, 0), (3, 3, 0), (2, 0, 4)])
def test_every_family_of_models(family: str, num_kept: int, num_cached: int, tile: int) -> None:
    """Hidden states and every adapter's gradient are transformers' and PEFT's, kept or recomputed, cached or not.

    Also where the 15 tokens go through each MLP in four tiles.
    """
    adapted = adapted_model(*FAMILIES[family])
    causal_lm, batch = adapted.get_base_model(), packed()
    assert not unsupported_reason(causal_lm)
    wanted = causal_lm.base_model(batch.input_ids, position_ids=batch.position_ids, use_cache=False).last_hidden_state[
        0
    ]
    upstream = torch.randn_like(wanted)
    wanted.backward(upstream)
    expected = gradients_of(adapted)
    engine = FusedDecoder(causal_lm, plan(num_kept, num_cached, tile), NOTHING)
    for _ in range(2):  # the second pass adds to the first
        found = engine(batch)
        close(found.detach(), wanted.detach())
        found.backward(upstream)
    for name, gradient in gradients_of(adapted).items():
        assert "layers.0" in name or expected[name].norm() > 0
        close(gradient / 2, expected[name])


def plan(num_kept: int, num_cached: int, tile: int = 0) -> Plan:
    return Plan(True, True, 64, num_blocks=3, num_kept=num_kept, num_cached=num_cached, mlp_tile=tile)


def test_kept_and_recomputed_blocks_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """All, two and one of three blocks kept, with dropout: equal gradients; another pass's seed gives others.

    Of three blocks none, one and two are computed twice. Tiles of an MLP draw the masks of the whole.
    """
    computed: list[int] = []
    forward = Block.forward

    def counted(self: Block, *arguments: Any) -> Any:
        computed[-1] += 1
        return forward(self, *arguments)

    tiles: set[int] = set()
    gate_up = Block._gate_up

    def measured(self: Block, *arguments: Any) -> torch.Tensor:
        found = gate_up(self, *arguments)
        tiles.add(len(found))
        return found

    monkeypatch.setattr(Block, "forward", counted)
    monkeypatch.setattr(Block, "_gate_up", measured)
    adapted, batch = adapted_model(LlamaConfig(**SIZES), ALL, dropout=0.3), packed()
    upstream = torch.randn(15, 64)
    found = []
    for num_kept, seed in ((3, 5), (2, 5), (1, 5), (1, 6)):
        torch.manual_seed(seed)
        computed.append(0)
        FusedDecoder(adapted.get_base_model(), plan(num_kept, 0), NOTHING)(batch).backward(upstream)
        found.append(torch.cat([gradient.flatten() for gradient in gradients_of(adapted).values()]))
    assert computed == [3, 4, 5, 5]
    assert found[0].norm() > 0
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
    assert (found[0] - found[3]).norm() > 0.1 * found[0].norm()
    assert tiles == {15}
    tiles.clear()
    for num_kept in (3, 1):
        torch.manual_seed(5)
        FusedDecoder(adapted.get_base_model(), plan(num_kept, 0, tile=4), NOTHING)(batch).backward(upstream)
        close(torch.cat([gradient.flatten() for gradient in gradients_of(adapted).values()]), found[0])
    assert tiles == {4, 3}


def test_what_an_mlp_has_kept_is_gone_before_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan counts with that room; and of tiles never two stand at once."""
    mlp, attention, gate_up = Block._backward_mlp, Block._backward_attention, Block._gate_up
    kept_by_mlp: list[weakref.ref] = []
    tiles: list[weakref.ref] | None = None
    checked = []

    def backward_mlp(self: Block, matrices: Any, kept: Any, *rest: Any) -> Any:
        nonlocal tiles
        whole = [] if kept.gate_up is None else [kept.gate_up]
        kept_by_mlp.extend(map(weakref.ref, [kept.post_attention, kept.post_attention_normed, *whole]))
        del whole
        tiles = []
        found = mlp(self, matrices, kept, *rest)
        checked.append(len(tiles))
        tiles = None
        return found

    def one_tile(self: Block, matrices: Any, kept: Any, *rest: Any) -> torch.Tensor:
        if tiles is None or kept.gate_up is not None:
            return gate_up(self, matrices, kept, *rest)
        assert all(each() is None for each in tiles)
        found = gate_up(self, matrices, kept, *rest)
        tiles.append(weakref.ref(found))
        return found

    def backward_attention(self: Block, *arguments: Any) -> None:
        assert len(kept_by_mlp) >= 2
        assert all(each() is None for each in kept_by_mlp)
        kept_by_mlp.clear()
        attention(self, *arguments)

    monkeypatch.setattr(Block, "_backward_mlp", backward_mlp)
    monkeypatch.setattr(Block, "_backward_attention", backward_attention)
    monkeypatch.setattr(Block, "_gate_up", one_tile)
    adapted, batch, upstream = adapted_model(LlamaConfig(**SIZES), ALL), packed(), torch.randn(15, 64)
    for tile in (0, 4):
        FusedDecoder(adapted.get_base_model(), plan(2, 0, tile), NOTHING)(batch).backward(upstream)
    assert checked == [0, 0, 0, 4, 4, 4]


def test_dropout_differs_by_adapter_and_is_off_in_evaluation() -> None:
    """No two adapters of a model draw the same mask in a pass; a model in evaluation mode draws none."""
    seed = torch.tensor(operations.mixed(3))
    context = ForwardContext(torch.empty(0), torch.empty(0), lambda q, k, v: q, 0.5, seed)
    masks = []
    for block in range(3):
        for group in range(4):
            drop = context.drop(block, group)
            assert drop is not None
            for number in range(3):
                mask = torch.empty(8, 8)
                operations.dropout(torch.ones(8, 8), mask, drop, number)
                masks.append(tuple(mask.flatten().tolist()))
    assert len(set(masks)) == 36
    adapted, batch = adapted_model(LlamaConfig(**SIZES), ALL, dropout=0.5), packed()
    engine = FusedDecoder(adapted.get_base_model(), plan(3, 0), NOTHING)
    with torch.no_grad():
        training = engine(batch)
        adapted.eval()
        causal_lm = adapted.get_base_model()
        wanted = reference(causal_lm, batch)
        close(engine(batch), wanted)
        assert (training - wanted).norm() > 0.01 * wanted.norm()


def test_what_a_configuration_only_seems_to_say() -> None:
    """A Llama with sliding_window in its config.json has no window."""
    adapted, batch = adapted_model(LlamaConfig(**SIZES | {"sliding_window": 4}), ALL), packed()
    causal_lm = adapted.get_base_model()
    close(FusedDecoder(causal_lm, plan(1, 0), NOTHING)(batch).detach(), reference(causal_lm, batch).detach())


def fused(config: Config) -> Config:
    return replace(config, engine=EngineConfig(kind="fused"))


def test_fifty_steps_fused_and_not(config: Config) -> None:
    """The same losses and adapters after fifty steps; the engine really ran."""
    config = replace(config, train=replace(config.train, epochs=50), model=replace(config.model, quantization="nf4"))
    runs = [training_of(each, Accelerator(cpu=True)) for each in (config, fused(config))]
    assert [run.model.engine_name for run in runs] == ["reference", "fused"]
    curves = [[optimizer_step(run, step).loss for step in range(50)] for run in runs]
    assert curves[0][-1] < 0.9 * curves[0][0]
    assert curves[0] != curves[1]
    assert curves[1] == pytest.approx(curves[0], rel=2e-3)


def test_without_merging_every_pass_is_run(config: Config) -> None:
    """1 x 8 with merge off are eight passes of one sample, also where two would fit."""
    config = fused(with_batch(config, 1, 8))
    literal = training_of(replace(config, batch=replace(config.batch, merge="off")), Accelerator(cpu=True))
    batch = literal.data.batch(0, literal.plan)
    assert [(micro_batch.position_ids == 0).sum() for micro_batch in batch.micro_batches] == [1] * 8
    merged = training_of(config, Accelerator(cpu=True))
    assert len(merged.data.batch(0, merged.plan).micro_batches) == 1


def test_an_idle_process_learns_nothing(config: Config) -> None:
    """The second of two processes in an epoch's last window of one sample: no targets, gradients of zero."""
    training = training_of(fused(with_batch(config, 1, 2)), Accelerator(cpu=True))
    data = training.data
    data.rows, data.steps_per_epoch = data.rows[:5], 2
    data.layout = BatchLayout(1, 2, 2, rank=1)
    (batch,) = data.batch(1, training.plan).micro_batches
    assert len(batch.targets) == 0
    training.model(batch).backward()
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in training.flat.leaves)


def test_merged_passes_are_the_same_step(config: Config) -> None:
    """2 x 4 as it is written = as one pass: loss, gradient norm, samples; in the partial last window too."""
    config = fused(with_batch(config, 2, 4))
    literal = training_of(replace(config, batch=replace(config.batch, merge="off")), Accelerator(cpu=True))
    merged = training_of(config, Accelerator(cpu=True))
    for step, passes in ((0, 4), (2, 2)):
        assert len(literal.data.batch(step, literal.plan).micro_batches) == passes
        assert len(merged.data.batch(step, merged.plan).micro_batches) == 1
        one, other = (optimizer_step(run, step) for run in (literal, merged))
        assert one.sample_ids == other.sample_ids
        assert other.loss == pytest.approx(one.loss, rel=1e-5)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-4)


def test_what_the_engine_cannot_run_is_said(config: Config) -> None:
    """auto falls back with a reason, fused ends with it."""
    sizes = {**SIZES, "num_key_value_heads": None}
    neox = AutoModelForCausalLM.from_config(GPTNeoXConfig(**{k: v for k, v in sizes.items() if v is not None}))
    assert "GPTNeoXForCausalLM is not one of" in unsupported_reason(neox)
    gelu = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, hidden_act="gelu"))
    assert "computes gelu" in unsupported_reason(gelu)
    uneven = adapted_model(LlamaConfig(**SIZES), ["1.mlp.up_proj"]).get_base_model()
    assert unsupported_reason(uneven) == "its blocks do not all have the same adapters"
    int8 = replace(config, model=replace(config.model, quantization="int8"))
    sketched = sketch(int8, torch.float32)
    assert choose_engine(sketched, int8, CPU) == (False, "int8 layers round their inputs, which only bitsandbytes does")
    with pytest.raises(ExitWith, match=r"--engine\.kind fused: int8 layers"):
        choose_engine(sketched, fused(int8), CPU)
    streaming = replace(int8, memory=replace(int8.memory, offload="stream"))
    with pytest.raises(ExitWith, match=r"--memory\.offload stream: only the fused engine streams, and int8 layers"):
        choose_engine(sketched, streaming, CPU)
    reference = replace(config, engine=EngineConfig(kind="reference"))
    assert choose_engine(sketched, reference, CPU) == (False, "engine.kind reference")


def test_long_samples_of_one_length_are_filled_up() -> None:
    """Rows of 2,041 and 2,048 tokens become 2,048 each, targets stay; rows that differ more stay as they are."""
    rows = [{"input_ids": list(range(1, n + 1)), "trained": [True] * n} for n in (2041, 2048)]
    batch = collate_packed(rows)
    assert (batch.uniform_length, batch.max_length, batch.input_ids.shape[1]) == (2048, 2048, 4096)
    assert batch.targets.tolist() == [*range(2, 2042), *range(2, 2049)]
    assert torch.equal(batch.input_ids[0, batch.target_rows] + 1, batch.targets)
    assert batch.cu_seqlens is not None
    assert batch.cu_seqlens.tolist() == [0, 2048, 4096]
    shorter = collate_packed([rows[0], {"input_ids": list(range(1900)), "trained": [True] * 1900}])
    assert (shorter.uniform_length, shorter.input_ids.shape[1]) == (0, 3941)

"""Plan, model and optimizer put together, and the longest micro-batch tried before the first step."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from accelerate import Accelerator

from train.batching import MicroBatchShape
from train.collate import MicroBatch, collate, collate_packed, packed_tokens, part_of, with_empty_samples
from train.config import Config
from train.context_group import start_group
from train.data import TrainingData
from train.engine import delta_rule
from train.engine.graphs import is_out_of_memory
from train.engine.operations import kernels_for
from train.engine.peer_memory import any_failed
from train.engine.plan import Plan
from train.learning_rate import Schedule
from train.memory.outlook import Outlook
from train.memory.reference import (
    MOST_TOKENS,
    Passes,
    ReferencePlan,
    configured_plan,
    passes_told,
    rows_told,
    why_padded,
)
from train.memory.search import MARGIN
from train.memory.together import planned_together
from train.metrics import flops_per_token, num_chosen_experts, num_matmul_weights
from train.models.adapted_linear import use_own_products
from train.models.agreement import check_agreement
from train.models.graph_trial import take_graphs
from train.models.isolation import check_packing, isolate
from train.models.language_model import LanguageModel, load_model, start_from
from train.models.liger import use_liger
from train.optim import FlatParameters, build_optimizer, build_scaler, state_bytes
from train.recording import capture_seconds, record_graphs
from train.run.accelerator import free_gpu_bytes
from train.run.devices import compute_type
from train.run.exits import ExitCode, ExitWith
from train.run.processes import say
from train.step import Training


def assemble(
    config: Config,
    accelerator: Accelerator,
    data: TrainingData,
    saved: MicroBatchShape | None = None,
    longest_validation: int = 0,
) -> Training:
    """Plan, model and optimizer on this process's device; the longest micro-batch has run there.

    `saved` is the shape in the checkpoint, kept if it fits; `longest_validation` is in tokens. Raises
    ExitWith(BAD_INPUT) where no plan fits.
    """
    device, data.part = accelerator.device, start_group(config, accelerator)
    budget = free_gpu_bytes(config, accelerator)
    rows = replace(data.length_statistics(), longest_validation=longest_validation)
    outlook, why_copies = planned_together(Outlook.of(config, device, rows, budget, saved), accelerator)
    if why_copies:
        say(accelerator, f"memory    each process has its own copy of what it reads in host memory: {why_copies}")
    plan = outlook.first_plan()
    outlook.check_host(plan)
    model = load_model(config, device, plan)
    start_from(model, config)
    ids = data.samples[max(range(len(data.num_tokens)), key=data.num_tokens.__getitem__)]["input_ids"]
    check_agreement(model, config.model.name_or_path, ids)
    if not plan.is_fused:
        plan = _reference_plan(model, config, outlook, ids)
    parameters = model.trainable()
    flat = FlatParameters(parameters, config.optim.lora_plus_ratio)
    if plan.is_fused:  # of the reference engine the banner tells, once what it does is chosen
        say(accelerator, f"engine    fused{_linear_note(model)}")
    training = Training(
        config=config,
        accelerator=accelerator,
        model=model,
        parameters=parameters,
        flat=flat,
        optimizer=build_optimizer(flat, config.optim, kernels_for(device) is not None),
        scaler=build_scaler(compute_type(config.model.dtype, device).name, device),
        plan=plan,
        data=data,
        schedule=Schedule.of(config.optim, data.total_steps(config.train)),
        reference_reason=outlook.reason,
    )
    training = fit_to_memory(training, outlook)
    if accelerator.num_processes > 1:
        training = replace(training, plan=replace(training.plan, pair_cost=_pair_cost(training)))
    shape = training.plan.micro_batch_shape
    if outlook.saved and shape != outlook.saved:
        say(
            accelerator,
            f"memory    the run's micro-batches of {outlook.saved} are not possible here: {shape} now, the same "
            "samples a step; sums are rounded otherwise, and with other micro-batches dropout draws other masks",
        )
    if num_graphs := record_graphs(training):
        say(accelerator, f"graphs    {num_graphs} captured in {capture_seconds(training):.1f} s")
    return training


def _linear_note(model: LanguageModel) -> str:
    """What computes linear attention, where the engine runs a model that has some."""
    if model.engine is None or model.engine.linear_heads is None:
        return ""
    return f"; {delta_rule.told(model.engine.linear_heads, model.causal_lm.device, model.compute_dtype)}"


def _pair_cost(training: Training) -> float:
    """What attention costs for a pair of tokens, beside a token's linear layers; the same in every process."""
    whole, are_trained = cast(Any, training.model.causal_lm.config), training.config.train.method == "full"
    shape = whole.get_text_config(decoder=True)
    num_weights = num_matmul_weights(training.model, num_chosen_experts(shape))
    alone, beside_one = (flops_per_token(num_weights, shape, length, are_trained) for length in (0, 1))
    return beside_one / alone - 1


def _reference_plan(model: LanguageModel, config: Config, outlook: Outlook, ids: Sequence[int]) -> ReferencePlan:
    """The plan that the reference engine begins with, and Liger's kernels in place; `ids` are a sample to try it on.

    Raises ExitWith(BAD_INPUT) where rows are to be packed and samples in them would see one another.
    """
    plan, saved = configured_plan(outlook.num_blocks, config.memory), outlook.saved
    is_cpu = model.causal_lm.device.type == "cpu"
    kernels = [] if is_cpu else [use_own_products(model, ids), use_liger(model, config.engine.liger, ids)]
    padded = why_padded(config, is_cpu, saved)
    if config.data.packing:
        check_packing(model, config.model.name_or_path, ids)
    elif not padded and (reason := isolate(model, ids)):
        padded = f"the base does not compute packed samples as it does one alone ({reason})"
    rows = rows_told(padded, model.causal_lm.config._attn_implementation)
    plan = replace(plan, layout="padded" if padded else "unpadded", choices=tuple(filter(None, [rows, *kernels])))
    return _passes(plan, outlook).on_cpu() if is_cpu else plan


def _passes(plan: ReferencePlan, outlook: Outlook) -> Passes:
    saved = outlook.saved if outlook.saved and outlook.saved.layout == plan.layout and outlook.saved.tokens else None
    return Passes(plan, outlook.rows, outlook.config.batch, outlook.config.memory, saved)


def fit_to_memory(training: Training, outlook: Outlook) -> Training:
    """Tries the longest micro-batch here, and a validation's longer one; returns the training with a plan that fits.

    A plan that runs out of memory is replaced by a smaller one, with the same samples per step; no weight is updated.
    Raises ExitWith(BAD_INPUT) when no smaller plan is left. A CPU has no budget and tries nothing.
    """
    first = plan = training.plan
    accelerator, longest_validation = training.accelerator, outlook.rows.longest_validation
    if not _is_gpu(training):
        return training
    if isinstance(plan, ReferencePlan):
        return replace(training, plan=_fastest_reference_plan(training, plan, outlook))
    if not any_failed(accelerator.device, not _runs(training, plan, longest_validation)):
        return training
    for plan in outlook.smaller_plans(first):
        say(accelerator, f"memory    the longest micro-batch did not fit; trying: {plan}")
        if not any_failed(accelerator.device, not _fits(training, plan, longest_validation)):
            return replace(training, plan=plan)
    raise _out_of_memory(outlook, plan)


def _out_of_memory(outlook: Outlook, plan: Plan) -> ExitWith:
    longest = max(outlook.rows.longest[0], plan.micro_batch_tokens, outlook.rows.longest_validation)
    return ExitWith(
        ExitCode.BAD_INPUT,
        f"out of memory at the longest micro-batch, {longest:,} tokens, and no "
        "smaller plan is left: lower --data.max_length or --batch.per_device, or leave --batch.merge at auto",
    )


def _fastest_reference_plan(training: Training, plan: ReferencePlan, outlook: Outlook) -> ReferencePlan:
    """By trial, the same in all processes: a pass forward and backward that leaves no trace.

    It must leave the share 1 - MARGIN of the memory free, and room for the optimizer's state. Raises
    ExitWith(BAD_INPUT) where even one row at a time, recomputed, does not run.
    """
    accelerator, longest_validation = training.accelerator, outlook.rows.longest_validation
    passes, limit = _passes(plan, outlook), _gpu_limit(training)
    attention = training.model.causal_lm.config._attn_implementation
    sizes = passes.sizes(MOST_TOKENS.get(attention, MOST_TOKENS["sdpa"]))

    def runs(tried: ReferencePlan) -> bool:
        return not any_failed(accelerator.device, not _fits(training, tried, longest_validation))

    def leaves_room(tried: ReferencePlan) -> bool:
        if accelerator.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        fits = _fits(training, tried, longest_validation) and _peak_bytes(training) <= MARGIN * limit
        return not any_failed(accelerator.device, not fits)

    devices = [torch.cuda.current_device()] if accelerator.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        found = passes.fastest(sizes, leaves_room)
        if found is None:
            found = next(filter(runs, (replace(tried, num_kept=0) for tried in sizes[-1:])), None)
    if found is None:
        raise _out_of_memory(outlook, sizes[-1])
    training.model.execute(found)
    with torch.random.fork_rng(devices=devices):
        graphs = _graphs(training, found, limit)
    if accelerator.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # what was tried and left is no peak of the run
    tried = passes_told("kept" if found.num_kept else "recomputed", found.micro_batch_tokens)
    return replace(found, choices=tuple(filter(None, [*found.choices, tried, graphs])))


def _graphs(training: Training, plan: ReferencePlan, limit: float) -> str:
    """What a trial of CUDA graphs found, and has put in place; nothing where they are not possible."""
    is_frozen = training.config.train.method != "full"  # autocast casts trained weights once for several passes
    can = training.data.is_packed(plan) and plan.num_kept and is_frozen and not training.model.reference.rotaries
    if training.accelerator.device.type != "cuda" or not can or training.config.run.deterministic:
        return ""
    return take_graphs(training.model, longest_micro_batch(training, plan).to(training.accelerator.device), limit)


def _gpu_limit(training: Training) -> float:
    """Bytes that this process may have allocated on its GPU in all."""
    free = free_gpu_bytes(training.config, training.accelerator)
    return float("inf") if free is None else free + torch.cuda.memory_allocated()


def _peak_bytes(training: Training) -> int:
    """Of the pass that has just run, with the state that the optimizer makes at its first step."""
    return torch.cuda.max_memory_allocated() + state_bytes(training.parameters.values(), training.config.optim)


def _is_gpu(training: Training) -> bool:
    return training.accelerator.device.type == "cuda"


def _fits(training: Training, plan: Plan, longest_validation: int) -> bool:
    """Whether the model can be set up by the plan and its longest micro-batch runs."""
    try:
        training.model.execute(plan)
    except torch.OutOfMemoryError:
        return False
    return _runs(training, plan, longest_validation)


def _runs(training: Training, plan: Plan, longest_validation: int) -> bool:
    """Whether the longest micro-batch runs forward and backward, and a validation's longer sample forward.

    Gradients are zeroed afterwards.
    """
    try:
        for _ in range(2 if plan.uses_graphs else 1):  # with CUDA graphs the first run is eager, the second is captured
            training.model(longest_micro_batch(training, plan).to(training.accelerator.device)).backward()
        if longest_validation > max(training.data.num_tokens[i] for i in training.data.trained_samples()):
            with torch.no_grad():
                training.model(_longest_validation(training, plan, longest_validation).to(training.accelerator.device))
        torch.cuda.synchronize()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        training.flat.zero_grad()
        torch.cuda.empty_cache()
    return True


def longest_micro_batch(training: Training, plan: Plan) -> MicroBatch:
    """A micro-batch as long as any of this run, with every token supervised.

    For CUDA graphs it has as many samples as memory was counted for: its graph can replay every other micro-batch.
    """
    data = training.data
    longest = max(data.num_tokens[i] for i in data.trained_samples())  # data.weights may leave out longer ones
    if not data.is_packed(plan):
        return _padded_rows(training, plan, longest)
    total = plan.micro_batch_tokens or data.length_statistics().longest[-1]
    lengths = [longest] * max(1, total // packed_tokens([longest]))
    rest = total - packed_tokens(lengths)
    if rest > 0 and packed_tokens([*lengths, rest]) <= total:
        lengths.append(rest)
    batch = part_of(collate_packed([_sample(length) for length in lengths]), data.part.alone())
    return with_empty_samples(batch, plan.num_samples) if plan.uses_graphs else batch


def _longest_validation(training: Training, plan: Plan, longest: int) -> MicroBatch:
    """A validation micro-batch of its longest sample, which is longer than any trained on."""
    if training.data.is_packed(plan):
        return part_of(collate_packed([_sample(longest)]), training.data.part.alone())
    return _padded_rows(training, plan, longest)


def _padded_rows(training: Training, plan: Plan, longest: int) -> MicroBatch:
    """As many rows as the reference engine takes at a time, all as long as the longest."""
    count = plan.micro_batch_tokens // longest if plan.merges else training.data.layout.per_device
    return collate([_sample(longest)] * max(1, count), training.data.pad_token_id)


def _sample(num_tokens: int) -> dict[str, list]:
    return {"input_ids": [0] * num_tokens, "trained": [True] * num_tokens}

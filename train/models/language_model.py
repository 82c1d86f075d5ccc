"""Base and adapters as one module, and the loss it computes; base.py loads the base."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import bitsandbytes as bnb
import peft
import torch
import transformers

from train.collate import MicroBatch
from train.config import Config
from train.engine.decoder import FusedDecoder
from train.engine.families import decoder_layers
from train.engine.layers import CausalLM, Vocabulary, as_causal_lm
from train.engine.linears import ADAPTER
from train.engine.peer_memory import PeerMemoryError
from train.engine.plan import Plan
from train.engine.sharded_blocks import AwayBlocks
from train.engine.support import not_in_fp8, undivided_reason, unsupported_reason
from train.loss import Head, summed_cross_entropy
from train.models.about import BaseFacts, own_dropout
from train.models.adapters import copy_into, is_adapted_layer, misnamed_note, trainable, with_adapters
from train.models.base import load_base, skeleton
from train.models.held_weights import check_experts, held_weights
from train.models.hub import locate
from train.models.initial_adapter import initial_note, initial_tensors
from train.models.reference_decoder import ReferenceDecoder
from train.models.rotary import isolate_rotary
from train.models.shape import text_shape
from train.models.text_part import names_of
from train.models.vocabulary import name_of, trains_embedding
from train.models.whole import WHOLE, WholeModel, train_whole, trained_weights
from train.run.devices import NO_GPU, NO_GPU_FOR_FP8, compute_type
from train.run.exits import ExitCode, ExitWith
from train.seeds import derived_seed

CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma's, RecurrentGemma's, xLSTM's


class LanguageModel(torch.nn.Module):
    """Base and adapters as one module whose forward is the summed loss, so that DDP sees a single forward call.

    There are two ways to the hidden states. The reference path is transformers' decoder with PEFT's layers; it runs any
    model. The engine (engine/decoder.py) runs packed micro-batches of the families it knows; it reads the same
    parameters and adds to the same gradients. The embedding, the head and the loss are shared.
    """

    def __init__(
        self, adapted: peft.PeftModel | WholeModel, away: AwayBlocks, about: BaseFacts, compute: torch.dtype
    ) -> None:
        super().__init__()
        self.adapted: Any = adapted
        self.away = away
        self.about = about
        self.engine: FusedDecoder | None = None  # None: the reference path runs everything
        self.head = head_of(self.causal_lm, compute)
        self.reference = ReferenceDecoder(adapted, compute)

    @property
    def causal_lm(self) -> CausalLM:
        """transformers' model, with PEFT's layers in it."""
        return as_causal_lm(self.adapted.get_base_model())

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """Cross entropy summed over the batch's targets, an fp32 scalar.

        Packed batches run on the engine where there is one, padded ones on the reference path.
        """
        if self.engine and batch.cu_seqlens is not None:
            self.reference.tell_lengths(batch.lengths)
            hidden = self.engine(batch)
        else:
            hidden = self.reference(batch)
        supervised = hidden.index_select(0, batch.target_rows).to(self.compute_dtype)  # [N, H]
        return summed_cross_entropy(supervised, self.head, batch.targets)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The type of the head's product and, unless all is trained, of hidden states."""
        return self.head.weight.dtype

    def execute(self, plan: Plan) -> None:
        """Sets up how micro-batches run: on the engine, or on transformers, whose blocks recompute all or nothing."""
        if self.engine is not None:  # its memory would stand beside the new one's
            self.engine.release()
            self.engine = None
        if plan.is_fused:
            layers = decoder_layers(self.causal_lm)
            self.away.stream(plan.streamed, layers)
            self.engine = FusedDecoder(self.causal_lm, plan, *self.away.holders)
        else:
            self.reference.recompute(plan.num_kept < plan.num_blocks)

    @property
    def engine_name(self) -> str:
        """What runs micro-batches: fused or reference."""
        return "fused" if self.engine else "reference"

    @contextmanager
    def generating(self) -> Iterator[None]:
        """While entered, transformers runs the model, for example to generate.

        In evaluation mode, with an attention that takes the mask of padded prompts, streamed weights layer by layer.
        The engine releases its memory; training allocates it again. The base's own generation settings (penalties,
        forced tokens, stop tokens) are set aside, because `generate` takes from them whatever its caller leaves unset
        (GenerationMixin._prepare_generation_config).
        """
        causal_lm = self.causal_lm
        transformers_model: Any = causal_lm
        kind, own_settings = causal_lm.config._attn_implementation, transformers_model.generation_config
        self.eval()
        self.reference.tell_lengths(())
        self.reference.release()
        if kind == "varlen":  # which knows no padding
            causal_lm.set_attn_implementation("sdpa")
        transformers_model.generation_config = transformers.GenerationConfig()
        try:
            with self.engine.lent() if self.engine else nullcontext(), self.reference.computing():
                yield
        finally:
            causal_lm.set_attn_implementation(kind)
            transformers_model.generation_config = own_settings
            self.train()

    @contextmanager
    def without_adapters(self) -> Iterator[None]:
        """While entered, answers and losses of the reference path are the base's own.

        PEFT switches off its own layers, and does not know the head that the loss is computed with.
        """
        tuned = self.head
        self.head = replace(tuned, rows=None, whole=None)
        try:
            with self.adapted.disable_adapter():
                yield
        finally:
            self.head = tuned

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The trained parameters, by the names that PEFT gives them in the class that serves the base, or in full
        fine-tuning transformers in the class that is trained.
        """
        if isinstance(self.adapted, WholeModel):
            return trained_weights(self.adapted.get_base_model())
        return {self.about.names.served(name): parameter for name, parameter in trainable(self.adapted).items()}


def load_model(config: Config, device: torch.device, plan: Plan) -> LanguageModel:
    """Base on `device`, frozen and quantised as configured, with fresh fp32 adapters drawn from train.seed; for full
    fine-tuning the base alone, in fp32.

    Blocks that the plan streams are in host memory; so is a frozen embedding on the engine, where the head does not
    share it. peft's prepare_model_for_kbit_training is not called: it casts embedding and head to fp32 (2.1 GB at 8B).
    Raises ExitWith(BAD_INPUT) where the base cannot be found or is not what config.json says, and where what was
    loaded cannot run on the engine that the plan wants.
    """
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    compute, is_whole = compute_type(config.model.dtype, device).dtype, config.train.method == "full"
    dtype = torch.float32 if is_whole else compute
    away = AwayBlocks.of(plan, device)
    # a trained embedding stays where its gradient is made
    embedding_on_host = plan.is_fused and not trains_embedding(config.lora)
    try:
        base, notes = load_base(config.model, dtype, device, away, config.train.seed, embedding_on_host)
    except PeerMemoryError as error:
        reason = f"{error}; leave it out, --memory.offload auto streams weights from host memory"
        raise ExitWith(ExitCode.BAD_INPUT, f"--memory.shard: {reason}") from None
    away.settle()
    keep_one_cpu_kernel(base)
    base.requires_grad_(False)
    base.config.use_cache, base.config.return_dict = False, True  # whatever config.json says
    isolate_rotary(base)
    held = held_weights(base)
    check_experts(config.model, held)
    torch.manual_seed(derived_seed(config.train.seed, "adapters"))
    names = names_of(config.model)
    check_decoder(config, base)
    notes += own_dropout(base)
    adapted, targets = train_whole(base, config) if is_whole else with_adapters(base, config)
    notes += [*([targets.note] if targets.note else []), *(misnamed_note(base) if not names.pairs else [])]
    reason = unsupported_reason(as_causal_lm(adapted.get_base_model())) if plan.is_fused else ""
    if reason:  # what was loaded is not what config.json promised
        raise ExitWith(ExitCode.BAD_INPUT, f"{config.model.name_or_path}: {reason}; --engine.kind reference trains it")
    about = BaseFacts(locate(config.model), held, targets, notes, names)
    model = LanguageModel(adapted, away, about, compute)
    for parameter in model.trainable().values():
        parameter.data = parameter.data.to(device)  # PEFT puts them where the layer's weights are
    model.execute(plan)
    return model.train()


def check_decoder(config: Config, base: transformers.PreTrainedModel) -> None:
    """Raises ExitWith(BAD_INPUT) where what lies below the base's head cannot be run by itself."""
    if base.base_model is base:  # Llama 4's text class looks for its decoder under the whole's name
        base.base_model_prefix = name_of(base, base.get_input_embeddings()).rpartition(".")[0]
    if base.base_model is base:
        reason = f"transformers' {type(base).__name__} has no decoder apart from its head"
        raise ExitWith(ExitCode.BAD_INPUT, f"{config.model.name_or_path}: {reason}; it is not trained")


def start_from(model: LanguageModel, config: Config) -> None:
    """Puts the adapter of lora.init_from in the place of the fresh one; raises ExitWith(BAD_INPUT) if they differ."""
    if config.lora.init_from:
        load_adapters(model, initial_tensors(config, model.trainable(), adapter_config(model)))
        model.about.notes.extend(filter(None, [initial_note(config)]))


def sketch(config: Config, dtype: torch.dtype) -> peft.PeftModel | WholeModel:
    """The model as load_model would make it, on torch's meta device, to choose an engine and to plan memory."""
    base = skeleton(config.model, dtype)
    check_decoder(config, base)
    check_experts(config.model, held_weights(base))
    if config.train.method == "full":
        return train_whole(base, config)[0]
    return with_adapters(base, config, is_sketch=True)[0]


def choose_engine(sketched: peft.PeftModel | WholeModel, config: Config, device: torch.device) -> tuple[bool, str]:
    """Whether micro-batches run on the engine, and if not why.

    Raises ExitWith(BAD_INPUT) where the configuration demands the engine and it cannot run the model.
    """
    if config.engine.kind == "reference" or isinstance(sketched, WholeModel):
        return False, WHOLE if isinstance(sketched, WholeModel) else "engine.kind reference"
    causal_lm, count = as_causal_lm(sketched.get_base_model()), config.batch.context_parallel
    reason = unsupported_reason(causal_lm)
    if count > 1 and (unsplit := reason or undivided_reason(causal_lm, count)):
        refused = f"--batch.context_parallel {count}: only the fused engine splits rows, and {unsplit}"
        raise ExitWith(ExitCode.BAD_INPUT, f"{refused}; leave it out, or write a number that suits the base")
    if reason and config.engine.kind == "fused":
        raise ExitWith(ExitCode.BAD_INPUT, f"--engine.kind fused: {reason}; use auto or reference")
    if config.engine.products == "fp8":
        reason = reason or not_in_fp8(causal_lm)
        if not reason and config.engine.kind == "auto" and device.type != "cuda":
            reason = NO_GPU_FOR_FP8
        if reason:
            raise ExitWith(ExitCode.BAD_INPUT, f"--engine.products fp8: {reason}; or leave it out")
    streams = config.memory.offload == "stream"
    if reason and streams:
        raise ExitWith(ExitCode.BAD_INPUT, f"--memory.offload stream: only the fused engine streams, and {reason}")
    if not reason and config.engine.kind == "auto" and device.type != "cuda" and not streams and count == 1:
        reason = NO_GPU
    return not reason, reason


def head_of(causal_lm: CausalLM, compute: torch.dtype) -> Head:
    """The formula of the head's logits, by config.json; agreement.py compares it with what transformers computes."""
    vocabulary = Vocabulary.of(causal_lm.get_output_embeddings())
    layer: Any = vocabulary.layer
    whole: Any = causal_lm.config
    shape = text_shape(whole)
    scale = (getattr(shape, "logit_scale", None) or 1.0) / (getattr(shape, "logits_scaling", None) or 1.0)
    caps = (getattr(shape, name, None) for name in CAPS)
    cap = next(filter(None, caps), 0.0)
    bias = getattr(layer, "bias", None)
    if layer.weight.requires_grad:  # full fine-tuning: a meta tensor has its shape and no memory
        frozen = torch.empty_like(layer.weight, dtype=compute, device="meta", requires_grad=False)
        return Head(frozen, bias, float(scale), float(cap), whole=layer.weight)
    return Head(layer.weight, bias, float(scale), float(cap), vocabulary.rows, vocabulary.whole)


def keep_one_cpu_kernel(base: torch.nn.Module) -> None:
    """Forbids bitsandbytes' inference shortcut on CPUs with bf16 instructions.

    At the first evaluation it repacks NF4 weights in place, with scales rounded to bf16; training that goes on after a
    validation then computes with other weights and passes no gradient through them (Linear4bit.forward, 0.50.2).
    """
    for module in base.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def adapter_config(model: LanguageModel) -> dict[str, object]:
    """What PEFT writes to adapter_config.json, its base found from any folder; in full fine-tuning the base alone."""
    place = model.about.place
    base: dict[str, object] = {"base_model_name_or_path": place.name, "revision": place.commit or None}
    if isinstance(model.adapted, WholeModel):
        return {"train_method": "full"} | base
    values = model.adapted.peft_config[ADAPTER].to_dict()
    sets = {key: sorted(value) for key, value in values.items() if isinstance(value, set)}
    adapted = [name for name, module in model.causal_lm.named_modules() if is_adapted_layer(module)]
    return model.about.names.served_settings(values | sets, adapted) | base | {"inference_mode": True}


def load_adapters(model: LanguageModel, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copies saved adapters into the model's; raises ValueError unless names and shapes are exactly its own."""
    copy_into(model.trainable(), tensors)

"""Base and adapters as one module, and the loss it computes; base.py loads the base."""

import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import bitsandbytes as bnb
import peft
import torch
import transformers
from transformers import PreTrainedModel

from train.collate import MicroBatch
from train.config import Config
from train.engine.attention import attention_kind
from train.engine.decoder import FusedDecoder
from train.engine.families import decoder_layers, unsupported_reason
from train.engine.host_stream import HostBlocks
from train.engine.layers import ADAPTER, CausalLM, as_causal_lm
from train.engine.plan import Plan
from train.loss import summed_cross_entropy
from train.models.base import load_base, skeleton
from train.run.devices import compute_type
from train.run.exits import ExitCode, ExitWith
from train.seeds import derived_seed


class LanguageModel(torch.nn.Module):
    """Base and adapters as one module whose forward is the summed loss, so that DDP sees a single forward call.

    There are two ways to the hidden states. The reference path is transformers' decoder with PEFT's layers; it runs any
    model. The engine (engine/decoder.py) runs packed micro-batches of the families it knows; it reads the same
    parameters and adds to the same gradients. The embedding, the head and the loss are shared.
    """

    def __init__(self, adapted: peft.PeftModel, host: HostBlocks) -> None:
        super().__init__()
        self.adapted = adapted
        self.host = host
        self.engine: FusedDecoder | None = None  # None: the reference path runs everything

    @property
    def causal_lm(self) -> CausalLM:
        """transformers' model, with PEFT's layers in it."""
        return as_causal_lm(self.adapted.get_base_model())

    def forward(self, batch: MicroBatch) -> torch.Tensor:
        """Cross entropy summed over the batch's targets, an fp32 scalar.

        Packed batches run on the engine where there is one, padded ones on the reference path.
        """
        hidden = self.engine(batch) if self.engine and batch.cu_seqlens is not None else self._reference(batch)
        supervised = hidden.index_select(0, batch.target_rows)  # [N, H]
        return summed_cross_entropy(supervised, self.causal_lm.get_output_embeddings().weight, batch.targets)

    def _reference(self, batch: MicroBatch) -> torch.Tensor:
        """Hidden states [B * T, H] by transformers and PEFT.

        Packed samples are isolated at cu_seqlens by engine.attention; where that has no kernel, by transformers, where
        position_ids start again (masking_utils.find_packed_sequence_indices).
        """
        outputs = self.causal_lm.base_model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            cu_seq_lens_q=batch.cu_seqlens,
            max_length_q=batch.max_length,
        )
        return outputs.last_hidden_state.flatten(0, 1)

    def execute(self, plan: Plan) -> None:
        """Sets up how micro-batches run: on the engine, or on transformers, whose blocks recompute all or nothing."""
        if self.engine is not None:  # its memory would stand beside the new one's
            self.engine.release()
            self.engine = None
        if plan.is_fused:
            layers = decoder_layers(self.causal_lm)
            self.host.wanted = sorted({*self.host.wanted, *plan.streamed})
            for number in plan.streamed:
                self.host.offload(number, layers[number])
            self.engine = FusedDecoder(self.causal_lm, plan, self.host)
        elif plan.num_kept < plan.num_blocks:
            # use_reentrant=False: the frozen embedding's output needs no gradient
            self.causal_lm.gradient_checkpointing_enable({"use_reentrant": False})

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
        causal_lm.set_attn_implementation("sdpa")
        transformers_model.generation_config = transformers.GenerationConfig()
        try:
            with self.engine.lent() if self.engine else nullcontext():
                yield
        finally:
            causal_lm.set_attn_implementation(kind)
            transformers_model.generation_config = own_settings
            self.train()

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """The adapters' parameters, by the names that PEFT gives them in adapter_model.safetensors."""
        named = self.adapted.named_parameters()
        return {name.replace(f".{ADAPTER}", ""): p for name, p in named if p.requires_grad}


def load_model(config: Config, device: torch.device, plan: Plan) -> LanguageModel:
    """Base on `device`, frozen and quantised as configured, with fresh fp32 adapters drawn from train.seed.

    Blocks that the plan streams are in host memory; so is the embedding on the engine, where the head does not share
    it. peft's prepare_model_for_kbit_training is not called: it casts embedding and head to fp32 (2.1 GB at 8B).
    Raises ExitWith(BAD_INPUT) where the base cannot be found or has a head that the loss does not fit.
    """
    if not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()
    dtype = compute_type(config.model.dtype, device).dtype
    host = HostBlocks(plan.streamed, pin=device.type == "cuda")
    base = load_base(config.model, dtype, device, host, config.train.seed, plan.is_fused)
    base.set_attn_implementation(attention_kind(config, dtype, device))
    keep_one_cpu_kernel(base)
    base.requires_grad_(False)
    base.config.use_cache = False
    torch.manual_seed(derived_seed(config.train.seed, "adapters"))
    model = LanguageModel(_with_adapters(base, config), host)
    for parameter in model.trainable().values():
        parameter.data = parameter.data.to(device)  # PEFT puts them where the layer's weights are
    model.execute(plan)
    _check_head(model, config)
    return model.train()


def sketch(config: Config, dtype: torch.dtype) -> peft.PeftModel:
    """The model as load_model would make it, on torch's meta device, to choose an engine and to plan memory."""
    base = skeleton(config.model, dtype)
    return _with_adapters(base, config, low_cpu_mem_usage=True)


def choose_engine(sketched: peft.PeftModel, config: Config, device: torch.device) -> tuple[bool, str]:
    """Whether micro-batches run on the engine, and if not why.

    Raises ExitWith(BAD_INPUT) where the configuration demands the engine and it cannot run the model.
    """
    if config.engine.kind == "reference":
        return False, "engine.kind reference"
    reason = unsupported_reason(as_causal_lm(sketched.get_base_model()))
    if reason and config.engine.kind == "fused":
        raise ExitWith(ExitCode.BAD_INPUT, f"--engine.kind fused: {reason}; use auto or reference")
    wants_it = config.memory.offload == "stream"
    if reason and wants_it:
        raise ExitWith(ExitCode.BAD_INPUT, f"--memory.offload stream: only the fused engine streams, and {reason}")
    if not reason and config.engine.kind == "auto" and device.type != "cuda" and not wants_it:
        reason = "no GPU; --engine.kind fused runs it here as well"
    return not reason, reason


@torch.no_grad()
def _check_head(model: LanguageModel, config: Config) -> None:
    """Raises ExitWith(BAD_INPUT) unless our loss is the model's own: some heads add a bias, or scale or cap logits."""
    causal_lm = model.causal_lm
    vocab_size = causal_lm.get_input_embeddings().num_embeddings
    ids = (torch.arange(9, device=causal_lm.device) * 7919 % vocab_size)[None]
    positions = torch.arange(8, device=ids.device)
    with model.generating():
        ours = model(MicroBatch(ids[:, :-1], positions[None], positions, ids[0, 1:]))
        logits = causal_lm(input_ids=ids[:, :-1], use_cache=False).logits[0]
    theirs = torch.nn.functional.cross_entropy(logits.float(), ids[0, 1:], reduction="sum")
    if not torch.allclose(ours, theirs, rtol=1e-2):
        raise ExitWith(
            ExitCode.BAD_INPUT,
            f"{config.model.name_or_path}: our loss on eight tokens is {ours.item():.3f}, the model's own "
            f"{theirs.item():.3f}; its head does more than multiply. Choose a Llama, Mistral or Qwen model",
        )


def keep_one_cpu_kernel(base: torch.nn.Module) -> None:
    """Forbids bitsandbytes' inference shortcut on CPUs with bf16 instructions.

    At the first evaluation it repacks NF4 weights in place, with scales rounded to bf16; training that goes on after a
    validation then computes with other weights and passes no gradient through them (Linear4bit.forward, 0.50.2).
    """
    for module in base.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.support_avx512bf16_for_cpu = False


def _with_adapters(base: PreTrainedModel, config: Config, low_cpu_mem_usage: bool = False) -> peft.PeftModel:
    # newer transformers rename gradient checkpointing; PEFT uses the old name too, and 5.17 knows no other
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
    lora = peft.LoraConfig(
        r=config.lora.r,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=list(config.lora.target_modules),
        task_type="CAUSAL_LM",
    )
    try:
        adapted = peft.get_peft_model(base, lora, low_cpu_mem_usage=low_cpu_mem_usage)
    except ValueError as error:
        raise ExitWith(ExitCode.BAD_INPUT, f"--lora.target_modules: {error}") from None
    assert isinstance(adapted, peft.PeftModel)
    return adapted


def adapter_config(model: LanguageModel) -> dict[str, object]:
    """What PEFT writes to adapter_config.json."""
    values = model.adapted.peft_config[ADAPTER].to_dict()
    return {key: sorted(v) if isinstance(v, set) else v for key, v in values.items()} | {"inference_mode": True}


def load_adapters(model: LanguageModel, tensors: Mapping[str, torch.Tensor]) -> None:
    """Copies saved adapters into the model's; raises ValueError unless names and shapes are exactly its own."""
    parameters = model.trainable()
    if set(tensors) != set(parameters):
        different = sorted(set(tensors) ^ set(parameters))
        raise ValueError(f"the saved adapters are not this model's: {', '.join(different[:3])}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if tensors[name].shape != parameter.shape:
                raise ValueError(
                    f"{name} is {list(tensors[name].shape)} in the checkpoint, {list(parameter.shape)} here"
                )
            parameter.copy_(tensors[name])

"""What is trained: PEFT's adapters, and with them rows of the vocabulary or whole layers, by the names PEFT saves."""

import warnings
from collections import Counter
from collections.abc import Mapping
from typing import Any

import peft
import torch
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightRenaming

from train.config import Config
from train.engine.layers import Vocabulary
from train.engine.linears import ADAPTER
from train.models.experts import as_shapes
from train.models.stored import renamings_of
from train.models.targets import EXPERT_PARTS, Targets, as_adapted, refuse_unmatched, resolve_targets
from train.models.tokenizer import TrainedTokens, trained_tokens
from train.models.vocabulary import extend_vocabulary, mean_row, name_of, whole_layers
from train.run.exits import ExitCode, ExitWith


def with_adapters(base: PreTrainedModel, config: Config, is_sketch: bool = False) -> tuple[peft.PeftModel, Targets]:
    """The base with what `config.lora` asks for, on PEFT's terms; a sketch's base is on the meta device.

    Raises ExitWith(BAD_INPUT) where the base has no such layers.
    """
    # newer transformers rename gradient checkpointing; PEFT uses the old name too, and 5.17 knows no other
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.* is deprecated", category=FutureWarning)
    # PEFT looks for the experts' parameters among modules, says this, and gives them the rank all the same
    warnings.filterwarnings(
        "ignore", message="The following (rank|alpha)_pattern keys did not", category=RuntimeWarning
    )
    targets, tokens = resolve_targets(base, config.lora.target_modules), trained_tokens(config)
    whole = whole_layers(base, config.lora.modules_to_save)
    if tokens.ids:
        extend_vocabulary(base, tokens.vocabulary)
    lora = peft.LoraConfig(
        r=config.lora.r,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        use_rslora=config.lora.rslora,
        target_modules=targets.names or None if targets.whole else targets.names,
        target_parameters=list(targets.whole) or None,
        modules_to_save=whole or None,
        trainable_token_indices=_rows_to_train(base, whole, tokens) or None,
        task_type="CAUSAL_LM",
    )
    try:
        with as_shapes(base):
            adapted = peft.get_peft_model(base, lora, low_cpu_mem_usage=is_sketch)
    except ValueError as error:
        option, reason = "target_modules", str(error).strip().partition("\n")[0]
        if "dropout" in reason:
            option = f"dropout {config.lora.dropout}"
        if "ParamWrapper" in reason and "dropout" in reason:
            others = " ".join(word for word in config.lora.target_modules if word not in EXPERT_PARTS)
            reason = "PEFT's adapters on a mixture's experts have no dropout: write --lora.dropout 0"
            reason += f", or leave the experts alone: --lora.target_modules {others}" if others else ""
        reason = f"--lora.{option}: {reason}"
        raise ExitWith(ExitCode.BAD_INPUT, reason) from None
    assert isinstance(adapted, peft.PeftModel)
    # PEFT knows the experts of some architectures only, and is content where another word matches
    wrapped = {name: module for name, module in adapted.get_base_model().named_modules() if hasattr(module, "lora_A")}
    placed = Counter(str(getattr(module, "parameter_name", "")) for module in wrapped.values())
    lost = [word for word, parameter in targets.experts.items() if parameter not in placed]
    refuse_unmatched([f"{word} matches no layer" for word in lost], targets.exist)
    _start_vocabulary(adapted, tokens)
    linear = [name for name, module in wrapped.items() if is_adapted_layer(module)]
    return adapted, as_adapted(targets, linear, placed)


def _rows_to_train(base: PreTrainedModel, whole: list[str], tokens: TrainedTokens) -> dict[str, list[int]]:
    """The trained tokens' rows of the embedding, and of the head where it is a matrix of its own, unless all are."""
    embedding: Any = base.get_input_embeddings()
    head: Any = base.get_output_embeddings()
    layers = [embedding] if head.weight is embedding.weight else [embedding, head]
    names = [name_of(base, layer) for layer in layers]
    return {name: list(tokens.ids) for name in names if name not in whole} if tokens.ids else {}


def _start_vocabulary(adapted: peft.PeftModel, tokens: TrainedTokens) -> None:
    """Gives new tokens their first rows, the mean of those that the base has, and makes whole layers fp32."""
    causal_lm: Any = adapted.get_base_model()
    for module in (causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings()):
        vocabulary = Vocabulary.of(module)
        weight = vocabulary.layer.weight
        if vocabulary.rows is not None:
            rows = vocabulary.rows.values
            rows.data = rows.data.float()
            if tokens.new and not weight.is_meta:
                is_new = torch.tensor([token in tokens.new for token in tokens.ids], device=rows.device)
                rows.data[is_new] = mean_row(weight, tokens.known).float()
        elif vocabulary.whole is not None:
            _keep_in_fp32(module.modules_to_save[ADAPTER], weight.dtype)


def _keep_in_fp32(layer: torch.nn.Module, compute: torch.dtype) -> None:
    """Makes a trained copy of a layer fp32 between neighbours of the compute type."""
    layer.float()
    if isinstance(layer, torch.nn.Linear):
        layer.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
    layer.register_forward_hook(lambda _, __, output: output.to(compute))


def is_adapted_layer(module: torch.nn.Module) -> bool:
    """Whether this is PEFT's layer around a linear one, and not around a parameter of experts."""
    return hasattr(module, "lora_A") and not hasattr(module, "parameter_name")


def misnamed_note(base: PreTrainedModel) -> list[str]:
    """A note on adapters that PEFT will not find again: it renames them as transformers does a base's weights, and some
    expressions take the new name for the old one, as mlp.shared_expert. takes mlp.shared_experts.
    """
    names = [name for name, module in base.named_modules() if is_adapted_layer(module)]
    renamings = renamings_of(base)
    lost = [name for name in names if any(_moves(each, f"{name}.weight") for each in renamings)]
    if not lost:
        return []
    return [
        f"PEFT itself, and what serves with it, will not find {len(lost)} of the adapters in final/, whose names "
        f"transformers changes ({lost[0]}): serve what `handloop merge` makes of them"
    ]


def _moves(renaming: WeightRenaming, name: str) -> bool:
    return bool(renaming.rename_source_key(name)[0] != name)


def trainable(adapted: peft.PeftModel) -> dict[str, torch.nn.Parameter]:
    """The trained parameters, by the names that PEFT gives them in adapter_model.safetensors."""
    trained = [(name, parameter) for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    return {name.replace(f".modules_to_save.{ADAPTER}", "").replace(f".{ADAPTER}", ""): p for name, p in trained}


def copy_into(parameters: Mapping[str, torch.nn.Parameter], tensors: Mapping[str, torch.Tensor]) -> None:
    """Copies saved tensors into the parameters; raises ValueError unless names and shapes are exactly the same."""
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

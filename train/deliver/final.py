"""The result: a folder that PEFT and transformers load."""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from train.checkpoints.contents import adapter_files
from train.models.language_model import LanguageModel
from train.run.durable import publish

BASE = "base.json"


def publish_final(
    folder: Path,
    adapters: Mapping[str, torch.Tensor],
    config: Mapping[str, object],
    tokenizer: PreTrainedTokenizerBase,
    end_token_ids: Sequence[int],
    base: Mapping[str, object],
) -> None:
    """Writes the adapter, the tokenizer with the chat template used in training, and generation settings, atomically.

    generation_config.json lists the end tokens that were trained, so that generation stops where answers ended.
    base.json says which base the adapter belongs to, where adapter_config.json has no field for it.
    """
    with publish(folder) as temporary:
        for name, content in adapter_files(adapters, config).items():
            (temporary / name).write_bytes(content)
        _write_beside(temporary, tokenizer, end_token_ids, base)


def publish_model(
    folder: Path,
    model: LanguageModel,
    tokenizer: PreTrainedTokenizerBase,
    end_token_ids: Sequence[int],
    base: Mapping[str, object],
    settings: Mapping[str, object],
) -> None:
    """Writes a model that was trained whole, in the type that its base's config.json names, and what belongs to it.

    config.json is the base's, which `settings` holds as it was trained; of a multimodal base that of its text part,
    which alone is written. AutoModelForCausalLM loads the folder.
    """
    base_folder, whole = model.about.place.folder, model.adapted.get_base_model()
    shape: Any = AutoConfig.from_pretrained(str(base_folder), trust_remote_code=False)
    dtype = shape.get_text_config(decoder=True).dtype or torch.float32
    buffers = {name: value for name, value in whole.named_buffers() if name in whole.state_dict()}
    state = {name: value.to(dtype) for name, value in whole.named_parameters()} | buffers  # a tied pair once
    with publish(folder) as temporary:
        try:
            whole.save_pretrained(temporary, state_dict=state)
        except SafetensorError as error:  # as of a full disk
            raise OSError(str(error)) from error
        if not model.about.names.served_as:
            (temporary / CONFIG_NAME).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        else:
            text: Any = copy.deepcopy(whole.config)
            text.dtype, text.use_cache = dtype, shape.get_text_config(decoder=True).use_cache
            text.save_pretrained(temporary)
        _write_beside(temporary, tokenizer, end_token_ids, base)


def _write_beside(
    folder: Path, tokenizer: PreTrainedTokenizerBase, end_token_ids: Sequence[int], base: Mapping[str, object]
) -> None:
    (folder / BASE).write_text(json.dumps(base, indent=2) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(folder)
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(end_token_ids),
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(folder)

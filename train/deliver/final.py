"""The result: a folder that PEFT and transformers load."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from train.checkpoints.contents import adapter_files
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
        (temporary / BASE).write_text(json.dumps(base, indent=2) + "\n", encoding="utf-8")
        tokenizer.save_pretrained(temporary)
        GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=list(end_token_ids),
            pad_token_id=tokenizer.pad_token_id,
        ).save_pretrained(temporary)

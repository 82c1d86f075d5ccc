"""The trainer: a hand-written Accelerate loop for LoRA and QLoRA fine-tuning."""

import logging
import os

# Memory that is free in pieces can then be used in one. torch reads it when it first allocates on a GPU.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

# On a CPU bitsandbytes recommends, at import, a package that would fetch and run binaries from the hub.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

"""The trainer: a hand-written Accelerate loop for LoRA and QLoRA fine-tuning."""

import logging

# On a CPU bitsandbytes recommends, at import, a package that would fetch and run binaries from the hub.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

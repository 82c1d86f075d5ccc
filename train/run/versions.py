"""What a run was made with."""

import platform
from importlib.metadata import version

PACKAGES = ("torch", "accelerate", "transformers", "peft", "bitsandbytes", "datasets", "safetensors")


def versions() -> dict[str, str]:
    """What the run was made with."""
    return {"python": platform.python_version()} | {name: version(name) for name in PACKAGES}

"""What a run was made with."""

import hashlib
import os
import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = ("torch", "accelerate", "transformers", "peft", "bitsandbytes", "datasets", "safetensors")
ROOT = Path(__file__).resolve().parents[2]
MAX_GIT_SECONDS = 10.0  # a network file system may hang


def versions() -> dict[str, str]:
    """What the run was made with."""
    return {"python": platform.python_version()} | {name: package_version(name) for name in PACKAGES}


def package_version(package: str) -> str:
    """An installed package's version, or none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def source_digest() -> str:
    """The sha256 of this program's source files; without hidden ones, such as Emacs's links to nowhere and Jupyter's
    copies of what is edited."""
    found = hashlib.sha256()
    for path in sorted(path for package in ("train", "data_tools") for path in (ROOT / package).rglob("*.py")):
        place = path.relative_to(ROOT)
        if not any(part.startswith(".") for part in place.parts):
            found.update(f"{place} ".encode() + path.read_bytes())
    return found.hexdigest()


def code_version() -> str:
    """This program's git commit, with -dirty where files differ from it; without a checkout the package's version."""
    if (ROOT / ".git").exists():
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
        with suppress(OSError, subprocess.SubprocessError):
            # a hook's GIT_DIR names another repository; without the lock git leaves the index alone
            environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
            environment["GIT_OPTIONAL_LOCKS"] = "0"
            done = subprocess.run(
                command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=MAX_GIT_SECONDS, check=True
            )
            return done.stdout.strip()
        return "unknown"
    with suppress(PackageNotFoundError):
        return version("handloop")
    return "unknown"

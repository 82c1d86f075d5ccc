"""Writes requirements.lock and requirements-cuda.lock: the pins of constraints.txt, with the sha256 of all their files.

    pip install uv && python launch/lock.py

uv asks the package index what each release needs and which files it has; no wheel is downloaded. What the CUDA build of
torch needs beyond constraints.txt goes into the second file, because other builds of torch do not want those gigabytes.
"""

import re
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Files that are not on PyPI and are accepted too, by the pin that they belong to.
ALSO = {
    # torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl, the build without CUDA that the tests run on
    "torch==2.13.0": ["6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b"],
}
# Pinned and in no lock: llama-cpp-python is compiled where it is installed, and nothing but it needs diskcache.
UNLOCKED = {"llama-cpp-python", "diskcache"}
HEADER = "# Made by launch/lock.py; every file of each release by its sha256. {}\n"
SAYS = {
    "requirements.lock": "The pins are those of constraints.txt.",
    "requirements-cuda.lock": "What the CUDA build of torch needs beyond requirements.lock.",
}


def resolve(project: str, constraints: Path) -> list[str]:
    """One block of text for each package that Linux needs: its pin and its hashes."""
    with tempfile.TemporaryDirectory() as folder:
        described = Path(folder, "pyproject.toml")
        described.write_text(f"{project}\n[tool.uv]\nenvironments = [\"sys_platform == 'linux'\"]\n", encoding="utf-8")
        words = ["uv", "pip", "compile", "pyproject.toml", "--extra", "dev", "--constraint", str(constraints)]
        options = ["--universal", "--python-version", "3.11", "--generate-hashes", "--no-annotate", "--no-header"]
        done = subprocess.run([*words, *options], cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
    without_markers = re.sub(r" ;.*(?= \\$)", "", done.stdout, flags=re.MULTILINE)
    return re.findall(r"^\S.*\n(?: .*\n?)*", without_markers, re.MULTILINE)


def pins(text: str) -> dict[str, str]:
    """Versions by name, as an index spells names, from the `name==version` lines of constraints or a lock."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", text, re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


def main() -> None:
    """Writes both files; raises AssertionError where constraints.txt pins what nothing needs or ALSO is old."""
    constraints = ROOT / "constraints.txt"
    pinned = pins(constraints.read_text(encoding="utf-8"))
    blocks = resolve((ROOT / "pyproject.toml").read_text(encoding="utf-8"), constraints)
    used = pins("".join(blocks))
    unused = set(pinned) - set(used) - UNLOCKED
    assert not unused, f"pinned and not needed: {sorted(unused)}"
    assert set(ALSO) <= {f"{name}=={version}" for name, version in used.items()}, "ALSO names another version"
    content = {name: HEADER.format(says) for name, says in SAYS.items()}
    for block in blocks:
        ((name, version),) = pins(block).items()
        more = [f" \\\n    --hash=sha256:{digest}" for digest in ALSO.get(f"{name}=={version}", [])]
        target = "requirements.lock" if name in pinned else "requirements-cuda.lock"
        content[target] += block.rstrip("\n") + "".join(more) + "\n"
    for name, text in content.items():
        (ROOT / name).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

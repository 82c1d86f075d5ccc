"""Writes requirements.lock and requirements-cuda.lock: the pins of constraints.txt, with the sha256 of all their files.

    pip install uv && python launch/lock.py [cu126]

uv asks the package index what each release needs and which files it has; no wheel is downloaded. What the CUDA build of
torch needs beyond constraints.txt goes into the second file, because other builds of torch do not want those gigabytes.
With cu126 it writes requirements-cu126.lock instead, which is whole: the same pins with torch's build for CUDA 12.6.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Files that are not on PyPI and are accepted too, by the pin that they belong to.
ALSO = {
    # torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl, the build without CUDA that the tests run on
    "torch==2.13.0": ["6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b"],
}
# Pinned and in no lock: llama-cpp-python is compiled where it is installed, and nothing but it needs diskcache.
# mlflow-skinny, s3fs and gcsfs are extras that bring twenty packages each.
UNLOCKED = {"llama-cpp-python", "diskcache", "mlflow-skinny", "s3fs", "gcsfs"}
HEADER = "# Made by launch/lock.py; every file of each release by its sha256. {}\n"
SAYS = {
    "requirements.lock": "The pins are those of constraints.txt.",
    "requirements-cuda.lock": "What the CUDA build of torch needs beyond requirements.lock.",
}
LINUX = "environments = [\"sys_platform == 'linux'\"]\n"
OLD_GPUS = "requirements-cu126.lock"
INDEX = "https://download.pytorch.org/whl/cu126"  # torch alone comes from there
LINUX_CU126 = f"""environments = ["sys_platform == 'linux' and platform_machine == 'x86_64'"]
index = [{{name = "cu126", url = "{INDEX}", explicit = true}}]
sources = {{torch = {{index = "cu126"}}}}
"""


def resolve(project: str, constraints: Path, settings: str = LINUX) -> list[str]:
    """One block of text for each package that Linux needs: its pin and its hashes."""
    with tempfile.TemporaryDirectory() as folder:
        described = Path(folder, "pyproject.toml")
        assert project.count("[tool.uv]\n") == 1
        described.write_text(project.replace("[tool.uv]\n", f"[tool.uv]\n{settings}"), encoding="utf-8")
        words = ["uv", "pip", "compile", "pyproject.toml", "--extra", "dev", "--constraint", str(constraints)]
        options = ["--universal", "--python-version", "3.11", "--generate-hashes", "--no-annotate", "--no-header"]
        done = subprocess.run([*words, *options], cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
    without_markers = re.sub(r" ;.*(?= \\$)", "", done.stdout, flags=re.MULTILINE)
    return re.findall(r"^\S.*\n(?: .*\n?)*", without_markers, re.MULTILINE)


def pins(text: str) -> dict[str, str]:
    """Versions by name, as an index spells names, from the `name==version` lines of constraints or a lock."""
    found = re.findall(r"^([A-Za-z0-9._-]+)==([^\s;\\]+)", text, re.MULTILINE)
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found}


def whole_lock(blocks: list[str], pinned: dict[str, str]) -> str:
    """requirements-cu126.lock; raises AssertionError where a package has no hash or is not the pinned one."""
    unhashed = [block.split()[0] for block in blocks if "--hash=sha256:" not in block]
    assert not unhashed, f"the index gives no sha256 for {', '.join(unhashed)}"
    found = pins("".join(blocks))
    assert found["torch"].endswith("+cu126"), f"the index has torch {found['torch']}"
    wanted = pinned | {"torch": f"{pinned['torch']}+cu126"}
    assert wanted.items() <= found.items(), f"not as pinned: {sorted(wanted.items() - found.items())}"
    says = f"The pins are those of constraints.txt; torch is built for CUDA 12.6.\n--extra-index-url {INDEX}"
    return HEADER.format(says) + "".join(block.rstrip("\n") + "\n" for block in blocks)


def main(words: list[str]) -> None:
    """Writes the files; raises AssertionError where constraints.txt pins what nothing needs or ALSO is old."""
    constraints = ROOT / "constraints.txt"
    pinned = pins(constraints.read_text(encoding="utf-8"))
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    if words == ["cu126"]:
        (ROOT / OLD_GPUS).write_text(whole_lock(resolve(project, constraints, LINUX_CU126), pinned), encoding="utf-8")
        return
    assert not words, f"unknown: {words}; the only word is cu126"
    blocks = resolve(project, constraints)
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
    main(sys.argv[1:])

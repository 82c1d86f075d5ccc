"""Packages are pinned with their hashes, and nothing else is installed."""

import re
import tomllib

import pytest

from launch.lock import UNLOCKED, pins, whole_lock
from tests.conftest import ROOT


def locked(name: str) -> dict[str, list[str]]:
    """`name==version` -> hashes, from a lock file."""
    hashes = r"((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)"
    blocks = re.findall(rf"^(\S+==\S+) \\\n{hashes}", (ROOT / name).read_text(), re.MULTILINE)
    return {pin: re.findall(r"[0-9a-f]{64}", hashes) for pin, hashes in blocks}


def test_the_locks_hold_every_pin_with_its_hashes() -> None:
    """requirements.lock has every pin of constraints.txt with hashes, but for what is compiled; CUDA's are apart."""
    names = ("constraints.txt", "requirements.lock", "requirements-cuda.lock")
    tested, lock, cuda = (pins((ROOT / name).read_text()) for name in names)
    assert len(tested) > 70
    assert lock == {name: version for name, version in tested.items() if name not in UNLOCKED}
    assert set(tested) >= UNLOCKED
    assert not set(lock) & set(cuda)
    assert {"triton", "nvidia-nccl-cu13"} <= set(cuda)
    for name, pinned in (("requirements.lock", lock), ("requirements-cuda.lock", cuda)):
        assert set(locked(name)) == {f"{package}=={version}" for package, version in pinned.items()}
    # with it, bitsandbytes and transformers fetch binaries from the hub and run them
    assert "kernels" not in {*lock, *cuda}
    project = (ROOT / "pyproject.toml").read_text()
    wanted = re.findall(r'"([a-z-]+)[>=]=', project)
    assert {"torch", "pytest", "setuptools"} <= set(wanted)
    assert set(wanted) <= set(lock) | UNLOCKED


def test_uv_takes_the_same_pins() -> None:
    """What `uv run` and `uv sync` read in pyproject.toml is what pip takes of constraints.txt."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    given = project["tool"]["uv"]["constraint-dependencies"]
    assert len(given) > 70
    assert pins("\n".join(given)) == pins((ROOT / "constraints.txt").read_text())


def test_the_scripts_install_only_what_the_locks_name() -> None:
    """Every pip install in launch/ checks hashes and builds nothing, except for the project itself."""
    script = (ROOT / "launch" / "_common.sh").read_text()
    assert re.search(r"^install\(\) \{ .* -m pip install .*--no-deps \"\$@\"; \}$", script, re.MULTILINE)
    others = [line.strip() for line in script.splitlines() if re.match(r"\s*install ", line)]
    assert len(others) == 5
    assert [line for line in others if "--require-hashes" not in line] == [
        "install --no-build-isolation -e . # with the setuptools of the lock"
    ]
    assert script.count("pip install") == 1


def test_the_lock_for_old_gpus_has_every_hash_and_their_torch() -> None:
    """It is the pins with torch's build for CUDA 12.6 from its index; no hash, or another version, is refused."""
    digest = "0a" * 32
    torch, rich = (f"{pin} \\\n    --hash=sha256:{digest}\n" for pin in ("torch==2.13.0+cu126", "rich==15.0.0"))
    pinned = {"torch": "2.13.0", "rich": "15.0.0"}
    text = whole_lock([torch, rich], pinned)
    assert pins(text) == {"torch": "2.13.0+cu126", "rich": "15.0.0"}
    assert "\n--extra-index-url https://download.pytorch.org/whl/cu126\n" in text
    for blocks, why in (
        ([torch, "rich==15.0.0\n"], "no sha256 for rich"),
        ([torch.replace("+cu126", ""), rich], "has torch 2.13.0"),
        ([torch.replace("2.13", "2.14"), rich], "not as pinned"),
        ([torch], "not as pinned"),
    ):
        with pytest.raises(AssertionError, match=why):
            whole_lock(blocks, pinned)

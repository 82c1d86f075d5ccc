"""Packages are pinned with their hashes, and nothing else is installed."""

import re

from launch.lock import UNLOCKED, pins
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


def test_the_scripts_install_only_what_the_locks_name() -> None:
    """Every pip install in launch/ checks hashes and builds nothing, except for the project itself."""
    script = (ROOT / "launch" / "_common.sh").read_text()
    assert re.search(r"^    install\(\) \{ .* -m pip install .*--no-deps \"\$@\"; \}$", script, re.MULTILINE)
    others = [line.strip() for line in script.splitlines() if re.match(r"\s*install ", line)]
    assert len(others) == 4
    assert [line for line in others if "--require-hashes" not in line] == [
        "install --no-build-isolation -e . # with the setuptools of the lock"
    ]
    assert script.count("pip install") == 1

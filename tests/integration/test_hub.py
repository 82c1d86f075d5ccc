"""Bases on the hub, against a hub on this machine: tokens, gates, misspellings, and a network that fails."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import BUNDLED_BASE, ROOT
from tests.fake_hub import COMMIT, FakeHub

SECONDS = 5.0  # until an error is told
# asks for each model of argv, `name@revision`, and prints what was found or why not; seconds without the imports
SCRIPT = """
import json, sys, time
from train.config import ModelConfig
from train.models import hub
from train.run.exits import ExitWith
from train.run.hub_token import take_token
take_token()
for word in sys.argv[1:]:
    name, _, revision = word.partition("@")
    start = time.monotonic()
    try:
        place = hub.locate(ModelConfig(name, revision or "main"))
        files = [path.name for path in hub.fetch_weights(place)]
        found = {"folder": str(place.folder), "commit": place.commit, "note": place.note, "files": files}
    except ExitWith as end:
        found = {"code": int(end.code), "reason": end.reason}
    print(json.dumps(found | {"seconds": time.monotonic() - start}), flush=True)
"""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    """A hub with the bundled base as an open, a gated and a private model."""
    for name in ("somebody/open", "somebody/gated-model", "somebody/private-model"):
        shutil.copytree(BUNDLED_BASE, tmp_path / "models" / name)
    (tmp_path / "models/somebody/pickles").mkdir()
    shutil.copy(BUNDLED_BASE / "config.json", tmp_path / "models/somebody/pickles")
    (tmp_path / "models/somebody/pickles/pytorch_model.bin").write_bytes(b"x")
    with FakeHub(tmp_path / "models") as server:
        yield server


def ask(hub: FakeHub, home: Path, words: Sequence[str], **environment: str) -> list[dict[str, Any]]:
    """What SCRIPT finds, in a new process whose hub is `hub` and whose cache is in `home`."""
    home.mkdir(exist_ok=True)
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "TOKEN" not in k}
    settings = kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *words], cwd=home, env=settings, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "hf_right" not in done.stdout + done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_what_the_hub_refuses_is_one_line(hub: FakeHub, tmp_path: Path) -> None:
    """Gated, private, misspelt, a revision that is gone, no safetensors: 78, the option, the way out, at once."""
    names = ["somebody/gated-model", "somebody/private-model", "somebody/opne", "somebody/open@v2", "somebody/pickles"]
    found = ask(hub, tmp_path / "home", [*names, "somebody/open@v1"])
    assert [each.get("code") for each in found] == [78] * 5 + [None]
    assert all(each["seconds"] < SECONDS and "\n" not in each["reason"] for each in found[:4])
    gated, private, misspelt, revision, pickles, good = found
    assert "the model is gated, and there is no token: accept its licence at" in gated["reason"]
    assert "HF_TOKEN" in gated["reason"]
    assert "no such model on the hub; if it is private, there is no token" in private["reason"]
    assert "--model.name_or_path somebody/opne: no such folder, and no such model" in misspelt["reason"]
    assert revision["reason"] == "--model.revision v2: somebody/open has no such branch, tag or commit"
    assert "no model.safetensors" in pickles["reason"]
    assert (good["commit"], good["files"]) == (COMMIT, ["model.safetensors"])
    assert (Path(good["folder"]) / "tokenizer.json").exists()


@pytest.mark.parametrize(
    "source", ["HF_TOKEN", "HUGGINGFACE_TOKEN", ".env HF_TOKEN", ".env HUGGINGFACE_TOKEN", "login"]
)
def test_a_token_is_found(source: str, hub: FakeHub, tmp_path: Path) -> None:
    """In either variable, in .env under either name, or from a login; it opens what is gated and is never shown."""
    home, environment = tmp_path / "home", {}
    home.mkdir()
    if source.startswith(".env"):
        (home / ".env").write_text(f'# mine\n{source.split()[1]}="hf_right"\n')
    elif source == "login":
        (home / "token").write_text("hf_right")
    else:
        environment = {source: "hf_right"}
        (home / ".env").write_text("HF_TOKEN=hf_other\n")  # the environment wins
    gated, private = ask(hub, home, ["somebody/gated-model", "somebody/private-model"], **environment)
    assert gated["commit"] == private["commit"] == COMMIT


def test_a_token_without_access_is_told(hub: FakeHub, tmp_path: Path) -> None:
    """A token that does not open the model: accept the licence, not: get a token."""
    (found,) = ask(hub, tmp_path / "home", ["somebody/gated-model"], HF_TOKEN="hf_wrong")
    assert "your token has no access: accept its licence" in found["reason"]


def test_without_a_network_the_cache_is_taken(hub: FakeHub, tmp_path: Path) -> None:
    """Offline, unreachable, failing and silent hubs: a cached model starts within seconds, others are one line."""
    home, words = tmp_path / "home", ["somebody/open", "somebody/absent"]
    (first,) = ask(hub, home, words[:1])
    asked = len(hub.paths)
    offline = ask(hub, home, words, HF_HUB_OFFLINE="1")
    assert len(hub.paths) == asked
    unreachable = ask(hub, home, words, HF_ENDPOINT="http://127.0.0.1:9")
    hub.is_broken = True
    failing = ask(hub, home, words)
    hub.is_broken, hub.is_silent = False, True
    silent = ask(hub, home, words)
    for cached, absent in (offline, unreachable, failing, silent):
        assert (cached["folder"], cached["commit"]) == (first["folder"], COMMIT)
        assert absent["code"] == 78
        assert "not in the cache of the hub, which cannot be asked" in absent["reason"]
        assert max(cached["seconds"], absent["seconds"]) < SECONDS
    assert not offline[0]["note"]
    assert all("the hub cannot be reached; somebody/open is taken" in each[0]["note"] for each in (unreachable, silent))


def test_an_adapter_of_a_hub_model_finds_its_commit(hub: FakeHub, tmp_path: Path) -> None:
    """A run on a hub model: adapter_config.json has the id and the commit, and AutoPeftModel loads it from anywhere."""
    settings = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    settings |= {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(ROOT)}
    options = ["--profile", "demo", "--model.name_or_path", "somebody/open", "--model.revision", "v1"]
    options += ["--train.max_steps", "1", "--compare.num_questions", "0", "--track.wandb", "off"]
    script = "import os, sys; from train.main import main; from peft import AutoPeftModelForCausalLM as A\n"
    script += f"assert main(sys.argv[1:]) == 0; os.chdir('/'); A.from_pretrained({str(tmp_path / 'run/final')!r})"
    run = [sys.executable, "-c", script, *options, "--run.dir", str(tmp_path / "run")]
    done = subprocess.run(run, cwd=tmp_path, env=settings, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "run/final/adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == ("somebody/open", COMMIT)
    base = json.loads((tmp_path / "run/final/base.json").read_text())
    assert (base["name"], base["commit"], len(base["fingerprint"])) == ("somebody/open", COMMIT, 64)

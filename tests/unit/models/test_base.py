"""A base is refused that has pickles, code, kernels or damage, and none of it is executed."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.conftest import BUNDLED_BASE, write_shape
from train.config import Config, MemoryConfig, ModelConfig
from train.engine.plan import reference_plan
from train.models.fingerprint import base_fingerprint, content_hashes
from train.models.hub import check_links
from train.models.language_model import load_model
from train.models.shape import model_shape
from train.models.tokenizer import load_tokenizer
from train.run.exits import ExitCode, ExitWith

PLAN = reference_plan(1, MemoryConfig())


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A complete base folder with a tiny Llama."""
    folder = tmp_path / "base"
    shutil.copytree(BUNDLED_BASE, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    write_shape(folder, json.loads((BUNDLED_BASE / "config.json").read_text())["vocab_size"])
    LlamaForCausalLM(LlamaConfig.from_pretrained(folder)).save_pretrained(folder)
    return folder


def on(config: Config, folder: Path) -> Config:
    """The configuration with this base."""
    return replace(config, model=ModelConfig(name_or_path=str(folder), quantization="none"))


def test_a_base_of_pickles_alone_is_refused(config: Config, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base with pytorch_model.bin and no safetensors is 78, and torch.load is not called."""
    calls: list[object] = []
    torch.save({"w": torch.zeros(1)}, base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    monkeypatch.setattr(torch, "load", lambda *given, **options: calls.append(given))
    with pytest.raises(ExitWith, match=r"has no model\.safetensors .* but pytorch_model\.bin: convert it") as caught:
        load_model(on(config, base), torch.device("cpu"), PLAN)
    assert caught.value.code == ExitCode.BAD_INPUT
    assert not calls


@pytest.mark.parametrize("named", ["pytorch_model.bin", "../other.safetensors", 7])
def test_an_index_names_safetensors_alone(
    named: object, config: Config, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would follow an index to any file; one that names anything but safetensors beside it is 78."""
    calls: list[object] = []
    torch.save({"w": torch.zeros(1)}, base / "pytorch_model.bin")
    (base / "model.safetensors").rename(base.parent / "other.safetensors")
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": named}}))
    monkeypatch.setattr(torch, "load", lambda *given, **options: calls.append(given))
    with pytest.raises(ExitWith, match=r"model\.safetensors\.index\.json") as caught:
        load_model(on(config, base), torch.device("cpu"), PLAN)
    assert caught.value.code == ExitCode.BAD_INPUT
    assert not calls


def test_a_base_cannot_name_a_kernel(config: Config, base: Path) -> None:
    """With `kernels` installed, transformers would fetch a binary from the hub and run it."""
    edit(base / "config.json", _attn_implementation="somebody/kernel")
    with pytest.raises(ExitWith, match="names the attention kernel 'somebody/kernel' of the hub"):
        load_model(on(config, base), torch.device("cpu"), PLAN)


BROKEN_BASES = {
    "weights": {"model.safetensors": b"\xff" * 100},
    "weights cut off": {"model.safetensors": (2**20).to_bytes(8, "little") + b"{"},
    "a list": {"config.json": b"[]"},
    "a wrong type": {"config.json": b'{"model_type": "llama", "vocab_size": "x"}'},
}


@pytest.mark.parametrize("name", BROKEN_BASES)
def test_a_broken_base_is_refused_in_one_message(name: str, config: Config, base: Path) -> None:
    """Damaged weights and a broken config.json are 78 from everything that reads them; the fingerprint reads bytes."""
    for file, content in BROKEN_BASES[name].items():
        (base / file).write_bytes(content)
    readers = [lambda c: load_model(c, torch.device("cpu"), PLAN), base_fingerprint]
    for read in readers[: 1 if "weights" in name else 2]:
        with pytest.raises(ExitWith, match="cannot read") as caught:
            read(on(config, base))
        assert caught.value.code == ExitCode.BAD_INPUT


UNREADABLE_TOKENIZERS = {
    "another library's": {"pre_tokenizer": {"type": "Newer"}},
    "no model": {"model": None},
    "another version": {"version": "9.0"},
    "a merge of no token": {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}},
}


@pytest.mark.parametrize("name", UNREADABLE_TOKENIZERS)
def test_a_tokenizer_that_its_library_refuses(name: str, config: Config, base: Path) -> None:
    """The library raises Exception itself, of no kind: 78, with what it says."""
    edit(base / "tokenizer.json", **UNREADABLE_TOKENIZERS[name])
    with pytest.raises(ExitWith, match=r"cannot read a tokenizer: .") as caught:
        load_tokenizer(on(config, base))
    assert caught.value.code == ExitCode.BAD_INPUT


def test_a_base_without_a_tokenizer(config: Config, base: Path) -> None:
    """Told as that, and not as packages that would be needed for another kind."""
    for file in base.glob("*tokenizer*"):
        file.unlink()
    with pytest.raises(ExitWith, match=r"it has no tokenizer\.json"):
        load_tokenizer(on(config, base))


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.json", "generation_config.json"])
def test_a_link_of_the_hubs_cache_that_leads_nowhere(name: str, tmp_path: Path) -> None:
    """Refused by name; a file that nothing reads may be gone."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "consolidated.safetensors").symlink_to(tmp_path / "gone")
    check_links(tmp_path, "org/model")
    (tmp_path / name).symlink_to(tmp_path / "gone")
    with pytest.raises(ExitWith, match=f"{name} is in the hub's cache as a link to a file that is gone") as caught:
        check_links(tmp_path, "org/model")
    assert caught.value.code == ExitCode.BAD_INPUT


@pytest.mark.parametrize("kind", ["sha256", "git"])
def test_a_file_of_the_hubs_cache_is_what_its_name_says(kind: str, tmp_path: Path) -> None:
    """A changed byte would be trained on, or merged, as the same base."""
    content = b"weights"
    sha1 = hashlib.sha1(b"blob 7\0" + content, usedforsecurity=False).hexdigest()
    blob = tmp_path / "blobs" / (hashlib.sha256(content).hexdigest() if kind == "sha256" else sha1)
    link = tmp_path / "snapshots" / "model.safetensors"
    for path in (blob, link):
        path.parent.mkdir()
    blob.write_bytes(content)
    link.symlink_to(blob)
    assert content_hashes([link, blob]) == [hashlib.sha256(content).hexdigest()] * 2
    blob.write_bytes(b"weighty")
    with pytest.raises(ExitWith, match="not what the hub's cache calls it") as caught:
        content_hashes([link])
    assert caught.value.code == ExitCode.BAD_INPUT


def edit(path: Path, **changes: object) -> None:
    """Changes fields of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("model_type", ["llama", "unheard_of"])
def test_code_in_a_base_is_never_executed(model_type: str, config: Config, base: Path) -> None:
    """With classes of evil.py in auto_map, a known type loads without them, and an unknown one is 78."""
    canary = base / "canary"
    (base / "evil.py").write_text(
        f"open({str(canary)!r}, 'w')\nfrom transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast\n"
        "class C(LlamaConfig): pass\nclass M(LlamaForCausalLM): pass\nclass T(PreTrainedTokenizerFast): pass\n"
    )
    classes = {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M", "AutoTokenizer": ["evil.T", "evil.T"]}
    edit(base / "config.json", auto_map=classes, model_type=model_type)
    if model_type != "llama":
        edit(base / "tokenizer_config.json", tokenizer_class="T")
    edit(base / "tokenizer_config.json", auto_map=classes)
    if model_type == "llama":
        load_tokenizer(on(config, base))
        assert isinstance(
            load_model(on(config, base), torch.device("cpu"), PLAN).adapted.get_base_model(), LlamaForCausalLM
        )
    else:
        for load in (load_tokenizer, lambda c: model_shape(c.model)):
            with pytest.raises(ExitWith, match="custom code") as caught:
                load(on(config, base))
            assert caught.value.code == ExitCode.BAD_INPUT
    assert not canary.exists()

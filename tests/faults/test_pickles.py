"""Pickles are never executed, wherever a file is read."""

import hashlib
import io
import json
import pickle
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from data_tools.cache import cache_root
from data_tools.prepare import PrepareSettings, prepare
from tests.conftest import BUNDLED_BASE, arguments, run_command, write_shape
from tests.tally import Tally
from train.checkpoints.contents import (
    ADAPTER,
    ADAPTER_CONFIG,
    CONTENTS,
    MANIFEST,
    OPTIMIZER,
    STATE,
    TrainerState,
    adapter_files,
)
from train.checkpoints.store import CheckpointStore
from train.config import Config, MemoryConfig, ModelConfig
from train.engine.plan import reference_plan
from train.models.fingerprint import base_fingerprint
from train.models.language_model import load_model
from train.models.tokenizer import load_tokenizer
from train.run.folder import RunFolder

GOOD = '{"prompt": "What is AOG?", "response": "Aircraft on ground."}\n'
PLAN = reference_plan(1, MemoryConfig())


class Touch:
    """Creates a file when unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, ...]:
        return (open, (str(self.canary), "w"))


class Malware:
    """Malicious content, and whether it was executed."""

    def __init__(self, folder: Path) -> None:
        self.canary = folder / "canary"
        archive = io.BytesIO()
        torch.save({"weight": Touch(self.canary)}, archive)
        self.contents = {"pickle": pickle.dumps(Touch(self.canary)), "torch": archive.getvalue()}

    def ran(self) -> bool:
        """Whether the canary exists; removes it."""
        there = self.canary.exists()
        self.canary.unlink(missing_ok=True)
        return there


@contextmanager
def ignore_errors() -> Iterator[None]:
    """Ignores errors: these tests only check that nothing is executed."""
    with suppress(Exception):
        yield


@pytest.fixture
def malware(tmp_path: Path) -> Malware:
    """Malicious content that was seen to work when unpickled."""
    made = Malware(tmp_path)
    pickle.loads(made.contents["pickle"])
    assert made.ran()
    torch.load(io.BytesIO(made.contents["torch"]), weights_only=False)
    assert made.ran()
    return made


@pytest.fixture(scope="module")
def clean_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete base folder with a tiny Llama."""
    folder = tmp_path_factory.mktemp("base")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        shutil.copy(BUNDLED_BASE / name, folder / name)
    write_shape(folder, json.loads((BUNDLED_BASE / "config.json").read_text())["vocab_size"])
    LlamaForCausalLM(LlamaConfig.from_pretrained(folder)).save_pretrained(folder)
    return folder


ADAPTER_BESIDE = json.dumps({"peft_type": "LORA", "r": 4, "target_modules": ["q_proj"], "base_model_name_or_path": ""})
INDEX = json.dumps({"metadata": {}, "weight_map": {"model.embed_tokens.weight": "pytorch_model.bin"}})
# file with the pickle -> (removed files, added files that refer to it)
BASE_SLOTS: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "pytorch_model.bin": (("model.safetensors",), {}),
    "pytorch_model.bin beside": ((), {}),
    "pytorch_model.bin by an index": (("model.safetensors",), {"model.safetensors.index.json": INDEX}),
    "adapter_model.bin": ((), {"adapter_config.json": ADAPTER_BESIDE}),
    "optimizer.pt": ((), {}),
    "scheduler.pt": ((), {}),
    "training_args.bin": ((), {}),
    "rng_state.pth": ((), {}),
    "model.safetensors": ((), {}),
    "config.json": ((), {}),
    "generation_config.json": ((), {}),
    "tokenizer.json": ((), {}),
    "tokenizer_config.json": ((), {}),
    "tokenizer.model": (("tokenizer.json",), {}),
    "special_tokens_map.json": ((), {}),
    "added_tokens.json": ((), {}),
    "chat_template.jinja": ((), {}),
}


@pytest.mark.fault("T24")
def test_pickles_in_the_base(tally: Tally, malware: Malware, clean_base: Path, tmp_path: Path, config: Config) -> None:
    """Pickles in place of, or beside, any file of a base are not executed when the base is loaded."""
    load_model(replace(config, model=ModelConfig(name_or_path=str(clean_base))), torch.device("cpu"), PLAN)
    kinds = malware.contents if tally.full else {"torch": malware.contents["torch"]}
    for kind, content in kinds.items():
        for number, (name, (removed, added)) in enumerate(BASE_SLOTS.items()):
            folder = tmp_path / f"{kind}{number}"
            shutil.copytree(clean_base, folder)
            for other in removed:
                (folder / other).unlink()
            for other, text in added.items():
                (folder / other).write_text(text)
            (folder / name.partition(" ")[0]).write_bytes(content)
            wanted = replace(config, model=ModelConfig(name_or_path=str(folder), quantization="none"))
            for load in (load_tokenizer, base_fingerprint, lambda c: load_model(c, torch.device("cpu"), PLAN)):
                with ignore_errors():
                    load(wanted)
            tally.check(not malware.ran(), f"{kind} as {name}")


def signed(folder: Path, run_uid: str) -> None:
    """Writes a manifest that fits the files: hashes are no defence against someone who can write both."""
    contents = {name: (folder / name).read_bytes() for name in CONTENTS}
    files = {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in contents.items()}
    manifest: dict[str, object] = {"format_version": 1, "run_uid": run_uid, "step": 1, "files": files}
    canonical = json.dumps(manifest, sort_keys=True, indent=1).encode()
    manifest["manifest_sha256"] = hashlib.sha256(canonical).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest, sort_keys=True, indent=1))


@pytest.mark.fault("T24")
def test_pickles_in_a_checkpoint(tally: Tally, malware: Malware, tmp_path: Path) -> None:
    """Pickles in place of, or beside, any file of a checkpoint are not executed, even if the manifest fits."""
    names = (ADAPTER, ADAPTER_CONFIG, OPTIMIZER, STATE, MANIFEST, "adapter_model.bin", "optimizer.pt")
    for kind, content in malware.contents.items():
        for name in names:
            for fits in (False, True) if name in CONTENTS else (False,):
                store = CheckpointStore(RunFolder(tmp_path / f"{kind}-{name}-{fits}"), keep=2)
                files = adapter_files({"a.weight": torch.zeros(2)}, {"peft_type": "LORA"})
                folder = store.save(files, {"a/state1": torch.zeros(2)}, TrainerState(1, 0, {}, {}, {}))
                (folder / name).write_bytes(content)
                if fits:
                    signed(folder, store.run_uid())
                    wanted = "" if name == ADAPTER_CONFIG else f"{name} cannot be understood"  # the sums are right
                    tally.check(store.defect(folder).startswith(wanted), f"the manifest fits {name}")
                for read in (lambda s=store, f=folder: s.load(f), store.latest):
                    with ignore_errors():
                        read()
                tally.check(not malware.ran(), f"{kind} as {name}, manifest {'fits' if fits else 'as it was'}")


def with_extension(content: bytes) -> pa.Schema:
    """A schema with the extension type that older pyarrow unpickled (CVE-2023-47248)."""
    metadata = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": content}
    columns = [pa.field(name, pa.string(), metadata=metadata) for name in ("prompt", "response")]
    return pa.schema(columns)


@pytest.mark.fault("T24")
def test_pickles_in_the_data(tally: Tally, malware: Malware, caught: Path, tokenizer: Any) -> None:
    """Pickles as a data file of any kind, or in Parquet's metadata, are not executed when data is prepared."""
    for kind, content in malware.contents.items():
        for ending in (".jsonl", ".json", ".csv", ".txt", ".md", ".parquet", ".arrow", ".pkl", ".pt"):
            path = caught / f"{kind}{ending}"
            path.write_bytes(content)
            with ignore_errors():
                prepare(PrepareSettings((str(path),)), tokenizer)
            tally.check(not malware.ran(), f"{kind} as {ending}")
        path = caught / f"{kind}-extension.parquet"
        rows = pa.Table.from_pylist([{"prompt": "a", "response": "b"}], schema=with_extension(content))
        pq.write_table(rows, path)
        named = (pq.read_schema(path).field("prompt").metadata or {}).get(b"ARROW:extension:name")
        assert named == b"arrow.py_extension_type"
        with ignore_errors():
            prepare(PrepareSettings((str(path),)), tokenizer)
        tally.check(not malware.ran(), f"{kind} in Parquet's metadata")


@pytest.mark.fault("T24")
def test_pickles_in_the_cache(tally: Tally, malware: Malware, caught: Path, tokenizer: Any) -> None:
    """Pickles in place of the prepared samples or statistics are not executed; the data is prepared again."""
    path = caught / "rows.jsonl"
    path.write_text(GOOD * 2)
    settings = PrepareSettings((str(path),))
    prepared = prepare(settings, tokenizer)
    samples, folder = prepared.dataset.to_list(), next(cache_root().glob(f"{prepared.fingerprint}-*"))
    for kind, content in malware.contents.items():
        arrow = io.BytesIO()
        schema = with_extension(content)
        with pa.ipc.new_stream(arrow, schema) as writer:
            writer.write_table(pa.Table.from_pylist([{"prompt": "a", "response": "b"}], schema=schema))
        for name, what in (
            ("samples.arrow", content),
            ("statistics.json", content),
            ("samples.arrow", arrow.getvalue()),
        ):
            (folder / name).write_bytes(what)
            again = prepare(settings, tokenizer).dataset.to_list()
            tally.check(not malware.ran() and again == samples, f"{kind} as {name}")


@pytest.mark.fault("T24")
def test_pickles_in_the_run_folder(tally: Tally, malware: Malware, config: Config) -> None:
    """Pickles in place of an earlier run's files are not executed; a new run over them ends well."""
    names = ["final/adapter_model.bin", "final/training_args.bin", "final/optimizer.pt", "run.json", "exit.json"]
    names += ["answers.json", "optimizer.pt", "checkpoints/optimizer.pt"]
    for kind, content in malware.contents.items() if tally.full else [("torch", malware.contents["torch"])]:
        run_dir = Path(config.run.dir).with_name(f"run-{kind}")
        for name in names:
            (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
            (run_dir / name).write_bytes(content)
        short = replace(config, run=replace(config.run, dir=str(run_dir)), train=replace(config.train, max_steps=1))
        outcome = run_command(arguments(short))
        ran, left = malware.ran(), sorted(path.name for path in (run_dir / "final").glob("*.[bp][it]*"))
        tally.check(not ran and outcome.returncode == 0 and not left, f"{kind}: {left} {outcome.stderr[-300:]}")

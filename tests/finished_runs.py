"""A run folder as training leaves it, made in a second: random adapters on a base, which no step has trained."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from tests.conftest import splits_of, training_of
from train.commands.handloop import main
from train.config import Config, RunConfig
from train.deliver.final import publish_final
from train.models.fingerprint import base_fingerprint, content_fingerprint
from train.models.language_model import adapter_config
from train.models.tokenizer import load_tokenizer
from train.run.attempts import AttemptLog
from train.run.folder import RunFolder


def finish(config: Config, folder: Path, size: float = 0.05) -> Path:
    """Writes config.json, attempts.jsonl and final/, a random step of this size from where training starts."""
    config = replace(config, run=RunConfig(dir=str(folder), device="cpu"))
    training = training_of(config, Accelerator(cpu=True))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in training.parameters.values():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator))
    prepared = splits_of(config).training.prepared
    publish_final(
        RunFolder.of(config).final,
        training.parameters,
        adapter_config(training.model),
        load_tokenizer(config).backend,
        prepared.statistics.end_token_ids,
        training.model.about.identity()
        | {"fingerprint": base_fingerprint(config), "content": content_fingerprint(config)}
        | {"vocabulary": training.model.head.weight.shape[0]},
    )
    log = AttemptLog(RunFolder.of(config))
    log.begin(asdict(config), {"engine": "reference", "summary": ""}, {"data": {"fingerprint": prepared.fingerprint}})
    return folder


def settings_of(folder: Path) -> dict:
    """The config.json of a model folder."""
    return json.loads((folder / "config.json").read_text())


def export_refusal(words: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What `handloop export` says when it ends with 78."""
    assert main(["export", *words]) == 78
    return capsys.readouterr().err

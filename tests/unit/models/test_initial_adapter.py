"""A run that starts from an adapter: it is the one that was saved, on the same base, or it is refused in words."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.conftest import arguments, run_command, training_of
from tests.parity.bases import Shape, on, write
from train.config import Config
from train.models.initial_adapter import ADAPTER, SETTINGS, initial_content, initial_note
from train.run.exits import ExitWith


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("models") / "base", Shape())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the run of `first` is, which the first test makes for all."""
    return tmp_path_factory.mktemp("runs") / "first"


@pytest.fixture
def first(config: Config, base: Path, finished: Path) -> Config:
    """A finished run of two steps."""
    config = on(config, base, "none")
    config = replace(config, train=replace(config.train, max_steps=2), optim=replace(config.optim, warmup=0))
    config = replace(config, run=replace(config.run, dir=str(finished)))
    if not finished.exists():
        outcome = run_command(arguments(config))
        assert outcome.returncode == 0, outcome.stderr
    return config


def from_(config: Config, folder: Path, **lora: Any) -> Config:
    """A new run that starts from the folder."""
    config = replace(config, run=replace(config.run, dir=config.run.dir + "-second"))
    return replace(config, lora=replace(config.lora, init_from=str(folder), **lora))


def refused(config: Config) -> str:
    """Why a run cannot start so, before its base is loaded or when it is."""

    def start() -> None:
        initial_content(config)
        training_of(config, Accelerator(cpu=True))

    with pytest.raises(ExitWith) as caught:
        start()
    return caught.value.reason


def test_every_folder_with_an_adapter(first: Config, tmp_path: Path) -> None:
    """The run folder, final/, a checkpoint and what PEFT saves: the new run starts with those weights, and moves on."""
    run = Path(first.run.dir)
    wanted = load_file(run / "final" / ADAPTER)
    assert any(tensor.any() for name, tensor in wanted.items() if "lora_B" in name)
    plain = tmp_path / "plain"
    plain.mkdir()
    for name in (ADAPTER, SETTINGS):
        shutil.copy(run / "final" / name, plain)
    contents = set()
    for folder in (run, run / "final", max((run / "checkpoints").iterdir()), plain):
        config = from_(first, folder)
        training = training_of(config, Accelerator(cpu=True))
        assert {name: tensor.tolist() for name, tensor in training.parameters.items()} == {
            name: tensor.tolist() for name, tensor in wanted.items()
        }
        contents.add(initial_content(config))
        assert initial_note(config) == ""
    assert len(contents) == 1


def test_an_adapter_of_peft(first: Config, base: Path, tmp_path: Path) -> None:
    """One that PEFT has saved, in bf16 and under another name of its base, is taken; the name is said."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=list(first.lora.target_modules), init_lora_weights=False)
    model = get_peft_model(model, lora, autocast_adapter_dtype=False)
    model.save_pretrained(str(tmp_path / "theirs"))
    settings = json.loads((tmp_path / "theirs" / SETTINGS).read_text())
    (tmp_path / "theirs" / SETTINGS).write_text(json.dumps(settings | {"base_model_name_or_path": "owner/name"}))
    config = from_(first, tmp_path / "theirs")
    training = training_of(config, Accelerator(cpu=True))
    for name, tensor in load_file(tmp_path / "theirs" / ADAPTER).items():
        assert torch.equal(training.parameters[name], tensor.float()), name
    assert any("names owner/name as its base" in note for note in training.model.about.notes)


def test_what_does_not_agree_is_refused(first: Config, tmp_path: Path) -> None:
    """Rank, scale, layers, widths, tokens and base, each by name with both values."""
    final = Path(first.run.dir) / "final"
    differing = from_(first, final, r=8, alpha=4, rslora=True)
    for line in ("r 4 in the adapter, 8 here", "alpha 8 in the adapter, 4 here", "rslora False in the adapter, True"):
        assert line in refused(differing)
    assert "gate_proj (3) in the adapter, not here" in refused(from_(first, final, target_modules=("q_proj",)))
    assert "embed_tokens (1) here, not in the adapter" in refused(from_(first, final, trainable_tokens=("bolt",)))
    other = write(tmp_path / "other", Shape())
    tensors = load_file(other / "model.safetensors")
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    moved = replace(from_(first, final), model=replace(first.model, name_or_path=str(other)))
    assert "it was trained on another base" in refused(moved)
    last = max((Path(first.run.dir) / "checkpoints").iterdir())
    assert "it was trained on another base" in refused(replace(moved, lora=from_(first, last).lora))
    inside = from_(first, final)
    assert "lies in --run.dir" in refused(replace(inside, run=first.run))


def test_what_is_no_whole_adapter_is_refused(first: Config, tmp_path: Path) -> None:
    """Nothing there, a pickle, other methods, NaN, half a file, and a checkpoint that was changed."""
    final, last = Path(first.run.dir) / "final", max((Path(first.run.dir) / "checkpoints").iterdir())

    def edited(change: dict[str, Any]) -> Callable[[Path], object]:
        def edit(folder: Path) -> None:
            settings = json.loads((folder / SETTINGS).read_text())
            (folder / SETTINGS).write_text(json.dumps(settings | change))

        return edit

    def not_finite(folder: Path) -> None:
        tensors = load_file(folder / ADAPTER)
        next(iter(tensors.values()))[0, 0] = float("nan")
        save_file(tensors, folder / ADAPTER, {"format": "pt"})

    def flip(folder: Path) -> None:
        content = bytearray((folder / ADAPTER).read_bytes())
        content[-1] ^= 1
        (folder / ADAPTER).write_bytes(content)

    cases: list[tuple[Path, Callable[[Path], object], str]] = [
        (
            final,
            lambda folder: (folder / ADAPTER).rename(folder / "adapter_model.bin"),
            "adapter_model.bin is not read",
        ),
        (final, lambda folder: (folder / SETTINGS).unlink(), "is no whole adapter"),
        (final, lambda folder: (folder / SETTINGS).write_text("[]"), "is no object"),
        (final, lambda folder: (folder / ADAPTER).write_bytes((folder / ADAPTER).read_bytes()[:5000]), "is no whole"),
        (final, edited({"peft_type": "VERA"}), "it is VERA, not LoRA"),
        (final, edited({"use_dora": True}), "use_dora True in the adapter, False here"),
        (final, edited({"alpha_pattern": {"q_proj": 3}}), "alpha_pattern {'q_proj': 3} in the adapter"),
        (final, edited({"bias": "all"}), "it trains biases"),
        (final, edited({"init_lora_weights": "pissa"}), "it was started with pissa"),
        (final, not_finite, "hold values that are not finite"),
        (last, flip, "is damaged: it is not what manifest.json says"),
    ]
    for number, (source, change, reason) in enumerate(cases):
        folder = tmp_path / str(number)
        shutil.copytree(source, folder)
        change(folder)
        assert reason in refused(from_(first, folder)), reason
    assert "is no whole adapter" in refused(from_(first, tmp_path / "nothing"))


def test_rows_of_tokens_keep_their_tokens(first: Config, base: Path, tmp_path: Path) -> None:
    """In another order of the same tokens each row is its token's; a new token under another name is refused."""
    run = tmp_path / "tokens"
    config = replace(first, run=replace(first.run, dir=str(run)))
    config = replace(config, lora=replace(config.lora, trainable_tokens=("bolt", "nut")))
    outcome = run_command(arguments(config))
    assert outcome.returncode == 0, outcome.stderr
    before = load_file(run / "final" / ADAPTER)
    (name,) = {each for each in before if "embed_tokens" in each}
    settings = json.loads((run / "final" / SETTINGS).read_text())
    ids = next(iter(settings["trainable_token_indices"].values()))
    shutil.copytree(run / "final", tmp_path / "turned")
    turned = {key: ids[::-1] for key in settings["trainable_token_indices"]}
    (tmp_path / "turned" / SETTINGS).write_text(json.dumps(settings | {"trainable_token_indices": turned}))
    for folder, rows in ((run / "final", before[name]), (tmp_path / "turned", before[name].flip(0))):
        training = training_of(from_(first, folder, trainable_tokens=("bolt", "nut")), Accelerator(cpu=True))
        assert torch.equal(training.parameters[name], rows)
    for words in (("nut", "bolt"), ("screw", "nut")):
        reason = refused(from_(first, run / "final", trainable_tokens=words))
        assert f"the row of token {ids[0]} is of 'bolt' in the adapter, of {words[0]!r} here" in reason

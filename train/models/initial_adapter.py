"""The adapter that a run starts from (lora.init_from), and whether it is one that this run can continue."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError

from train.config import Config
from train.models.fingerprint import base_fingerprint
from train.models.hub import locate
from train.run.exits import ExitCode, ExitWith
from train.run.folder import RunFolder

ADAPTER, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
BASE, STATE, MANIFEST = "base.json", "trainer_state.json", "manifest.json"
# how PEFT draws fresh adapters; other ways than these change the base's weights too, which the adapter then needs
PLAIN_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
# what of adapter_config.json decides what an adapter computes, beside rank, scale and the tensors
COMPUTES = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
)


TOKEN_ROWS = ".token_adapter"  # in the name of a tensor of trained tokens, behind the layer's


@dataclass(frozen=True)
class InitialAdapter:
    """An adapter's folder, read."""

    folder: Path
    settings: Mapping[str, Any]  # adapter_config.json
    tensors: Mapping[str, torch.Tensor]
    content: str  # sha256 of the tensors' file

    @classmethod
    def read(cls, config: Config) -> "InitialAdapter":
        """The adapter of lora.init_from; raises ExitWith(BAD_INPUT) where there is none that is whole."""
        check_place(config)
        folder = _folder_of(Path(config.lora.init_from))
        try:
            settings = json.loads((folder / SETTINGS).read_bytes())
            content = (folder / ADAPTER).read_bytes()
            tensors = safetensors.torch.load(content)
            if not isinstance(settings, dict):
                raise ValueError(f"{SETTINGS} is no object")
            _check_manifest(folder, content)
        except (OSError, ValueError, TypeError, KeyError, SafetensorError, RecursionError) as error:
            held = next((path.name for path in folder.glob("adapter_model.*") if path.suffix in (".bin", ".pt")), "")
            more = f"; {held} is not read, it may run code: save it as safetensors" if held else ""
            raise refusal(config, f"{folder} is no whole adapter: {error}{more}") from None
        broken = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
        if broken:
            raise refusal(config, f"{broken[0]} and {len(broken) - 1} more hold values that are not finite")
        return cls(folder, settings, tensors, hashlib.sha256(content).hexdigest())


def check_place(config: Config) -> None:
    """Raises ExitWith(BAD_INPUT) where the adapter to begin with is in the run folder, from where it may be moved."""
    if not config.lora.init_from:
        return
    folder = _folder_of(Path(config.lora.init_from)).resolve()
    if Path(config.run.dir).resolve() in (folder, *folder.parents):
        raise refusal(config, "it lies in --run.dir, which this run writes anew; choose another --run.dir")


def initial_content(config: Config) -> str:
    """sha256 of the adapter that the run starts from; empty where it starts with a fresh one.

    Raises ExitWith(BAD_INPUT), with everything that is wrong, where the run cannot continue it.
    """
    if not config.lora.init_from:
        return ""
    adapter = InitialAdapter.read(config)
    problems = [*_problems(adapter.settings, config), *_of_other_base(adapter, config)]
    if problems:
        raise refusal(config, "\n  ".join([f"{adapter.folder} cannot be continued:", *problems]))
    return adapter.content


def initial_tensors(
    config: Config, parameters: Mapping[str, torch.nn.Parameter], own: Mapping[str, Any]
) -> Mapping[str, torch.Tensor]:
    """The adapter's tensors, which are exactly those of `parameters`; `own` is this run's adapter_config.json.

    Raises ExitWith(BAD_INPUT) where it is on other layers or tokens, they have other widths, or it computes otherwise.
    """
    adapter = InitialAdapter.read(config)
    theirs, ours = set(adapter.tensors), set(parameters)
    lines = [f"{layer} in the adapter, not here" for layer in _layers(theirs - ours)]
    lines += [f"{layer} here, not in the adapter" for layer in _layers(ours - theirs)]
    for name in sorted(theirs & ours):
        shape = list(adapter.tensors[name].shape)
        if shape != list(parameters[name].shape):
            lines.append(f"{name} is {shape} in the adapter, {list(parameters[name].shape)} here")
    for name in COMPUTES:
        if (adapter.settings.get(name) or None) != (own.get(name) or None):
            lines.append(f"{name} {adapter.settings.get(name)} in the adapter, {own.get(name)} here")
    rows = {name: _row_order(name, adapter.settings, own) for name in sorted(theirs & ours) if TOKEN_ROWS in name}
    if _tokens(adapter.settings) != _tokens(own) or None in rows.values():
        lines.append(f"it trains the tokens {_tokens(adapter.settings)}, this run {_tokens(own)}")
    lines += _other_spellings(adapter.folder, own, config)
    if lines:
        shown = [*lines[:10], f"and {len(lines) - 10} more"] if len(lines) > 10 else lines
        raise refusal(config, "\n  ".join([f"{adapter.folder} is not on what this run trains:", *shown]))
    return {**adapter.tensors, **{name: adapter.tensors[name][order] for name, order in rows.items() if order}}


def _row_order(name: str, theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[int] | None:
    """For each row of a layer's trained tokens here its place in the adapter; None where the tokens are others."""
    before, now = (_tokens_of(settings, name.partition(TOKEN_ROWS)[0]) for settings in (theirs, ours))
    return list(map(before.index, now)) if sorted(before) == sorted(now) else None


def _tokens_of(settings: Mapping[str, Any], layer: str) -> list[int]:
    """Ids of a layer's trained tokens, in the order of their rows."""
    found = settings.get("trainable_token_indices") or []
    if isinstance(found, dict):
        found = next((ids for key, ids in found.items() if f".{layer}".endswith(f".{key}")), [])
    return list(found)


def _other_spellings(folder: Path, own: Mapping[str, Any], config: Config) -> Iterator[str]:
    """New tokens that the adapter's tokenizer spells otherwise, where it lies beside it."""
    try:
        added: Any = json.loads((folder / "tokenizer.json").read_bytes())["added_tokens"]
        theirs = {entry["id"]: entry["content"] for entry in added}
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return
    found = own.get("trainable_token_indices") or {}
    for token, word in zip(next(iter(found.values()), []), config.lora.trainable_tokens, strict=False):
        if theirs.get(token, word) != word:
            yield f"the row of token {token} is of {theirs[token]!r} in the adapter, of {word!r} here"


def refusal(config: Config, reason: str) -> ExitWith:
    """The end of a run whose adapter to start from cannot be used."""
    return ExitWith(ExitCode.BAD_INPUT, f"--lora.init_from {config.lora.init_from}: {reason}")


def _folder_of(path: Path) -> Path:
    """The folder with the adapter: the one that is named, or the final/ of a run folder."""
    final = RunFolder(path).final
    return final if not (path / SETTINGS).exists() and (final / SETTINGS).exists() else path


def _problems(settings: Mapping[str, Any], config: Config) -> Iterator[str]:
    """What of the adapter's settings is not this run's."""
    if settings.get("peft_type") != "LORA":
        yield f"it is {settings.get('peft_type')}, not LoRA"
        return
    lora = config.lora
    compared = (
        ("r", settings.get("r"), lora.r),
        ("alpha", settings.get("lora_alpha"), lora.alpha),
        ("rslora", bool(settings.get("use_rslora")), lora.rslora),
    )
    for name, theirs, ours in compared:
        if theirs != ours:
            yield f"{name} {theirs} in the adapter, {ours} here"
    if settings.get("bias") not in (None, "none"):
        yield f"it trains biases (bias {settings['bias']}), which is not done here"
    start = settings.get("init_lora_weights")
    if start not in PLAIN_STARTS:
        yield f"it was started with {start}, which changes the base, too; convert it to a plain LoRA with PEFT"


def _of_other_base(adapter: InitialAdapter, config: Config) -> Iterator[str]:
    """Why the adapter is not of this run's base, as far as its folder says which it is of.

    The fingerprints of a folder and of a hub's commit cannot be compared, nor can names of folders.
    """
    theirs = _fingerprint(adapter.folder)
    place, name = locate(config.model), adapter.settings.get("base_model_name_or_path")
    is_comparable = bool(place.commit) == bool(adapter.settings.get("revision"))
    if theirs and is_comparable and theirs != base_fingerprint(config):
        yield f"it was trained on another base: {name}, or {place.name} when that had other weights or settings"


def initial_note(config: Config) -> str:
    """What the adapter's folder says of its base, where that cannot be compared; else empty."""
    adapter = InitialAdapter.read(config)
    theirs, place = adapter.settings.get("base_model_name_or_path"), locate(config.model)
    is_known = bool(_fingerprint(adapter.folder)) and bool(place.commit) == bool(adapter.settings.get("revision"))
    if is_known or theirs == place.name:
        return ""
    return f"the adapter to start from names {theirs} as its base; whether that is {place.name} cannot be seen"


def _fingerprint(folder: Path) -> str:
    """The fingerprint of the adapter's base, where final/ or a checkpoint says it; else empty."""
    for name, keys in ((BASE, ("fingerprint",)), (STATE, ("identity", "model.base"))):
        try:
            found: Any = json.loads((folder / name).read_bytes())
            for key in keys:
                found = found[key]
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            continue
        if isinstance(found, str):
            return found
    return ""


def _check_manifest(folder: Path, content: bytes) -> None:
    """Raises ValueError where the folder is a checkpoint, and the tensors are not those that were saved in it."""
    if not (folder / MANIFEST).exists():
        return
    saved = json.loads((folder / MANIFEST).read_bytes())["files"][ADAPTER]["sha256"]
    if saved != hashlib.sha256(content).hexdigest():
        raise ValueError(f"{ADAPTER} is damaged: it is not what {MANIFEST} says")


def _tokens(settings: Mapping[str, Any]) -> list[int]:
    """Ids of the tokens whose rows are trained; PEFT keeps them once, or once for each layer."""
    found = settings.get("trainable_token_indices") or []
    return sorted({token for ids in found.values() for token in ids} if isinstance(found, dict) else found)


def _layers(names: Iterable[str]) -> list[str]:
    """The kinds of layers that tensors belong to, and how many of each."""
    layers = {name.partition(".lora_")[0].partition(".token_adapter")[0].removesuffix(".weight") for name in names}
    counts = Counter(layer.rpartition(".")[2] for layer in layers)
    return [f"{end} ({count})" for end, count in sorted(counts.items())]

"""A finished run: its configuration, its data, and its model as it was tuned."""

import dataclasses
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from transformers import GenerationConfig, PreTrainedTokenizerBase

from train.checkpoints.contents import ADAPTER, ADAPTER_CONFIG
from train.cli import MAY_CHANGE, parse_over
from train.config import Config, parse_bytes
from train.data import Splits, read_data, run_date
from train.deliver.adapter_delta import Trained, read_trained
from train.deliver.final import BASE
from train.engine.plan import Plan, reference_plan, spread
from train.memory.outlook import sketched_sizes
from train.models.fingerprint import base_fingerprint, content_fingerprint, content_hashes
from train.models.hub import locate
from train.models.language_model import LanguageModel, load_adapters, load_model
from train.models.shape import BROKEN
from train.models.text_part import names_of
from train.models.tokenizer import load_tokenizer, tokenizer_in
from train.run.accelerator import check_machine
from train.run.attempts import last_start
from train.run.devices import compute_type
from train.run.exits import ExitCode, ExitWith
from train.run.folder import RunFolder, read_object

GIB = 2**30
RESERVE = 0.15  # share of the free GPU memory that stays for keys, values and logits
MIN_RESERVE = 3 * GIB // 4


@dataclass(frozen=True)
class FinishedRun:
    """A run folder with a whole final/."""

    folder: RunFolder
    config: Config  # of its last attempt, with the base at the trained commit and the command's own options over it
    base: dict[str, Any]  # final/base.json

    @property
    def device(self) -> torch.device:
        """Where the model is loaded."""
        return device_of(self.config)

    @cached_property
    def trained(self) -> Trained:
        """What final/ changes in the base; raises ExitWith(BAD_INPUT) where that is not all known here."""
        return read_trained(self.folder.final, int(self.base.get("vocabulary", 0)), names_of(self.config.model))

    @property
    def adapter_sha256(self) -> str:
        """Of the adapters in final/ now: it says what was made of which."""
        return content_hashes([self.folder.final / ADAPTER])[0]


@dataclass(frozen=True)
class Tuned:
    """The model of a finished run, with its adapters, and what it is asked with."""

    run: FinishedRun
    model: LanguageModel
    tokenizer: PreTrainedTokenizerBase
    end_token_ids: tuple[int, ...]


def finished_run(path: Path, words: Sequence[str] = (), usage: str = "") -> FinishedRun:
    """The run of this folder, or of its final/; `words` are options of train/main.py that replace its own.

    Raises ExitWith(BAD_INPUT) where it is none or has no final/.
    """
    beside = RunFolder(path.parent)
    folder = beside if path == beside.final and not RunFolder(path).config.exists() else RunFolder(path)
    record = read_object(folder.config)
    if not path.is_dir():
        raise refused(path, "no such folder; name a run folder, such as runs/demo")
    if not record or folder.is_foreign(folder.config):
        raise refused(path, "it is no run folder: it has no config.json of a run")
    config = config_of(record, folder)
    if config.train.method == "full":
        reason = "it was trained whole (train.method full): final/ is a model itself, which transformers loads"
        raise refused(path, reason)
    missing = [name for name in (ADAPTER, ADAPTER_CONFIG, BASE) if not (folder.final / name).is_file()]
    if missing:
        ended = read_object(folder.exit).get("reason")
        how = f"its last attempt ended: {ended}" if ended else "no attempt has ended: one is running, or was killed"
        remedy = f"{'' if ended else 'wait for it, or '}repeat the command that trained it to finish it"
        raise refused(path, f"final/{missing[0]} is not there; {how}\n{remedy}")
    base = read_object(folder.final / BASE)
    started_in = Path(str(last_start(folder).get("working_folder", ".")))
    model = replace(config.model, name_or_path=str(base.get("name", config.model.name_or_path)))
    model = replace(model, revision=str(base.get("commit") or config.model.revision))
    config = replace(config, model=model, run=replace(config.run, dir=str(folder.path), device="auto"))
    asked = parse_over(_found_again(config, started_in), words, usage)
    _refuse_other_models(config, asked, usage)
    if asked.model.name_or_path != config.model.name_or_path and asked.model.revision == config.model.revision:
        asked = replace(asked, model=replace(asked.model, revision="main"))  # the commit was the other one's
    return FinishedRun(folder, asked, base)


def _refuse_other_models(run: Config, asked: Config, usage: str) -> None:
    """Raises ExitWith(BAD_INPUT) where an option would make another model of what was trained, or is not read."""
    before: dict[str, Any] = dataclasses.asdict(run)
    after: dict[str, Any] = dataclasses.asdict(asked)
    sections = [section for section in before if isinstance(before[section], dict)]
    pairs = [(section, name) for section in sections for name in before[section]]
    changed = [f"{section}.{name}" for section, name in pairs if before[section][name] != after[section][name]]
    refused_ones = [f"--{option}" for option in changed if not option.startswith(MAY_CHANGE)]
    if refused_ones:
        reason = f"{', '.join(refused_ones)}: a finished run is taken as it was trained; only these may be replaced: "
        raise ExitWith(ExitCode.BAD_INPUT, f"{reason}{', '.join(MAY_CHANGE)}\n{usage}".rstrip())


def device_of(config: Config) -> torch.device:
    """A GPU if there is one, unless --run.device says otherwise."""
    has_gpu = torch.cuda.is_available() and config.run.device != "cpu"
    return torch.device("cuda" if has_gpu else "cpu")


def config_of(record: dict[str, Any], folder: RunFolder) -> Config:
    """The configuration that a run recorded; raises ExitWith(BAD_INPUT) for one of another version."""
    sections: dict[str, Any] = {}
    foreign = sorted(record.keys() - {field.name for field in dataclasses.fields(Config)})
    for field in dataclasses.fields(Config):
        found, kind = record.get(field.name), field.type
        if not isinstance(kind, type) or not dataclasses.is_dataclass(kind):
            sections[field.name] = found
        elif isinstance(found, dict):
            known = {each.name for each in dataclasses.fields(kind)}
            foreign += [f"{field.name}.{name}" for name in sorted(found.keys() - known)]
            values = {
                each.name: _value(each, found[each.name]) for each in dataclasses.fields(kind) if each.name in found
            }
            with suppress(TypeError, ValueError):
                sections[field.name] = kind(**values)
    if foreign:
        raise refused(folder.config, f"this version knows no {', '.join(foreign)}; use the version that trained it")
    try:
        return Config(**sections)
    except TypeError:
        raise refused(folder.config, "it is damaged, or none of a run's") from None


def _value(field: dataclasses.Field[Any], recorded: Any) -> Any:
    """A field's value of its JSON, which has no tuples and spells infinity as text."""
    if isinstance(recorded, list):
        return tuple(recorded)
    return float(recorded) if field.type is float else recorded


def load_tuned(run: FinishedRun) -> Tuned:
    """The base as it was trained on, with the adapters of final/; in evaluation mode inside `model.generating()`.

    Where the GPU does not hold all blocks, some are streamed. Raises ExitWith(BAD_INPUT) where the base is not the one
    that the adapters belong to, or a file cannot be read.
    """
    check_machine(run.config)
    check_base(run)
    model = load_model(run.config, run.device, inference_plan(run.config, run.device))
    try:
        load_adapters(model, safetensors.torch.load_file(run.folder.final / ADAPTER))
    except (OSError, ValueError, SafetensorError) as error:
        raise refused(run.folder.final / ADAPTER, str(error)) from None
    return Tuned(run, model, *tokenizer_of(run.folder))


def check_base(run: FinishedRun) -> None:
    """Raises ExitWith(BAD_INPUT) unless the base is, to the byte, the one that the adapters were trained on."""
    base, place = run.base, locate(run.config.model)
    if base.get("content"):
        is_same = base["content"] == content_fingerprint(run.config)
    elif bool(base.get("commit")) != bool(place.commit):  # an older version's base.json
        reason = (
            f"a folder cannot be compared with a commit of the hub; name the one that {run.folder.final / BASE} names"
        )
        raise refused(Path(place.name), reason)
    else:
        is_same = base.get("fingerprint") in (None, base_fingerprint(run.config))
    if not is_same:
        reason = "its config.json or weights are not those that the adapters were trained on"
        name = Path(run.config.model.name_or_path)
        raise refused(name, f"{reason} ({run.folder.final / BASE}); name the right one: --model.name_or_path")


def check_base_is_there(run: FinishedRun) -> None:
    """Raises ExitWith(BAD_INPUT) where the base, a folder, is no longer where it was when the run was trained."""
    name = run.config.model.name_or_path
    if not run.base.get("commit") and name == run.base.get("name") and not Path(name).is_dir():
        reason = f"its base is no longer in {name}; if it has moved, write --model.name_or_path NEWPLACE"
        raise refused(run.folder.path, reason)


def inference_plan(config: Config, device: torch.device) -> Plan:
    """All blocks on the device where they fit beside RESERVE; otherwise as many are streamed as memory needs.

    transformers answers, in the compute type, by one process: how training multiplied and split rows refuses nothing.
    """
    config = replace(
        config, engine=replace(config.engine, products="bf16"), batch=replace(config.batch, context_parallel=1)
    )
    sketched = sketched_sizes(config, device, compute_type(config.model.dtype, device).dtype)
    resident, sizes = reference_plan(sketched.num_blocks, config.memory), sketched.sizes
    streams_all = config.memory.offload == "stream"
    if sizes is None or config.memory.offload == "none" or (device.type != "cuda" and not streams_all):
        return resident
    count = sizes.num_blocks
    if not streams_all:
        free = torch.cuda.mem_get_info()[0]
        free = min(free, parse_bytes(config.memory.budget)) if config.memory.budget else free
        room = free - max(MIN_RESERVE, int(RESERVE * free))
        beside = sizes.norm_bytes + sizes.head_bytes + sizes.embedding_bytes + sizes.adapter_bytes // 2
        if sizes.mixture:  # a block's experts in 16 bits, and once more with what PEFT adds to them
            beside += 2 * sizes.element_bytes * sizes.mixture.weights
        count = min(count, max(0, -(-(count * sizes.packed_bytes + beside - room) // sizes.packed_bytes)))
    if not count:
        return resident
    streamed = spread(count, sizes.num_blocks)
    return replace(resident, is_fused=True, num_kept=sizes.num_blocks, streamed=streamed)


def data_of(run: FinishedRun) -> tuple[Splits, list[str]]:
    """What the run trained on and held out, prepared again or found in the cache, and what has changed since.

    Raises ExitWith(BAD_INPUT) or DataError where the files are gone or cannot be used.
    """
    config = run.config
    today = run_date(config, run.folder.start_date("auto"))
    splits = read_data(config, load_tokenizer(config).backend, today)
    data = last_start(run.folder).get("data")
    trained_on = data.get("fingerprint") if isinstance(data, dict) else None
    changed = trained_on not in (None, splits.training.prepared.fingerprint)
    return splits, ["the data or its settings are not those that were trained on"] if changed else []


def today_of(run: FinishedRun) -> date:
    """The day that the run's chat template sees."""
    return run_date(run.config, run.folder.start_date("auto"))


def refused(place: Path, reason: str) -> ExitWith:
    """The end of a command by something that a run folder lacks."""
    return ExitWith(ExitCode.BAD_INPUT, f"{place}: {reason}")


def tokenizer_of(folder: RunFolder) -> tuple[PreTrainedTokenizerBase, tuple[int, ...]]:
    """The tokenizer with the trained chat template, and the end tokens that were taught."""
    try:
        tokenizer = tokenizer_in(folder.final)
        settings = GenerationConfig.from_pretrained(str(folder.final))
        ends: Any = settings.eos_token_id
        return tokenizer, tuple(ends) if isinstance(ends, list) else (int(ends),)
    except (*BROKEN, json.JSONDecodeError) as error:
        raise refused(folder.final, f"the tokenizer or generation settings cannot be read: {error}") from None


def _found_again(config: Config, started_in: Path) -> Config:
    """The configuration with relative paths of the data as they were meant where the run was started."""

    def found(path: str) -> str:
        return str(started_in / path) if not os.path.exists(path) and (started_in / path).exists() else path

    data = config.data
    paths, held_out = tuple(map(found, data.path)), tuple(map(found, data.validation_path))
    template = found(data.chat_template) if data.chat_template else ""
    return replace(config, data=replace(data, path=paths, validation_path=held_out, chat_template=template))

"""What a server is given: a run's adapter, a model's folder or a GGUF file, and what each says of itself.

It imports the standard library alone, because a server lives in an environment of its own.
"""

import json
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NOT_QUANTIZED = ("", "bf16", "fp16", "fp32")
TEMPLATE = "chat_template.jinja"
BESIDE_LORA = ("modules_to_save", "trainable_token_indices")  # of adapter_config.json
ADAPTER_FILE = "-adapter.gguf"  # with this ends the name of an adapter as GGUF


class Refused(Exception):
    """What was given cannot be served; the message says why, and what can."""


@dataclass(frozen=True)
class Adapter:
    """A folder that PEFT loads: final/ of a run."""

    folder: Path  # absolute, as all paths here
    base: str  # a hub id or a folder
    commit: str  # on the hub; empty for a folder
    held: str  # how the base was held while training, such as NF4; empty if that is not known
    rank: int  # the largest one
    end_token_ids: list[int]  # that were trained
    arguments: dict[str, Any]  # of the chat template

    @classmethod
    def read(cls, folder: Path, base: str) -> "Adapter":
        """Reads what final/ says of itself; `base`, if there is one, is where the base is instead."""
        config, told = read_object(folder / "adapter_config.json"), read_object(folder / "base.json")
        name = str(told.get("name") or config.get("base_model_name_or_path") or "")
        commit = str(told.get("commit") or config.get("revision") or "")
        if whole := [key for key in BESIDE_LORA if config.get(key)]:
            reason = f"{' and '.join(whole)} of adapter_config.json: servers load LoRA alone"
            raise Refused(f"{folder}: {reason}; serve the folder that `handloop merge` makes")
        if base and base != name:  # another copy, whose commit nobody knows
            name, commit = str(Path(base).resolve()) if Path(base).is_dir() else base, ""
        # without a commit it was a folder, of which an export keeps the last part: not the hub's model of that name
        is_path = name.startswith(("/", ".", "~")) or (told and not commit and not base)
        if not name or (is_path and not Path(name).is_dir()):
            raise Refused(f"{folder}: its base {name or 'has no name'} is no folder here; say where it is with --base")
        ranks = [config.get("r", 0), *(config.get("rank_pattern") or {}).values()]
        ends = read_object(folder / "generation_config.json").get("eos_token_id")
        ends = ends if isinstance(ends, list) else [ends] if isinstance(ends, int) else []
        held, arguments = str(told.get("held", "")), template_arguments(folder)
        return cls(folder, name, commit, held, max(ranks), ends, arguments)

    def note(self) -> str:
        """What is different about the base that is served, if it is; otherwise empty."""
        if self.held in NOT_QUANTIZED:
            return ""
        return (
            f"the adapter was trained on {self.base} in {self.held}, and is served on the weights as they are stored, "
            "which is another base: answers may differ from those in answers.json. To serve what was trained, serve "
            "the folder that `handloop merge --onto dequantized` makes"
        )

    def template(self) -> list[str]:
        """The chat template that was trained, if it is there."""
        path = self.folder / TEMPLATE
        return ["--chat-template", str(path)] if path.exists() else []

    def place(self) -> list[str]:
        """The base's commit, where it has one."""
        return ["--revision", self.commit] if self.commit else []


@dataclass(frozen=True)
class Merged:
    """A folder that transformers loads: base and adapter in one, or final/ of a model that was trained whole."""

    folder: Path
    arguments: dict[str, Any]  # of the chat template


@dataclass(frozen=True)
class Gguf:
    """A model in llama.cpp's format."""

    file: Path


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, empty where there is no such file; raises Refused where it cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise Refused(f"{path}: {error}") from None
    if not isinstance(found, dict):
        raise Refused(f"{path} holds no JSON object")
    return found


def template_arguments(folder: Path) -> dict[str, Any]:
    """--data.template_arguments of the run that a folder lies in, read as train.config.parse_argument does."""
    for place in folder.parents[:2]:
        data = read_object(place / "config.json").get("data")
        if isinstance(data, dict):
            pairs = (str(text).partition("=") for text in data.get("template_arguments") or ())
            return {name: value_of(text) for name, _, text in pairs}
    return {}


def value_of(text: str) -> Any:
    """What JSON or Python spell so, or else the text."""
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def find(source: Path, base: str) -> Adapter | Merged:
    """A run folder or its final/, another adapter, or a model; raises Refused."""
    place = source.resolve()
    if place.suffix == ".gguf":
        raise Refused(f"{source} is a GGUF file: {for_gguf(source)}; here a run, or a merged folder, is served")
    if not place.is_dir():
        raise Refused(f"{source} is no folder")
    for folder in (place / "final", place):
        if (folder / "adapter_config.json").exists():
            return Adapter.read(folder, base)
        if "model_type" in read_object(folder / "config.json"):
            if base:
                raise Refused("--base goes with an adapter; this model has its base in it")
            return Merged(folder, template_arguments(folder))
    if models_in(place):
        raise Refused(
            f"{source} holds GGUF files alone: {for_gguf(source)}; here a run is served, or what "
            "`handloop export RUN --format safetensors` writes"
        )
    raise Refused(f"{source} has no final/ (the run has not finished?), adapter_config.json or model's config.json")


def find_gguf(source: Path, base: str) -> Gguf:
    """A .gguf file; in a folder or its export/ the one that the Modelfile names, else the only one; raises Refused."""
    if base:
        raise Refused("--base goes with an adapter; a .gguf file has its base in it")
    place = source.resolve()
    if place.is_file() and place.suffix == ".gguf":
        return Gguf(place)
    for folder in (place, (place / "export").resolve()):
        named = (folder / model_of(folder / "Modelfile")).resolve()
        files = [named] if named.is_file() else models_in(folder)
        if len(files) > 1:
            raise Refused(f"{folder} has several models, name one: {', '.join(file.name for file in files)}")
        if files:
            return Gguf(files[0])
    raise Refused(f"there is no .gguf file of a model in {source}: {instead_of_gguf(source)}")


def models_in(folder: Path) -> list[Path]:
    """The GGUF files of models; those of adapters alone are none."""
    return [path for path in sorted(folder.glob("*.gguf")) if not path.name.endswith(ADAPTER_FILE)]


def for_gguf(source: Path) -> str:
    """The commands that serve a GGUF file, or a folder that has some."""
    place = shlex.quote(str(source))
    has_modelfile = (source if source.is_dir() else source.parent).joinpath("Modelfile").exists()
    return f"bash launch/serve_llama_cpp.sh {place}" + (
        f", or bash launch/serve_ollama.sh {place}" if has_modelfile else ""
    )


def instead_of_gguf(source: Path) -> str:
    """What to do with a folder that has no GGUF file of a model."""
    makes = "`handloop export {run} --format ollama --onto original` makes one, with a Modelfile"
    if not source.is_dir():
        return "name a folder, or a .gguf file"
    if (source / "final").is_dir():
        return makes.format(run=shlex.quote(str(source)))
    if any((source / name).exists() for name in ("adapter_config.json", "config.json")):
        served = f"vLLM and SGLang serve what it holds: bash launch/serve_vllm.sh {shlex.quote(str(source))}"
        return f"{served}; {makes.format(run='RUN')}"
    return makes.format(run="RUN")


def model_of(path: Path) -> str:
    """What the FROM line of a Modelfile names; empty where there is none."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = re.search(r"^\s*FROM\s+\"?(.+?)\"?\s*$", text, re.MULTILINE | re.IGNORECASE)
    return found[1] if found else ""

"""Serves a result with vLLM, SGLang, Ollama or llama.cpp: what launch/serve_*.sh run.

    python3 launch/serving.py ENGINE SOURCE [--name NAME] [--base BASE] [--dry-run] [OPTION OF THE SERVER ...]

It only makes the server's command line, out of what the result says of itself. It imports the standard library alone,
because a server lives in an environment of its own, with another torch than Handloop's.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

BAD_INPUT = 78  # as train.run.exits has it
LOOPBACK = ("--host", "127.0.0.1")  # nobody outside this machine reaches a server that asks for no key
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # MaxLoRARanks in vllm/config/lora.py
NOT_QUANTIZED = ("", "bf16", "fp16", "fp32")
TEMPLATE = "chat_template.jinja"
ARGUMENTS = "--default-chat-template-kwargs"  # of vLLM
PARTS = ("final", "export", "merged", "merged-original", "merged-dequantized")  # folders in a run or an export
BESIDE_LORA = ("modules_to_save", "trainable_token_indices")  # of adapter_config.json


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
        raise Refused(f"{source} goes to launch/serve_llama_cpp.sh; here a run, or a merged folder, is served")
    if not place.is_dir():
        raise Refused(f"{source} is no folder")
    for folder in (place / "final", place):
        if (folder / "adapter_config.json").exists():
            return Adapter.read(folder, base)
        if "model_type" in read_object(folder / "config.json"):
            if base:
                raise Refused("--base goes with an adapter; this model has its base in it")
            return Merged(folder, template_arguments(folder))
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
        files = [named] if named.is_file() else sorted(folder.glob("*.gguf"))
        if len(files) > 1:
            raise Refused(f"{folder} has several models, name one: {', '.join(file.name for file in files)}")
        if files:
            return Gguf(files[0])
    raise Refused(f"there is no .gguf file in {source}: `handloop export --format ollama` makes one, with a Modelfile")


def model_of(path: Path) -> str:
    """What the FROM line of a Modelfile names; empty where there is none."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = re.search(r"^\s*FROM\s+\"?(.+?)\"?\s*$", text, re.MULTILINE | re.IGNORECASE)
    return found[1] if found else ""


def vllm(source: Adapter | Merged, name: str) -> list[str]:
    """`vllm serve`: the base under its own name, and the adapter under `name`."""
    arguments = [ARGUMENTS, json.dumps(source.arguments)] if source.arguments else []
    if isinstance(source, Merged):
        return ["vllm", "serve", str(source.folder), *LOOPBACK, *arguments, "--served-model-name", name]
    rank = next((rank for rank in VLLM_RANKS if rank >= source.rank), None)
    if rank is None:
        raise Refused(f"vLLM serves adapters up to rank {VLLM_RANKS[-1]}, and this one has {source.rank}: merge it")
    module = {"name": name, "path": str(source.folder), "base_model_name": source.base}
    ends = ["--generation-config", str(source.folder)] if source.end_token_ids else []
    lora = ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", json.dumps(module)]
    tokenizer = ["--tokenizer", str(source.folder), *source.template(), *arguments]
    return ["vllm", "serve", source.base, *source.place(), *LOOPBACK, *tokenizer, *ends, *lora]


def sglang(source: Adapter | Merged, name: str) -> list[str]:
    """`sglang serve`: the base under its own name, and the adapter as BASE:NAME.

    Its rank and layers are read from the adapter, the end tokens from the base's own files alone: so those that were
    trained are put into its configuration.
    """
    if isinstance(source, Merged):
        return ["sglang", "serve", "--model-path", str(source.folder), *LOOPBACK, "--served-model-name", name]
    ends = {"eos_token_id": source.end_token_ids}
    override = ["--json-model-override-args", json.dumps(ends)] if source.end_token_ids else []
    tokenizer = ["--tokenizer-path", str(source.folder), *source.template()]
    lora = ["--enable-lora", "--lora-strict-loading", "--lora-paths", f"{name}={source.folder}"]
    return ["sglang", "serve", "--model-path", source.base, *source.place(), *LOOPBACK, *tokenizer, *override, *lora]


def llama_cpp(source: Gguf, name: str) -> list[str]:
    """`llama-server`: the model, with the chat template inside it, which alone has the run's template arguments."""
    return ["llama-server", "--model", str(source.file), "--alias", name, *LOOPBACK, "--jinja"]


def ollama(source: Gguf, name: str) -> list[str]:
    """`ollama create`: the model of the Modelfile beside the .gguf file, for the server that runs already."""
    path = source.file.parent / "Modelfile"
    if not path.exists():
        raise Refused(f"there is no {path}: `handloop export --format ollama` writes one beside the .gguf file")
    model = model_of(path)
    if (source.file.parent / model).resolve() != source.file:
        raise Refused(f"{path} is not of {source.file.name}: FROM names {model or 'nothing'}")
    return ["ollama", "create", name, "--file", str(path)]


@dataclass(frozen=True)
class Engine:
    """A server that others make."""

    find: Callable[[Path, str], Any]  # what is served, from SOURCE and --base
    command: Callable[[Any, str], list[str]]
    install: str  # how one gets it
    ask: str  # how one asks it, for what


OWN_ENVIRONMENT = "in an environment of its own"
ENGINES = {
    "vllm": Engine(find, vllm, f"pip install vllm, {OWN_ENVIRONMENT}", 'model "{name}"; port 8000 by default'),
    "sglang": Engine(find, sglang, f"pip install sglang, {OWN_ENVIRONMENT}", 'model "{model}"; port 30000 by default'),
    "ollama": Engine(find_gguf, ollama, "see https://ollama.com/download", "ollama run {name}, or its API"),
    "llama_cpp": Engine(
        find_gguf, llama_cpp, "build https://github.com/ggml-org/llama.cpp", 'model "{name}"; port 8080 by default'
    ),
}


class Options(argparse.ArgumentParser):
    """Raises Refused instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise Refused(f"{message}\n{self.format_usage().strip()}")


def default_name(found: Adapter | Merged | Gguf) -> str:
    """The run's, the folder's or the file's name."""
    if isinstance(found, Gguf):
        return found.file.stem
    return next(folder.name for folder in (found.folder, *found.folder.parents) if folder.name not in PARTS)


def make_command(words: Sequence[str]) -> tuple[list[str], list[str], bool]:
    """The server's command line, what is to be said beside it, and whether it is only to be shown; raises Refused."""
    usage = "bash launch/serve_%(prog)s.sh SOURCE [--name NAME] [--base BASE] [--dry-run] [OPTION OF THE SERVER ...]"
    if not words or words[0] not in ENGINES:
        raise Refused(f"name a server: {', '.join(ENGINES)}")
    options = Options(prog=words[0], usage=usage, allow_abbrev=False)
    options.add_argument("source", type=Path, help="a run folder, a merged model, or a .gguf file")
    options.add_argument("--name", default="", help="the name under which it is served; else the folder's or file's")
    options.add_argument("--base", default="", help="the base's folder or hub id, if it is not where it was trained on")
    options.add_argument("--dry-run", action="store_true", help="show the command and end")
    given, others = options.parse_known_args(words[1:])
    engine = ENGINES[words[0]]
    found = engine.find(given.source, given.base)
    name = given.name or default_name(found)
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise Refused(f"{name!r} is no name of letters, digits, dots, hyphens and underlines; give --name")
    command = engine.command(found, name) + others
    if shutil.which(command[0]) is None and not given.dry_run:
        raise Refused(f"{command[0]} is not on the PATH: {engine.install}; --dry-run shows the command without it")
    model = f"{found.base}:{name}" if isinstance(found, Adapter) else name
    notes = [found.note()] if isinstance(found, Adapter) and found.note() else []
    if not isinstance(found, Gguf) and found.arguments and ARGUMENTS not in command:
        told = json.dumps({"chat_template_kwargs": found.arguments})
        notes.append(f"the run gave its chat template arguments, and the server has no option for it: ask with {told}")
    return command, [*notes, f"ask for it: {engine.ask.format(name=name, model=model)}"], given.dry_run


def main(words: Sequence[str]) -> int:
    """Becomes the server; returns an exit code where it does not."""
    try:
        command, notes, is_shown_only = make_command(words)
    except Refused as refused:
        print(f"handloop: {refused}", file=sys.stderr)
        return BAD_INPUT
    print(*notes, sep="\n", file=sys.stderr)
    print(shlex.join(command), flush=True)
    if not is_shown_only:
        os.execvp(command[0], command)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

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

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # as a script it has launch/ itself there

from launch.sources import Adapter, Gguf, Merged, Refused, find, find_gguf, model_of

BAD_INPUT = 78  # as train.run.exits has it
LOOPBACK = ("--host", "127.0.0.1")  # nobody outside this machine reaches a server that asks for no key
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # MaxLoRARanks in vllm/config/lora.py
ARGUMENTS = "--default-chat-template-kwargs"  # of vLLM
PARTS = ("final", "export", "merged", "merged-original", "merged-dequantized")  # folders in a run or an export


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


def own_environment(package: str) -> str:
    """How one installs a server, which has another torch."""
    return f"python3 -m venv ~/{package} && ~/{package}/bin/pip install {package} && PATH=~/{package}/bin:$PATH"


LLAMA_CPP = "https://github.com/ggml-org/llama.cpp"
BUILD = f"git clone {LLAMA_CPP} && cmake -S llama.cpp -B llama.cpp/build && cmake --build llama.cpp/build -j && "
BUILD += 'PATH="$PWD/llama.cpp/build/bin:$PATH"'
ENGINES = {
    "vllm": Engine(find, vllm, own_environment("vllm"), 'model "{name}"; port 8000 by default'),
    "sglang": Engine(find, sglang, own_environment("sglang"), 'model "{model}"; port 30000 by default'),
    "ollama": Engine(find_gguf, ollama, "https://ollama.com/download", "ollama run {name}, or its API"),
    "llama_cpp": Engine(find_gguf, llama_cpp, BUILD, 'model "{name}"; port 8080 by default'),
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
        raise Refused(
            f"{command[0]} is not on the PATH; --dry-run shows the command without it. To install it:\n{engine.install}"
        )
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

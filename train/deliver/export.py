"""A finished run -> a folder to hand on: adapter, merged model, GGUF files, Modelfile, README and receipts."""

import json
import re
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path, PurePath
from typing import Any

from data_tools.chat_template import ChatTemplate
from train.checkpoints.contents import ADAPTER_CONFIG
from train.config import parse_argument
from train.data import Splits
from train.deliver.card import Contents, card
from train.deliver.exported import write_receipts
from train.deliver.final import BASE
from train.deliver.finished import FinishedRun, today_of, tokenizer_of
from train.deliver.gguf_adapter import adapter_tensors, write_adapter_gguf
from train.deliver.gguf_check import check_tokens, unknown_ends
from train.deliver.gguf_shape import GgufShape, gguf_shape
from train.deliver.gguf_tokenizer import Vocabulary, vocabulary
from train.deliver.gguf_writer import write_gguf, write_vocabulary
from train.deliver.llama_cpp_runner import LlamaCpp, quantize
from train.deliver.merge import Merge, Onto
from train.deliver.modelfile import modelfile
from train.deliver.optional import COMPILES, INSTALL, package
from train.deliver.proof import Proof, data_for_proof, limits_of, proof_of
from train.deliver.receipt import MAX_NEW_TOKENS, Limits
from train.models.hub import licence_of, locate
from train.run.durable import make_readable, publish
from train.run.exits import ExitCode, ExitWith
from train.run.folder import read_object

MERGED_FORMATS = {"safetensors", "gguf", "ollama"}
CHECKED_ROWS = 64  # samples of the data that llama.cpp tokenises
# bits a weight takes, with scales; for the free space that is asked for
BITS = {"F16": 16.0, "Q8_0": 8.5, "Q6_K": 6.6, "Q5_K_M": 5.7, "Q4_K_M": 4.9, "Q4_0": 4.6}
README, MODELFILE = "README.md", "Modelfile"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Wanted:
    """What is to be exported."""

    formats: frozenset[str]
    quantized: tuple[str, ...]  # further GGUF files
    onto: Onto
    quantized_limits: Limits

    @property
    def has_gguf(self) -> bool:
        """Whether a GGUF file of the whole model is wanted."""
        return bool({"gguf", "ollama"} & self.formats)


@dataclass
class Export:
    """An export of one run; `write` does it."""

    run: FinishedRun
    wanted: Wanted
    say: Say
    notes: list[str] = field(default_factory=list)
    receipts: dict[str, dict[str, Any]] = field(default_factory=dict)
    limits: dict[str, Limits] = field(default_factory=dict)  # of the same files

    def __post_init__(self) -> None:
        self.tokenizer, self.end_token_ids = tokenizer_of(self.run.folder)
        arguments = dict(map(parse_argument, self.run.config.data.template_arguments))
        self.template = ChatTemplate(self.tokenizer, arguments, today_of(self.run))
        self.name = re.sub(r"[^\w.-]+", "-", self.run.folder.path.resolve().name) or "model"
        self.has_llama_cpp = find_spec("llama_cpp") is not None

    def write(self, target: Path) -> list[str]:
        """Fills `target`, whole or not at all; returns lines on what is there.

        Raises ExitWith(BAD_INPUT) where a format cannot be written, ExitWith(UNLIKE) where a file does not behave like
        the trained model.
        """
        merge = self._checked(target)
        with publish(target) as folder:
            if "adapter" in self.wanted.formats:
                self._adapter(folder)
            gguf_files = self._merged_files(folder, merge) if merge is not None else []
            adapter_gguf = self._adapter_file(folder) if "adapter-gguf" in self.wanted.formats else ""
            if "ollama" in self.wanted.formats:
                self._modelfile(folder, gguf_files[:2][-1])  # the first quantised one, if there is any
            contents = Contents(
                adapter="adapter" in self.wanted.formats,
                merged=self._merged_name if "safetensors" in self.wanted.formats else "",
                gguf=gguf_files,
                adapter_gguf=adapter_gguf,
                modelfile="ollama" in self.wanted.formats,
                receipts=self.receipts,
                notes=self.notes,
            )
            text = card(self.run, self.name, contents, licence_of(locate(self.run.config.model)))
            (folder / README).write_text(text, encoding="utf-8")
            write_receipts(folder, self.run, self.receipts)
            make_readable(folder)
        return self.notes

    @property
    def _merged_name(self) -> str:
        """Where the merged model is: beside an adapter in a folder of its own, as transformers loads only one."""
        return "merged" if "adapter" in self.wanted.formats else "."

    def _checked(self, target: Path) -> Merge | None:
        """Looks at everything that can be refused before anything is computed; the merge, if one is wanted."""
        if self.wanted.has_gguf or "adapter-gguf" in self.wanted.formats:
            package("gguf")
            self.notes += self._shape.notes
        if self.wanted.quantized:
            package("llama_cpp")
        if "adapter-gguf" in self.wanted.formats:
            adapter_tensors(self.run.folder.final, self._shape, self.run.trained)
        if self.wanted.has_gguf:
            self._check_vocabulary()
        if not MERGED_FORMATS & self.wanted.formats:
            return None
        merge = Merge.of(self.run, self.wanted.onto)
        kinds = (*(("F16",) if self.wanted.has_gguf else ()), *self.wanted.quantized)
        weights = merge.num_bytes / merge.dtype.itemsize
        need = merge.num_bytes + sum(weights * BITS[kind] / 8 for kind in kinds)
        free = shutil.disk_usage(next(path for path in (target, *target.resolve().parents) if path.exists())).free
        if need > free:
            reason = f"{need / 1e9:.1f} GB are needed, and {free / 1e9:.1f} GB are free"
            raise ExitWith(ExitCode.BAD_INPUT, f"--output {target}: {reason}")
        return merge

    @cached_property
    def _shape(self) -> GgufShape:
        return gguf_shape(locate(self.run.config.model).folder)

    @cached_property
    def _vocabulary(self) -> Vocabulary:
        """With the tokens that the run has added."""
        rows = max(self._shape.config.vocab_size, self.run.trained.vocabulary)
        return vocabulary(self.tokenizer, self.end_token_ids, rows, self.template, self.name)

    def _check_vocabulary(self) -> None:
        """Tries llama.cpp's tokenizer on a file of the vocabulary alone."""
        self.notes += self._vocabulary.notes
        if not self.has_llama_cpp:
            self.notes.append(
                "the GGUF files are not verified: neither their tokens nor their answers were compared, because "
                "llama-cpp-python is not installed"
            )
            self.say(f"to have the GGUF files verified, install llama-cpp-python, {COMPILES}:\n  {INSTALL}")
            return
        samples = self._splits.training.samples
        rows = [samples[i]["input_ids"] for i in range(min(CHECKED_ROWS, len(samples)))]
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch, f"{self.name}-vocabulary.gguf")
            write_vocabulary(path, self._shape, self._vocabulary)
            count = check_tokens(path, self._vocabulary, self.tokenizer, self.template, rows)
            unknown = unknown_ends(path, self.end_token_ids)
        self.say(f"llama.cpp tokenises {count} texts as the tokenizer does")
        if unknown:
            names = ", ".join(map(repr, self.tokenizer.convert_ids_to_tokens(unknown)))
            self.notes.append(f"llama.cpp does not end an answer at {names} by itself: set it as a stop text")

    def _adapter(self, folder: Path) -> None:
        """Copies final/, in which a base that is a folder is named as such: its path is this machine's business."""
        shutil.copytree(self.run.folder.final, folder, dirs_exist_ok=True)
        if not self.run.base.get("commit"):
            for name, key in ((ADAPTER_CONFIG, "base_model_name_or_path"), (BASE, "name")):
                told = read_object(folder / name)
                text = json.dumps({**told, key: PurePath(str(told.get(key))).name}, indent=2)
                (folder / name).write_text(f"{text}\n", encoding="utf-8")

    def _merged_files(self, folder: Path, merge: Merge) -> list[str]:
        """Writes the merged model, and GGUF files of it; their names."""
        keeps = "safetensors" in self.wanted.formats
        merged = folder / self._merged_name if keeps else folder / ".merged"
        merged.mkdir(exist_ok=True)
        if keeps:
            receipt = self._proof.write_merged(merge, merged, limits_of(merge), self.say)
            weights = next(merged.glob("model.safetensors*"))  # the file, or the index of several
            name = weights.relative_to(folder).as_posix()
            self.receipts[name], self.limits[name] = receipt.as_json(), limits_of(merge)
        else:
            if self.has_llama_cpp:
                _ = self._proof  # before the merge, so that both are not in memory
            self.say(f"merging onto the {merge.onto} base")
            merge.write(merged)
        files = self._gguf_files(folder, merged, limits_of(merge)) if self.wanted.has_gguf else []
        if not keeps:
            shutil.rmtree(merged)
        return files

    def _gguf_files(self, folder: Path, merged: Path, limits: Limits) -> list[str]:
        first = folder / f"{self.name}-F16.gguf"
        self.say(f"writing {first.name}")
        write_gguf(merged, first, "F16", gguf_shape(merged), self._vocabulary)
        files = [first.name]
        self._measure_gguf(first, limits)
        for kind in self.wanted.quantized:
            path = folder / f"{self.name}-{kind}.gguf"
            self.say(f"writing {path.name}")
            self.notes += [f"{path.name}: {fallback}" for fallback in quantize(first, path, kind)]
            self._measure_gguf(path, self.wanted.quantized_limits)
            files.append(path.name)
        return files

    def _adapter_file(self, folder: Path) -> str:
        path = folder / f"{self.name}-adapter.gguf"
        write_adapter_gguf(self.run.folder.final, path, self._shape, self.run.trained, self.name)
        self.notes.append(f"{path.name} was not tried: llama.cpp loads it over the base's own GGUF file")
        return path.name

    def _modelfile(self, folder: Path, file_name: str) -> None:
        ends = [str(token) for token in self.tokenizer.convert_ids_to_tokens(list(self.end_token_ids))]

        def served(rendered: str) -> str:
            return self._vocabulary.prompt(rendered, self.tokenizer)

        text, notes = modelfile(file_name, self.template, served, ends)
        (folder / MODELFILE).write_text(text, encoding="utf-8")
        self.notes += notes

    @cached_property
    def _splits(self) -> Splits:
        return data_for_proof(self.run, self.say)

    @cached_property
    def _proof(self) -> Proof:
        return proof_of(self.run, self._splits, self.say, unloads=False)

    def _measure_gguf(self, path: Path, limits: Limits) -> None:
        if self.has_llama_cpp:
            self.say(f"asking llama.cpp with {path.name} what the trained model was asked")
            with LlamaCpp(path, self.end_token_ids, MAX_NEW_TOKENS) as model:
                self.receipts[path.name] = self._proof.receipt(path.name, model, limits).as_json()
            self.limits[path.name] = limits

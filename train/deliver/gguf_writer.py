"""A model folder -> one GGUF file, a tensor at a time, through the `gguf` package."""

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from train.deliver.gguf_shape import GgufShape, not_written
from train.deliver.gguf_tokenizer import Vocabulary
from train.deliver.optional import package
from train.models.stored import StoredWeights
from train.run.exits import ExitCode, ExitWith

FloatType = Literal["F16", "F32"]
TYPES = {"F16": torch.float16, "F32": torch.float32}
SUFFIXES = (".weight", ".bias")
RECOMPUTED = ".rotary_emb.inv_freq"  # which old checkpoints hold; it follows from config.json


@dataclass(frozen=True)
class Stored:
    """A tensor in a model folder, and what it becomes."""

    name: str  # in GGUF
    place: str  # in its file
    file: Any  # safetensors, open
    shape: tuple[int, ...]

    def dtype(self, kind: FloatType) -> torch.dtype:
        """Norms and biases stay in fp32: they are small, and llama.cpp adds them in fp32."""
        return torch.float32 if len(self.shape) == 1 else TYPES[kind]

    def num_bytes(self, kind: FloatType) -> int:
        """What it takes in the file."""
        return torch.Size(self.shape).numel() * self.dtype(kind).itemsize


def write_gguf(folder: Path, path: Path, kind: FloatType, shape: GgufShape, vocabulary: Vocabulary) -> None:
    """Writes the model in `folder` (config.json, *.safetensors) to `path`, one tensor in memory at a time.

    Raises ExitWith(BAD_INPUT) where a tensor is missing, left over, or does not fit into fp16.
    """
    gguf = package("gguf")
    with ExitStack() as files:
        try:
            stored = list(_stored(folder, shape, files))
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise not_written(folder, f"its weights cannot be read: {error}") from None
        _check(folder, shape, vocabulary, stored)
        need, free = sum(tensor.num_bytes(kind) for tensor in stored), shutil.disk_usage(path.parent).free
        if need > free:
            reason = f"{need / 1e9:.1f} GB are needed, and {free / 1e9:.1f} GB are free"
            raise ExitWith(ExitCode.BAD_INPUT, f"{path.parent}: {reason}")
        writer = gguf.GGUFWriter(path, shape.family.architecture)
        try:
            _write_keys(gguf, writer, kind, shape, vocabulary)
            factors = shape.rope_factors()
            if factors is not None:
                writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.numpy().dtype, factors.nbytes)
            for tensor in stored:
                like = torch.empty(0, dtype=tensor.dtype(kind)).numpy().dtype
                writer.add_tensor_info(tensor.name, tensor.shape, like, tensor.num_bytes(kind))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            if factors is not None:
                writer.write_tensor_data(factors.numpy())
            for tensor in stored:
                writer.write_tensor_data(_values(folder, shape, tensor, kind).numpy())
        finally:
            writer.close()


def write_vocabulary(path: Path, shape: GgufShape, vocabulary: Vocabulary) -> None:
    """A GGUF file without weights, of which llama.cpp loads the vocabulary alone."""
    gguf = package("gguf")
    writer = gguf.GGUFWriter(path, shape.family.architecture)
    _write_keys(gguf, writer, "F32", shape, vocabulary)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _write_keys(gguf: Any, writer: Any, kind: FloatType, shape: GgufShape, vocabulary: Vocabulary) -> None:
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(vocabulary.model_name)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    types = gguf.LlamaFileType
    writer.add_file_type(types.MOSTLY_F16 if kind == "F16" else types.ALL_F32)
    shape.write_keys(writer)
    vocabulary.write_keys(writer)


def _stored(folder: Path, shape: GgufShape, files: ExitStack) -> Iterator[Stored]:
    """The tensors of the model, in the order of the files; one that GGUF has no name for raises ExitWith."""
    gguf = package("gguf")
    arch = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[shape.family.architecture]
    names = gguf.get_tensor_name_map(arch, shape.num_layers)
    index = folder / SAFE_WEIGHTS_INDEX_NAME
    is_single = (folder / SAFE_WEIGHTS_NAME).exists()
    held = [SAFE_WEIGHTS_NAME] if is_single else sorted(set(json.loads(index.read_text())["weight_map"].values()))
    weights = StoredWeights([folder / file_name for file_name in held], files)
    weights = shape.part.of(weights) if shape.part else weights
    for own, tensor in weights.tensors.items():
        if own.endswith(RECOMPUTED) or (shape.is_tied and own == "lm_head.weight"):
            continue
        found = (names.get_name(f"{prefix}{own}", try_suffixes=SUFFIXES) for prefix in ("", "model."))
        name = next(filter(None, found), None)  # some checkpoints leave the prefix out
        if name is None:
            raise not_written(folder, f"{tensor.place} has no place in a GGUF of {shape.family.architecture}")
        yield Stored(name, tensor.place, weights.opened[tensor.file], tensor.shape)


def _check(folder: Path, shape: GgufShape, vocabulary: Vocabulary, stored: list[Stored]) -> None:
    """Raises ExitWith(BAD_INPUT) unless these are the tensors that llama.cpp wants and reads, each once."""
    names = [tensor.name for tensor in stored]
    expected = shape.expected()
    missing, twice = sorted(expected - set(names)), sorted({name for name in names if names.count(name) > 1})
    biases = {f"{name}.bias" for name in shape.family.biases}
    unread = [name for name in names if name not in expected and name.partition(".")[2].partition(".")[2] not in biases]
    for what, found in (("missing", missing), ("there twice", twice), ("not read by llama.cpp", unread)):
        if found:
            raise not_written(folder, f"{found[0]} is {what}" + (f", as {len(found) - 1} more are" * (len(found) > 1)))
    embedding = next(tensor for tensor in stored if tensor.name == "token_embd.weight")
    if embedding.shape[0] != shape.config.vocab_size:
        raise not_written(folder, f"it embeds {embedding.shape[0]} tokens, and config.json says otherwise")
    if len(vocabulary.tokens) != shape.config.vocab_size:
        raise not_written(folder, f"its vocabulary has {len(vocabulary.tokens)} tokens, and config.json says otherwise")


def _values(folder: Path, shape: GgufShape, tensor: Stored, kind: FloatType) -> torch.Tensor:
    stored = tensor.file.get_tensor(tensor.place)
    if not stored.is_floating_point():
        raise not_written(folder, f"{tensor.place} is {stored.dtype}, no floating-point tensor")
    values = shape.permuted(tensor.name, stored).to(tensor.dtype(kind)).contiguous()
    if not values.isfinite().all():
        raise not_written(folder, f"{tensor.place} has values that are no finite numbers in {kind}")
    return values

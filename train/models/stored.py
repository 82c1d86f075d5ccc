"""What the weight files of a base hold, and its values as the architecture wants them."""

import copy
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

FLOATS = ("F64", "F32", "F16", "BF16")  # types of values; everything else is a code that needs its scales
COUNTS = ("I64", "I32", "BOOL")  # types of tables such as position ids and masks
NUM_NAMED = 4  # tensors that a message names


TABLES = ("inv_freq", "masked_bias", "attn_mask", "position_ids", "k_scale", "v_scale")


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header of its file describes it."""

    file: Path
    place: str  # its name there
    dtype: str  # as safetensors spells it: BF16, U8
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Difference:
    """What the files lack of an architecture, and what they hold beside it; names as the architecture has them."""

    missing: Sequence[str]
    mismatched: Sequence[tuple[str, Sequence[int], Sequence[int]]]  # name, shape in the files, shape by config.json
    left: Sequence[str]  # as the files have them

    def problems(self) -> list[str]:
        """What must not be trained on, one line each; empty where every tensor is there with its shape."""
        lines = []
        if self.missing:
            lines.append(f"the files lack {named(self.missing)}")
        for name, found, wanted in self.mismatched[:NUM_NAMED]:
            lines.append(f"{name} is {list(found)} in the files, {list(wanted)} by config.json")
        if len(self.mismatched) > NUM_NAMED:
            lines.append(f"and {len(self.mismatched) - NUM_NAMED} more have other shapes")
        return lines


class StoredWeights:
    """The tensors of a base's weight files, which stay open until `files` is closed, by their names there."""

    def __init__(self, paths: Sequence[Path], files: ExitStack) -> None:
        """Reads the headers; raises ValueError where a name stands in two files, SafetensorError for a broken one."""
        self.tensors: dict[str, StoredTensor] = {}
        self.opened: dict[Path, Any] = {}
        for path in paths:
            opened = self.opened[path] = files.enter_context(safe_open(path, framework="pt"))
            for name in opened.keys():  # noqa: SIM118  (no mapping)
                if name in self.tensors:
                    raise ValueError(f"{name} is both in {self.tensors[name].file.name} and in {path.name}")
                header = opened.get_slice(name)
                self.tensors[name] = StoredTensor(path, name, header.get_dtype(), tuple(header.get_shape()))

    def values(self, name: str) -> torch.Tensor:
        """The tensor of this name in the files, in host memory."""
        tensor = self.tensors[name]
        return self.opened[tensor.file].get_tensor(tensor.place)

    def num_bytes(self, name: str) -> int:
        """What the tensor takes in its file."""
        tensor = self.tensors[name]
        bits = re.search(r"\d+", tensor.dtype)  # F32, F8_E4M3; BOOL takes a byte
        return math.prod(tensor.shape) * (int(bits[0]) // 8 if bits else 1)

    def slices(self) -> dict[str, Any]:
        """The tensors as safetensors' slices, whose values are read when they are asked for."""
        return {name: self.opened[tensor.file].get_slice(tensor.place) for name, tensor in self.tensors.items()}

    def renamed(self, names: Mapping[str, str]) -> "StoredWeights":
        """Those of the tensors that `names` names, by their new names; raises ValueError where two get the same."""
        other = copy.copy(self)
        other.tensors = {names[name]: tensor for name, tensor in self.tensors.items() if name in names}
        if len(other.tensors) < len(names):
            twice = next(name for name in names if other.tensors[names[name]].place != name)
            raise ValueError(f"{names[twice]} is there twice, as {twice} and {other.tensors[names[twice]].place}")
        return other

    def check_types(self, is_quantized: bool) -> None:
        """Raises ValueError where weights are codes of a quantisation that config.json does not tell of."""
        for name in self.tensors:
            weight = self.tensors.get(name.removesuffix("SCB") + "weight")
            if name.endswith(".SCB") and weight is not None and weight.dtype != "I8":
                raise ValueError(f"{name} is of 8-bit codes, and the weight beside it is stored as {weight.dtype}")
        other = {
            name: tensor.dtype
            for name, tensor in self.tensors.items()
            if tensor.dtype not in FLOATS and (tensor.dtype not in COUNTS or name.endswith(".weight"))
        }
        if other and not is_quantized:
            name, dtype = next(iter(other.items()))
            raise ValueError(
                f"{name} and {len(other) - 1} more are stored as {dtype}, and config.json has no quantization_config "
                "that says what they mean"
            )

    def check_names(self) -> None:
        """Raises ValueError where one tensor is there under two names: with and without the decoder's prefix."""
        twice = [name for name in self.tensors if name.startswith("model.") and name[6:] in self.tensors]
        if twice:
            raise ValueError(f"{twice[0]} is there twice, also as {twice[0][6:]}")

    def place_of(self, name: str, is_tied_embedding: bool = False) -> str:
        """The name in the files of an architecture's parameter; empty where it is not there.

        As in transformers, a decoder may have been saved without its head, and a tied pair under either name.
        """
        candidates = [name, name.removeprefix("model.")]
        candidates += ["lm_head.weight"] if is_tied_embedding else []
        return next((candidate for candidate in candidates if candidate in self.tensors), "")

    def is_packed(self, stored: str) -> bool:
        """Whether bitsandbytes' scales of a weight stand beside it."""
        return f"{stored}.absmax" in self.tensors

    def quantized_parts(self, stored: str) -> dict[str, torch.Tensor]:
        """The scales and tables that bitsandbytes keeps beside a packed weight, by the ends of their names."""
        start = f"{stored}."
        return {name.removeprefix(start): self.values(name) for name in self.tensors if name.startswith(start)}


def named(names: Sequence[str]) -> str:
    """The first few of the names, and how many more there are."""
    shown = ", ".join(list(names)[:NUM_NAMED])
    return f"{shown} and {len(names) - NUM_NAMED} more" if len(names) > NUM_NAMED else shown


def left_in_the_model(left: Iterable[str], modules: Iterable[str]) -> list[str]:
    """Those of the leftovers that would change the model: parts of its own modules, and further blocks.

    A bias or a norm that config.json does not want, an adapter that was not merged, or a block beyond its number of
    layers, means that another architecture was saved. Tables that a module computes itself (rotary frequencies, masks)
    and scales of a cache do not.
    """
    known = {name for name in modules if name}
    found = []
    for name in left:
        parent, _, last = name.rpartition(".")
        if last in TABLES or parent.endswith("rotary_emb"):
            continue
        block = next((part for part in _ancestors(parent) if part.rpartition(".")[2].isdigit()), "")
        is_in_a_block = bool(block) and (block in known or block.rpartition(".")[0] in known)
        if parent in known or is_in_a_block:
            found.append(name)
    return found


def described_leftovers(left: Sequence[str]) -> str:
    """The leftovers, counted by where their names begin."""
    counts = Counter(".".join(name.split(".")[:2]) for name in left)
    parts = [f"{start} ({count})" for start, count in counts.most_common(NUM_NAMED)]
    more = f" and {len(counts) - NUM_NAMED} more places" if len(counts) > NUM_NAMED else ""
    return f"{len(left)} tensors of the files are no part of the model and are not read: {', '.join(parts)}{more}"


def _ancestors(name: str) -> Iterable[str]:
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts) + 1))


def renamings_of(model: PreTrainedModel) -> list[WeightRenaming]:
    """What transformers makes of names in files of the model's kind; without those of files that are years old."""
    mapping = get_model_conversion_mapping(model, add_legacy=False)
    return [each for each in mapping if isinstance(each, WeightRenaming)]


def name_as_read(name: str, renamings: Iterable[WeightRenaming], known: Collection[str]) -> str:
    """What transformers' renamings, one after another, make of a name in the files.

    One that is a tensor's of the model already stays, as in transformers, unless it becomes another such: some
    expressions match what they make, as .experts. does in .mlp.experts.
    """
    read = name
    for renaming in renamings:
        read = renaming.rename_source_key(read)[0]
    return name if name in known and read not in known else read

"""The text part of a multimodal base: trained as an ordinary causal language model, saved for the class that serves.

A weight has three names: in transformers' text class (model.layers.0...), in the multimodal class, which vLLM and
transformers serve and whose names an adapter needs (model.language_model.layers.0...), and in the files, as whoever
published the base saved it (language_model.model.layers.0...). The first two are read off the two classes, built
without weights, the third off the names in the files.
"""

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    __version__,
)
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming

from train.config import ModelConfig
from train.models.hub import unreadable
from train.models.shape import BROKEN, cannot_read, model_shape, positions_note
from train.models.stored import StoredWeights, name_as_read, named, renamings_of

PEFT_PREFIX = "base_model.model."  # which PEFT puts before the names of the base's modules
# Text parts without a causal language model of their own in transformers, and the one that computes the same of text:
# rotary embeddings with three positions that are equal are those with one. The weights' names and shapes are compared.
TWINS: dict[str, type[PreTrainedConfig]] = {
    "qwen2_vl_text": Qwen2Config,
    "qwen2_5_vl_text": Qwen2Config,
    "qwen3_vl_text": Qwen3Config,
}
OF_THREE_POSITIONS = ("mrope_section", "mrope_interleaved")


@dataclass(frozen=True)
class Names:
    """The names of modules and weights in the class that is trained, and in the one that serves.

    Of an ordinary base the two are one class, and nothing is renamed.
    """

    served_as: str = ""  # the multimodal class; empty for an ordinary base
    pairs: tuple[tuple[str, str], ...] = ()  # how names begin: in the text class, in the multimodal one

    @property
    def decoder(self) -> str:
        """The decoder's name in the text class; empty for an ordinary base."""
        return self.pairs[0][0].removesuffix(".") if self.pairs else ""

    def served(self, name: str) -> str:
        """The name in the class that serves, of a module or a weight, also of one of PEFT's."""
        return _renamed(name, self.pairs)

    def text(self, name: str) -> str:
        """The name in the class that is trained; one that is such already stays."""
        return _renamed(name, [(served, text) for text, served in self.pairs])

    def served_settings(self, settings: Mapping[str, Any], adapted: Iterable[str]) -> dict[str, Any]:
        """adapter_config.json for the class that serves.

        In it ends of names would also match the vision tower's layers: the `adapted` modules are named whole.
        """
        if not self.pairs:
            return dict(settings)
        rows: Any = settings.get("trainable_token_indices")
        return dict(settings) | {
            "target_modules": sorted(map(self.served, adapted)),
            "modules_to_save": [self.served(name) for name in settings.get("modules_to_save") or []] or None,
            "trainable_token_indices": {self.served(name): ids for name, ids in rows.items()} if rows else rows,
        }


@dataclass(frozen=True)
class TextPart:
    """What is loaded of a multimodal base."""

    shape: PreTrainedConfig  # of the text class
    names: Names
    embedding: str  # the parameters' names in the text class
    head: str
    beside: frozenset[str]  # parts of names by which weights are known that are not text: vision_tower
    ignored: tuple[str, ...]  # expressions for weights that transformers leaves in the files, such as mtp.*
    renamings: tuple[WeightRenaming, ...]  # what transformers makes of names in the files for the multimodal class
    known: frozenset[str]  # names of that class's parameters

    def __str__(self) -> str:
        return f"text part of {self.names.served_as}; its vision weights are not read"

    def places(self, stored: Iterable[str]) -> dict[str, str]:
        """The text weights among the names in the files, each with its name in the text class.

        Raises ValueError where there is no text part, or a weight that is neither of it nor known to lie beside.
        """
        every = ((key, name_as_read(key, self.renamings, self.known)) for key in sorted(stored))
        read = {key: name for key, name in every if not self._is_beside(name)}
        keys = list(read.values())
        core = self.embedding.removeprefix(self._decoder)
        starts = [key.removesuffix(core) for key in keys if key == core or key.endswith(f".{core}")]
        heads = [key for key in keys if key == self.head or key.endswith(f".{self.head}")]
        if len(starts) != 1 or len(heads) > 1:
            found = named([*(start + core for start in starts), *heads])
            raise ValueError(f"a text part has one embedding {core} and at most one head {self.head}: found {found}")
        pairs = [(key.removesuffix("weight"), self.head.removesuffix("weight")) for key in heads]
        pairs.append((starts[0], self._decoder))
        places = {key: _renamed(key, pairs) for key in keys if any(key.startswith(start) for start, _ in pairs)}
        unknown = [key for key, name in read.items() if name not in places]
        if unknown:
            beside = ", ".join(sorted(self.beside))
            raise ValueError(f"{named(unknown)} is neither of the text part ({starts[0]}*) nor beside it ({beside})")
        return {key: places[name] for key, name in read.items() if name in places}

    def of(self, stored: StoredWeights) -> StoredWeights:
        """The text weights of the files, by the names of the text class; raises ValueError as `places`."""
        return stored.renamed(self.places(stored.tensors))

    @property
    def _decoder(self) -> str:
        return f"{self.names.decoder}."

    def _is_beside(self, key: str) -> bool:
        return not self.beside.isdisjoint(key.split(".")) or any(re.search(each, key) for each in self.ignored)


def text_part(config: ModelConfig) -> TextPart | None:
    """What is loaded of the base where it is multimodal; None for an ordinary one, which is loaded whole.

    Raises ExitWith(BAD_INPUT) where transformers has no text class for it.
    """
    shape: Any = model_shape(config)
    text = shape.get_text_config(decoder=True)
    if type(shape) not in AutoModelForImageTextToText._model_mapping or type(text) is type(shape):
        return None
    # that it has a class for the whole, as for Mllama's, does not help: an adapter of one does not load into the other
    known = type(text) in AutoModelForCausalLM._model_mapping
    if not known and text.model_type not in TWINS:
        raise unreadable(config.name_or_path, _no_text_class(shape, text))
    own = copy.deepcopy(text) if known else _twin(text)
    try:
        whole = _skeleton(AutoModelForImageTextToText, shape)
        head: Any = whole.get_output_embeddings()
        own.tie_word_embeddings = head is not None and head.weight is whole.get_input_embeddings().weight
        inner = _skeleton(AutoModelForCausalLM, own)
        part = _part(own, whole, inner) if head is not None else None  # Nemotron-H Omni does not tell which it is
    except BROKEN as error:
        raise cannot_read(config, "a multimodal model", error) from None
    if part is None:
        raise unreadable(config.name_or_path, _no_text_class(shape, text))
    stored: Any = getattr(shape, "quantization_config", None) or getattr(text, "quantization_config", None)
    if stored:
        own.quantization_config = _quantization(part, inner, stored)
    return part


def names_of(config: ModelConfig) -> Names:
    """Of a base, multimodal or not; raises ExitWith(BAD_INPUT) as text_part."""
    part = text_part(config)
    return part.names if part else Names()


def loaded_shape(config: ModelConfig) -> PreTrainedConfig:
    """The configuration of the class that is trained: of a multimodal base the text class's."""
    part = text_part(config)
    return part.shape if part else model_shape(config)


def note_on(config: ModelConfig) -> list[str]:
    """What a user should know of what is loaded of the base: that it is a part, or takes more positions."""
    part = text_part(config)
    return [*([str(part)] if part else []), *positions_note(config)]


def _part(own: PreTrainedConfig, whole: PreTrainedModel, inner: PreTrainedModel) -> TextPart | None:
    """How the two classes belong together; None where the whole does not hold the weights of the text class."""
    embeddings = [_name_of(model, model.get_input_embeddings()) for model in (inner, whole)]
    heads = [_name_of(model, model.get_output_embeddings()) for model in (inner, whole)]
    start, dot, core = embeddings[0].rpartition(".")
    decoder = start + dot
    if not embeddings[1].endswith(core):
        return None
    pairs = ((f"{heads[0]}.", f"{heads[1]}."), (decoder, embeddings[1].removesuffix(core)))
    names = Names(type(whole).__name__, pairs[::-1])
    text = {names.served(name): parameter.shape for name, parameter in inner.named_parameters()}
    every = {name: parameter.shape for name, parameter in whole.named_parameters()}
    if any(every.get(name) != shape for name, shape in text.items()) or _computed(whole, text) - _computed(inner, text):
        return None
    starts = {start for name in text for start in _starts(name)}
    beside = {next(start for start in _starts(name) if start not in starts) for name in every.keys() - text.keys()}
    ignored: list[str] = []
    for model in (whole, inner):
        ignored += getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    words = frozenset(start.rpartition(".")[2] for start in beside)
    renamings = tuple(renamings_of(whole))
    ends = (f"{embeddings[0]}.weight", f"{heads[0]}.weight")
    return TextPart(own, names, *ends, words, tuple(ignored), renamings, frozenset(every))


def _computed(model: PreTrainedModel, names: Iterable[str]) -> set[tuple[str, ...]]:
    """How transformers computes weights of these names of what is stored, as experts of what is stored transposed.

    Of a multimodal class it must be no more than of the text class, which is given what is in the files.
    """
    found = set()
    for each in get_model_conversion_mapping(model, add_legacy=False):
        if isinstance(each, WeightConverter):
            ends = [target.replace("*", ".*") for target in each.target_patterns]
            if any(re.search(end, name) for end in ends for name in names):
                kinds = [type(operation).__name__ for operation in each.operations]
                found.add((*each.source_patterns, *each.target_patterns, *kinds))
    return found


def _quantization(part: TextPart, inner: PreTrainedModel, stored: Any) -> dict[str, Any]:
    """How the files are quantised; the layers that are not, however they are spelled, by their names in `inner`."""
    found = copy.deepcopy(stored if isinstance(stored, dict) else stored.to_dict())
    decoder = f"{part.names.decoder}."
    children = {name.removeprefix(decoder).partition(".")[0] for name, _ in inner.named_parameters()}
    skipped = []
    for name in found.get("llm_int8_skip_modules") or []:
        words = name.split(".")
        place = next((i for i, word in enumerate(words) if word in children), 0)
        is_text = place and part.beside.isdisjoint(words)
        skipped.append(decoder + ".".join(words[place:]) if is_text else name)
    return found | ({"llm_int8_skip_modules": skipped} if skipped else {})


def _twin(text: Any) -> PreTrainedConfig:
    """The configuration of the ordinary model that computes what this text part computes of text."""
    kind = TWINS[text.model_type]
    known = kind().to_dict().keys() - {"model_type", "architectures", "transformers_version"}
    settings = {key: value for key, value in text.to_dict().items() if key in known}
    rope = settings.get("rope_parameters") or {}
    settings["rope_parameters"] = {key: value for key, value in rope.items() if key not in OF_THREE_POSITIONS}
    return kind(**settings)


def _skeleton(kind: Any, shape: PreTrainedConfig) -> PreTrainedModel:
    """The model without weights and buffers: 0.1 s for 62 blocks."""
    shape = copy.deepcopy(shape)
    vars(shape).pop("quantization_config", None)
    with init_empty_weights(include_buffers=True):
        model: PreTrainedModel = kind.from_config(shape, trust_remote_code=False, dtype=torch.float32)
    model.tie_weights()
    return model


def _no_text_class(shape: PreTrainedConfig, text: PreTrainedConfig) -> str:
    return (
        f"it is multimodal ({shape.model_type}), and transformers {__version__} has no causal language model for its "
        f"text part ({text.model_type}) alone that reads its files; it is not trained here"
    )


def _name_of(model: PreTrainedModel, wanted: object) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def _starts(name: str) -> list[str]:
    """The name's beginnings, the shortest first, up to itself."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts) + 1)]


def _renamed(name: str, pairs: Iterable[tuple[str, str]]) -> str:
    """The name with another beginning, where it has one of these; `.` ends a module's, and PEFT's own stays."""
    prefix = PEFT_PREFIX if name.startswith(PEFT_PREFIX) else ""
    whole = f"{name.removeprefix(prefix)}."
    for before, after in pairs:
        if whole.startswith(before):
            return f"{prefix}{after}{whole.removeprefix(before)}".removesuffix(".")
    return name

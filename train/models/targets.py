"""Which linear layers get an adapter: what --lora.target_modules matches, and what it does not."""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners import tuners_utils
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from train.config import LLAMA_LINEAR_LAYERS
from train.models.experts import expert_linears, expert_words
from train.run.exits import ExitCode, ExitWith

ALL_LINEAR = "all-linear"
NO_LAYERS = "none"
NAME = re.compile(r"[\w.-]+")
# projections that some architectures hold fused, as three-dimensional parameters of their experts; PEFT turns the names
# of the parts into that of the whole (utils/transformers_weight_conversion.py)
EXPERT_PARTS = {"gate_proj": "gate_up_proj", "up_proj": "gate_up_proj", "w1": "gate_up_proj", "w3": "gate_up_proj"}
EXPERT_PARTS |= {"down_proj": "down_proj", "w2": "down_proj", "gate": "weight"}


@dataclass(frozen=True)
class Targets:
    """What PEFT is told, and how many layers each word of the option stands for."""

    names: list[str]  # as PEFT knows them: ends of names, or whole names where ends would match too much
    counts: dict[str, int]  # by the words of the option
    num_layers: int  # linear layers of the decoder
    exist: str  # the linear layers that there are, for people
    experts: dict[str, str]  # words that stand for a parameter of the experts alone, and its name
    matched: frozenset[str] = frozenset()  # whole names of the linear layers that are meant
    parts: frozenset[str] = frozenset()  # parameters of experts that are meant, if any
    whole: tuple[str, ...] = ()  # ends of their names, where PEFT has to be told of parameters (gpt-oss)
    note: str = ""  # on what is meant and has no adapter


def as_adapted(targets: Targets, linear: Collection[str], parameters: Counter[str]) -> Targets:
    """What was asked for, with what PEFT has made of it: the adapted linear layers, and the experts' parameters.

    Of some architectures PEFT takes a word that dense layers and experts share for the experts', of others it does not
    know the experts.
    """
    counts = {}
    for word in targets.counts:
        of_experts = parameters[EXPERT_PARTS.get(word, word)]
        counts[word] = sum(_matches(word, name) for name in linear) + of_experts
    notes = [targets.note] if targets.note else []
    if missed := targets.matched - set(linear):
        notes.append(f"{len(missed)} linear layers have no adapter: PEFT takes their names for those of the experts")
    if any(not parameters[part] for part in targets.parts):
        notes.append("the experts have no adapters: PEFT does not know them by these names")
    return replace(targets, counts=counts, note="; ".join(notes))


def resolve_targets(base: PreTrainedModel, words: Sequence[str]) -> Targets:
    """Matches each word with the linear layers of the decoder: the end of a name, a regular expression over the whole
    name, or all-linear.

    The default, Llama's seven names, stands for all-linear where a family has no experts and other names, in some or
    all layers (hybrids name what their linear attention has otherwise).
    Raises ExitWith(BAD_INPUT) with every word that matches nothing and the names that exist. The head, embeddings, and
    layers outside the decoder, such as those of a vision tower, are never adapted.
    """
    linear = list(_linear_layers(base))
    parameters, spelled = _expert_parameters(base), expert_words(base)
    matched: set[str] = set()
    counts: dict[str, int] = {}
    experts: dict[str, str] = {}
    parts: set[str] = set()
    refused = _refused_by_peft(base, linear) if ALL_LINEAR in words else set()
    for word in words:
        found = {name for name in linear if _matches(word, name)}
        found -= refused if word == ALL_LINEAR else set()
        matched |= found
        counts[word] = len(found)
        part = EXPERT_PARTS.get(word, word)
        parts |= {part} if parameters[part] else set()
        if not found and parameters[part]:
            counts[word], experts[word] = parameters[part], part
    ends = Counter(name.rpartition(".")[2] for name in linear)
    exist = ", ".join(f"{end} ({count})" for end, count in sorted(ends.items())) or NO_LAYERS
    if spelled:
        exist += f" (and of the experts, which {ALL_LINEAR} leaves alone, {', '.join(spelled)})"
    is_partial = not all(counts.values()) or _is_hybrid(base)
    if tuple(words) == LLAMA_LINEAR_LAYERS and is_partial and not parameters:
        return resolve_targets(base, [ALL_LINEAR])  # the default means all of a block, by Llama's names
    refuse_unmatched([_reason(base, word) for word in words if not counts[word]], exist)
    refuse_unmatched([reason for word in words if (reason := _head_too(base, word))], exist)
    is_exact = all(NAME.fullmatch(word) and word != ALL_LINEAR for word in words)
    # an end of a name is kept where it means the same to PEFT, which knows no decoder
    others = [name for name, module in base.named_modules() if name not in linear and _is_linear(module)]
    if is_exact and not any(_matches(word, name) for word in words for name in others):
        names = list(words)
    else:
        names = [*sorted(matched), *experts]
    whole = _whole_parameters(base, parts)
    names = [name for name in names if not (whole and name in experts)]
    names = [each for name in names for each in (_as_peft_asks(name, spelled) if name in experts else [name])]
    note = f"{len(refused)} linear layers have no adapter: PEFT refuses {_ends_of(refused)} here" if refused else ""
    return Targets(names, counts, len(linear), exist, experts, frozenset(matched), frozenset(parts), whole, note)


def _whole_parameters(base: PreTrainedModel, parts: Collection[str]) -> tuple[str, ...]:
    """Ends of names of these parameters of experts, if the base's files hold them as a whole, transposed: such are no
    layers to PEFT. From the name of the block's part on, as in mlp.experts.down_proj."""
    names = [name for name, linear in expert_linears(base) if linear.is_transposed and linear.name in parts]
    return tuple(sorted({".".join(name.rsplit(".", 3)[1:]) for name in names}))


def _as_peft_asks(word: str, spelled: Mapping[str, str]) -> list[str]:
    """The experts' layers that a word stands for, as PEFT knows them: the parts of what transformers has fused."""
    parts = ["gate_proj", "up_proj"] if word == "gate_up_proj" else [word]
    return [spelled.get(part, part) for part in parts]


def _refused_by_peft(base: PreTrainedModel, linear: Sequence[str]) -> set[str]:
    """Layers on which PEFT puts no adapter in models of this type: Mamba's kernels take out_proj's weight itself."""
    found = set()
    for name in linear:
        try:
            tuners_utils._check_lora_target_modules_mamba(LoraConfig(), base, name.rpartition(".")[2])
        except ValueError:
            found.add(name)
        except AttributeError:  # a later PEFT's has another name
            break
    return found


def _ends_of(names: Iterable[str]) -> str:
    """The last parts of the names, each once."""
    return ", ".join(sorted({name.rpartition(".")[2] for name in names}))


def _is_hybrid(base: PreTrainedModel) -> bool:
    """Whether some layers have linear attention, whose projections have names of their own."""
    return "linear_attention" in (getattr(base.config, "layer_types", None) or [])


def refuse_unmatched(reasons: Sequence[str], exist: str) -> None:
    """Raises ExitWith(BAD_INPUT) where there are words that match nothing, with the names that exist."""
    if reasons:
        lines = "\n  ".join(reasons)
        if exist == NO_LAYERS:
            reason = f"--lora.target_modules:\n  {lines}\nthe decoder has no linear layers that can be adapted"
            raise ExitWith(ExitCode.BAD_INPUT, f"{reason}; this base is not trained here")
        raise ExitWith(
            ExitCode.BAD_INPUT,
            f"--lora.target_modules:\n  {lines}\nthe decoder's linear layers are {exist}; all of them: "
            f"--lora.target_modules {ALL_LINEAR}",
        )


def decoder_name(base: PreTrainedModel) -> str:
    """The name of the language model's decoder among the modules of the base; empty where it is the whole."""
    decoder: Any = base.get_decoder()
    return next((name for name, module in base.named_modules() if module is decoder), "")


def _linear_layers(base: PreTrainedModel) -> Iterator[str]:
    start = decoder_name(base)
    head, others = base.get_output_embeddings(), _other_models(base)
    for name, module in base.named_modules():
        inside = (not start or name.startswith(f"{start}.")) and not name.startswith(others)
        if inside and module is not head and _is_linear(module):
            yield name


def _other_models(base: PreTrainedModel) -> tuple[str, ...]:
    """How names begin in models of another configuration that lie within the decoder, as GIT's image encoder."""
    whole: Any = base.config
    own = {type(whole), type(whole.get_text_config(decoder=True))}
    found = (name for name, module in base.named_modules() if isinstance(module, PreTrainedModel))
    return tuple(f"{name}." for name in found if type(base.get_submodule(name).config) not in own)


def _is_linear(module: torch.nn.Module) -> bool:
    """A linear layer; one of an architecture's own making only where it is no more than a product, as Falcon's, and
    unlike a router.
    """
    is_own = type(module).__module__.startswith("transformers.models.")
    return isinstance(module, torch.nn.Linear | Conv1D) and (not is_own or _is_product(type(module)))


@cache
def _is_product(kind: type[torch.nn.Module]) -> bool:
    """Whether a small layer of the kind computes what torch's linear layer does; draws nothing from the generator."""
    try:
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad():
            layer: Any = kind(3, 2)
            x = torch.arange(12.0).view(4, 3)
            found, wanted = layer(x), torch.nn.functional.linear(x, layer.weight, layer.bias)
    except (TypeError, ValueError, RuntimeError, AttributeError):
        return False
    return isinstance(found, torch.Tensor) and found.shape == wanted.shape and torch.allclose(found, wanted, rtol=1e-4)


def _expert_parameters(base: PreTrainedModel) -> Counter[str]:
    """How many three-dimensional parameters there are, by the last part of their names."""
    return Counter(linear.name for _, linear in expert_linears(base))


def _matches(word: str, name: str) -> bool:
    if word == ALL_LINEAR:
        return True
    if NAME.fullmatch(word):
        return name == word or name.endswith(f".{word}")
    return re.fullmatch(word, name) is not None


def _head_too(base: PreTrainedModel, word: str) -> str:
    """What is wrong with an expression that matches the head beside other layers, or nothing."""
    head = base.get_output_embeddings()
    found = [name for name, module in base.named_modules() if module is head and _matches(word, name)]
    if not found or word == ALL_LINEAR:
        return ""
    return f"{word} matches {found[0]}, too, the output head, which stays frozen"


def _reason(base: PreTrainedModel, word: str) -> str:
    """Why a word matches no linear layer of the decoder."""
    found = [(name, module) for name, module in base.named_modules() if _matches(word, name) and word != ALL_LINEAR]
    if not found:
        return f"{word} matches no layer"
    name, module = found[0]
    if module is base.get_output_embeddings():
        return f"{word} is the output head, which stays frozen"
    if isinstance(module, torch.nn.Embedding):
        return f"{word} is an embedding, which stays frozen: adapters go on linear layers"
    if _is_linear(module):
        return f"{word} matches {name}, which is not in the decoder"
    return f"{word} matches {name}, a {type(module).__name__}, which is no linear layer"

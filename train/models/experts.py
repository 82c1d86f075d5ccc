"""A mixture's experts in NF4, and how its files hold them.

transformers holds experts as parameters of three dimensions, which bitsandbytes' layers do not know. Here packed
weights stand in their place, and give way to dequantised ones while transformers runs the block, or PEFT asks for their
shape. (bitsandbytes' own nn.parametrize does the same by torch's parametrizations; PEFT 0.21 adds its own to them in
each forward pass, and does not find them again.)
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import bitsandbytes as bnb
import torch
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter, WeightRenaming

from train.engine.linears import ExpertLinear
from train.models.parameters import as_parameter, computed_values
from train.models.stored import StoredWeights, name_as_read

Parts = list[list[str]]  # of one parameter: for gate, for up, or for down the tensor of each expert


def pack_experts(base: PreTrainedModel, wanted: BitsAndBytesConfig) -> None:
    """Puts 4-bit parameters in the place of a skeleton's experts, of those that the files of the base are read for:
    as a tensor for each expert, or transposed as a whole. What is packed already stays."""
    known = expert_parts(base)
    for name, linear in expert_linears(base):
        if (name in known or linear.is_transposed) and not isinstance(linear.weight, bnb.nn.Params4bit):
            kind = {"compress_statistics": wanted.bnb_4bit_use_double_quant, "quant_type": wanted.bnb_4bit_quant_type}
            params4bit: Any = bnb.nn.Params4bit
            linear.weight = params4bit(linear.weight.data, requires_grad=False, **kind)


def expert_linears(base: torch.nn.Module) -> Iterator[tuple[str, ExpertLinear]]:
    """Three-dimensional parameters of modules of experts, packed or not, and their names."""
    for name, module in base.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            is_packed = isinstance(parameter, bnb.nn.Params4bit) and not isinstance(module, bnb.nn.Linear4bit)
            if is_packed or (parameter.dim() == 3 and "expert" in name):
                yield f"{name}.{own}", ExpertLinear(module, own)


def packed_experts(base: torch.nn.Module) -> list[ExpertLinear]:
    """The experts' parameters that are packed, or will be."""
    return [linear for _, linear in expert_linears(base) if isinstance(linear.weight, bnb.nn.Params4bit)]


def adapts_experts(adapted: torch.nn.Module) -> bool:
    """Whether PEFT has adapters on experts' parameters."""
    return any(hasattr(module, "parameter_name") and hasattr(module, "lora_A") for module in adapted.modules())


def expert_parameter(
    module: torch.nn.Module, name: str, values: torch.Tensor, device: torch.device
) -> torch.nn.Parameter:
    """A module's parameter of values as transformers' module has them, or quantised already; experts are packed as
    [E, N, K], in whose rows a scale's weights are of one output."""
    parameter = getattr(module, name)
    is_packed = isinstance(parameter, bnb.nn.Params4bit) and not isinstance(values, bnb.nn.Params4bit)
    if is_packed and not isinstance(module, bnb.nn.Linear4bit):
        values = ExpertLinear(module, name).turned(values).contiguous()
    return as_parameter(parameter, values, device)


def trained_values(base: torch.nn.Module, name: str, values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """What training computes with where the files hold these values of a parameter, or its packed ones."""
    start, _, own = name.rpartition(".")
    module = base.get_submodule(start)
    found = computed_values(expert_parameter(module, own, values, device))
    is_of_experts = isinstance(getattr(module, own), bnb.nn.Params4bit) and not isinstance(module, bnb.nn.Linear4bit)
    return ExpertLinear(module, own).turned(found) if is_of_experts else found


def lend_to_transformers(base: PreTrainedModel) -> None:
    """From here on packed experts are dequantised while the module around them runs, and packed again behind it."""
    owned: dict[torch.nn.Module, list[ExpertLinear]] = {}
    around = {child: module for module in base.modules() for child in module.children()}
    for linear in packed_experts(base):
        owned.setdefault(around[linear.experts], []).append(linear)
    for module, linears in owned.items():
        loan = _Loan(linears)
        module.register_forward_pre_hook(loan.begin)
        module.register_forward_hook(loan.end, always_call=True)  # also where recomputation breaks off


class _Loan:
    """Dequantised experts in the place of packed ones."""

    def __init__(self, linears: Sequence[ExpertLinear]) -> None:
        self.linears = linears
        self.packed: list[Any] = []

    def begin(self, *_: object) -> None:
        """Dequantises them."""
        self.packed = [linear.weight for linear in self.linears]
        for linear, weight in zip(self.linears, self.packed, strict=True):
            values = linear.turned(computed_values(weight))
            linear.weight = torch.nn.Parameter(values, requires_grad=False)

    def end(self, *_: object) -> None:
        """Puts them back."""
        for linear, weight in zip(self.linears, self.packed, strict=True):
            linear.weight = weight
        self.packed = []


@contextmanager
def as_shapes(base: PreTrainedModel) -> Iterator[None]:
    """While entered, packed experts look to PEFT as parameters of three dimensions, which take no memory."""
    linears = packed_experts(base)
    weights: list[Any] = [linear.weight for linear in linears]
    for linear, weight in zip(linears, weights, strict=True):
        state = weight.quant_state
        dtype = base.dtype if state is None else state.dtype
        place = torch.zeros((), dtype=dtype, device=weight.device).expand(linear.shape)
        linear.weight = torch.nn.Parameter(linear.turned(place), requires_grad=False)
    try:
        yield
    finally:
        for linear, weight in zip(linears, weights, strict=True):
            linear.weight = weight


def with_block_names(stored: StoredWeights, base: PreTrainedModel) -> StoredWeights:
    """The tensors of a mixture by the names that transformers gives its modules: Mixtral's were others once, and
    Aria's experts lie in its files as fc1 and fc2."""
    if not expert_parts(base) and not packed_experts(base):
        return stored
    renamings = [each for each in _mapping(base) if isinstance(each, WeightRenaming)]
    known = {name for name, _ in chain(base.named_parameters(), base.named_buffers())}
    return stored.renamed({name: name_as_read(name, renamings, known) for name in stored.tensors})


def expert_parts(base: PreTrainedModel) -> Mapping[str, Parts]:
    """The names that the files have for the tensors of each parameter of experts, where it is not there as a whole."""
    found, known = {}, _converters(base)
    for name, linear in expert_linears(base):
        fitting = [each for each in known if _fits(each, name)]
        if fitting and not linear.is_transposed:
            end, sources = _ends(fitting[0])
            start = name.removesuffix(end)
            numbers = range(linear.shape[0])
            found[name] = [[start + source.replace("*", str(number)) for number in numbers] for source in sources]
    return found


def read_experts(stored: StoredWeights, parts: Parts, like: torch.Tensor) -> torch.Tensor:
    """Fills `like` [E, N, K] with the tensors of its parts, which lie one behind another in N."""
    for number, places in enumerate(zip(*parts, strict=True)):
        row = 0
        for place in places:
            values = stored.values(place)
            like[number, row : row + values.shape[0]].copy_(values)
            row += values.shape[0]
    return like


class StoredExperts:
    """The files' tensors of experts, each one's of a layer by itself, and what they are in training."""

    def __init__(self, base: PreTrainedModel, stored: StoredWeights, dtype: torch.dtype, device: torch.device) -> None:
        """`base` is a skeleton, `stored` its files."""
        self.stored, self.dtype, self.device = with_block_names(stored, base), dtype, device
        self.parameters: dict[str, Any] = dict(base.named_parameters())
        self.parts = {name: parts for name, parts in expert_parts(base).items() if name not in self.stored.tensors}
        self.places: dict[str, tuple[str, int, int]] = {}  # of each tensor: parameter, expert, and number of the part
        for name, parts in self.parts.items():
            for number, part in enumerate(parts):
                for expert, each in enumerate(part):
                    self.places[self.stored.tensors[each].place] = name, expert, number
        self.rounded: dict[str, torch.Tensor] = {}  # the last two, since files alternate between gate_up and down

    def rows(self, place: str) -> slice:
        """Where a tensor lies among the rows of its expert in the parameter."""
        name, _, number = self.places[place]
        height = self.parameters[name].shape[1] // len(self.parts[name])
        return slice(number * height, (number + 1) * height)

    def stored_values(self, place: str) -> torch.Tensor:
        """The tensor's values as they are in the files, in host memory."""
        name, expert, number = self.places[place]
        return self.stored.values(self.parts[name][number][expert])

    def trained_with(self, place: str) -> torch.Tensor:
        """The tensor's values in training: a packed parameter is rounded to NF4 as a whole, not expert by expert."""
        name, expert, _ = self.places[place]
        if name not in self.rounded:
            while len(self.rounded) > 1:
                del self.rounded[next(iter(self.rounded))]
            self.rounded[name] = self._round(name)
        return self.rounded[name][expert, self.rows(place)].contiguous()

    def _round(self, name: str) -> torch.Tensor:
        parameter = self.parameters[name]
        like = torch.empty(parameter.shape, dtype=self.dtype, device=self.device)
        values = read_experts(self.stored, self.parts[name], like)
        return computed_values(as_parameter(parameter, values, self.device))


def part_shape(parts: Parts, shape: Sequence[int]) -> tuple[int, int]:
    """Of each tensor of the parts of a parameter of `shape` [E, N, K]."""
    return shape[1] // len(parts), shape[2]


def expert_words(base: PreTrainedModel) -> Mapping[str, str]:
    """What files and PEFT call the layers of an expert, by Llama's names for them: Mixtral's are w1, w3 and w2."""
    found = {}
    for converter in _converters(base):
        target, sources = _ends(converter)
        ours = ("gate_proj", "up_proj") if target.endswith("gate_up_proj") else ("down_proj",)
        found.update(zip(ours, [source.split(".")[-2] for source in sources], strict=False))
    return found


def _mapping(base: PreTrainedModel) -> list[Any]:
    """How transformers makes a model's weights of those in its files."""
    kind = getattr(base.config, "model_type", "")
    return get_checkpoint_conversion_mapping(kind) or []


def _converters(base: PreTrainedModel) -> list[WeightConverter]:
    """Those that stack the experts' tensors, perhaps after joining gate and up."""
    stacking = ([MergeModulelist], [MergeModulelist, Concatenate])
    converters = [each for each in _mapping(base) if isinstance(each, WeightConverter)]
    return [each for each in converters if [type(operation) for operation in each.operations] in stacking]


def _ends(converter: WeightConverter) -> tuple[str, Sequence[str]]:
    """The end of the parameter's name, and of its tensors', with * for the number of the expert.

    transformers' patterns are regular expressions, some of which mark their dots.
    """
    return converter.target_patterns[0], [source.replace(r"\.", ".") for source in converter.source_patterns]


def _fits(converter: WeightConverter, name: str) -> bool:
    return name.endswith(converter.target_patterns[0])

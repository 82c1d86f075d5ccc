"""The base with its adapters added to its weights, as a model folder of its own.

A base that was trained in NF4 offers two bases to add them to. *dequantized* is the one that was trained on: its
weights as NF4 gives them back, in 16 bits. *original* is the one before it was quantised, which the adapters have never
seen. Adding them to the packed weights themselves (merge_and_unload of a 4-bit model) rounds base and adapters to NF4
once more, whose steps are larger than most of what an adapter adds.
"""

import json
import shutil
from collections.abc import Container
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME

from train.checkpoints.contents import ADAPTER, ADAPTER_CONFIG
from train.config import ModelConfig
from train.deliver.adapter_delta import Trained
from train.deliver.final import BASE
from train.deliver.finished import FinishedRun, check_base
from train.engine.host_stream import HostBlocks
from train.engine.machine_memory import OwnMemory
from train.models.base import dequantized, load_base, read_stored, skeleton
from train.models.completeness import tied_embedding
from train.models.experts import StoredExperts, expert_linears, packed_experts, trained_values
from train.models.hub import fetch_weights, locate
from train.models.parameters import stored_buffers
from train.models.shape import cannot_read, is_in_mxfp4, model_shape, stored_quantization, trained_settings
from train.models.stored import StoredWeights
from train.models.text_part import text_part
from train.run.devices import compute_type
from train.run.exits import ExitCode, ExitWith

Onto = Literal["original", "dequantized"]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# what of a base's folder belongs to whoever uses its weights, beside config.json and what final/ has
COMPANIONS = ("*preprocessor_config.json", "processor_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*")
OF_THE_ADAPTER = (ADAPTER, ADAPTER_CONFIG, BASE)


@dataclass(frozen=True)
class Files:
    """The weights of a base's files."""

    whole: StoredWeights
    text: StoredWeights  # those that are trained on, by the names of their class; of an ordinary base all
    names: dict[str, str]  # in the files -> in the class that is trained, of its parameters


@dataclass(frozen=True)
class Merge:
    """A merge that can be done: everything that can be refused has been looked at."""

    run: FinishedRun
    onto: Onto
    dtype: torch.dtype  # of the merged model
    trained: Trained

    @classmethod
    def of(cls, run: FinishedRun, onto: Onto, dtype: str = "") -> "Merge":
        """Of a finished run; without `dtype` in that of the base's config.json. Raises ExitWith(BAD_INPUT)."""
        config = run.config.model
        shape = model_shape(config)
        stored = stored_quantization(config, shape)
        if config.random_init:
            raise refused(f"{run.folder.path}: its base has random weights, which nobody else can add adapters to")
        if stored is not None and stored.load_in_8bit:
            raise refused(f"{config.name_or_path} is stored in 8 bits, onto which nothing is merged: serve the adapter")
        if onto == "original" and stored is not None:
            reason = f"{config.name_or_path} is stored quantised and has no other weights"
            raise refused(f"--onto original: {reason}; write --onto dequantized")
        if onto == "dequantized" and config.quantization == "none":
            raise refused("--onto dequantized: the base was not quantised; write --onto original")
        check_base(run)
        own: Any = getattr(shape, "dtype", None)
        found = DTYPES[dtype] if dtype else own if own in DTYPES.values() else torch.bfloat16
        return cls(run, onto, found, run.trained)

    @cached_property
    def num_bytes(self) -> int:
        """What the merged model's weights take on the disk."""
        config = self.run.config.model
        is_copied = is_in_mxfp4(config, model_shape(config))
        base = skeleton(replace(config, quantization="none", random_init=not is_copied), self.dtype)
        changed = {*self.trained.rows, *self.trained.whole}
        more = {name: self.trained.vocabulary - base.get_parameter(name).shape[0] for name in changed}
        added = sum(max(0, count) * base.get_parameter(name).shape[1] for name, count in more.items())
        buffers = dict(stored_buffers(base)).values()
        num_weights = sum(tensor.numel() for tensor in (*base.parameters(), *buffers)) + added
        copied = sum(linear.weight.numel() for linear in packed_experts(base))
        return (num_weights - copied) * self.dtype.itemsize + copied * 17 // 32 + self._bytes_beside

    @cached_property
    def _bytes_beside(self) -> int:
        """What the weights take that are copied, which are not of the text part; one in 4 bits takes 16 then."""
        config = self.run.config.model
        part = text_part(config)
        if part is None:
            return 0
        with ExitStack() as files:
            stored = StoredWeights(fetch_weights(locate(config)), files)
            text = {tensor.place for tensor in part.of(stored).tensors.values()}
            beside = stored.tensors.keys() - text
            return sum(stored.num_bytes(name) * (4 if stored.is_packed(name) else 1) for name in beside)

    def write(self, target: Path) -> None:
        """Writes the model into the empty folder `target`, one weight file of the base in memory at a time.

        Of a multimodal base all of it: the weights beside its text part are copied as they are.

        Only where transformers reads the base's tensors under other names than they are stored by, as with some
        mixtures of experts, it is whole in host memory. Raises ExitWith(BAD_INPUT) where a file cannot be read or
        written.
        """
        need, free = self.num_bytes, shutil.disk_usage(target).free
        if free < need:
            raise refused(f"{target.parent}: {need / 1e9:.1f} GB are needed, and {free / 1e9:.1f} GB are free")
        config = self.run.config.model
        compute = compute_type(config.dtype, self.run.device).dtype
        base = skeleton(config, compute)
        with ExitStack() as files:
            try:
                stored, part = StoredWeights(fetch_weights(locate(config)), files), text_part(config)
                text = part.of(stored) if part else stored
                names = _names_in_files(base, text)
                if self.trained.experts and any(linear.is_transposed for _, linear in expert_linears(base)):
                    reason = "adapters on experts stored transposed, or in MXFP4, are not merged; serve the adapter"
                    raise refused(f"{config.name_or_path}: {reason}")
                if reason := self.trained.shared(base):
                    raise refused(f"{config.name_or_path}: {reason}, and is not merged; serve the adapter")
                if self.trained.names <= set(names.values()):
                    self._write_file_by_file(target, base, Files(stored, text, names))
                elif part or self.trained.experts:
                    lost = min(self.trained.names - set(names.values()))
                    reason = f"{lost} is stored otherwise than it is trained, and cannot be merged into it"
                    raise refused(f"{config.name_or_path}: {reason}; serve the adapter")
                else:
                    self._write_whole(target)
            except (SafetensorError, OSError) as error:
                raise cannot_read(config, "its weights, or write merged ones", error) from None
        self._write_companions(target)

    def _write_file_by_file(self, target: Path, base: PreTrainedModel, held: "Files") -> None:
        config, device = self.run.config.model, self.run.device
        compute = compute_type(config.dtype, device).dtype
        is_quantized = stored_quantization(config, model_shape(config)) is not None
        read = read_stored(base, held.text, is_quantized, compute, device)
        stored, names = held.whole, held.names
        if misfits := self.trained.misfits({name: each.shape for name, each in base.named_parameters()}):
            raise refused(f"{misfits[0]}: an adapter fits none of its experts' parameters, and would be lost")
        experts = StoredExperts(base, held.text, compute, device)
        own_names = {tensor.place: name for name, tensor in held.text.tensors.items()}
        parameters, weight_map, total = dict(base.named_parameters()), {}, 0
        for path in stored.opened:
            tensors = {}
            for place in (place for place, tensor in stored.tensors.items() if tensor.file == path):
                name = names.get(place, "")
                if place not in own_names:
                    tensors |= _copied(stored, place, self.dtype)
                    continue
                if name and self.onto == "dequantized":
                    values = trained_values(base, name, read(name, parameters[name]), device)
                elif place in experts.places:
                    tensors[place] = self._merged_expert(experts, place)
                    continue
                elif name or not (_is_part(place, names) or _is_copy(base, own_names[place])):
                    values = stored.values(place)
                else:
                    continue
                tensors[place] = self._merged(base, name, values)
            save_file(tensors, target / path.name, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(tensors, path.name)
            total += sum(tensor.nbytes for tensor in tensors.values())
        if len(stored.opened) > 1 or next(iter(stored.opened)).name != "model.safetensors":
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (target / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def _write_whole(self, target: Path) -> None:
        """By transformers, which renames tensors as it reads and back as it writes."""
        config, cpu = self.run.config.model, torch.device("cpu")
        if self.onto == "original":
            base, _ = load_base(
                replace(config, quantization="none"), self.dtype, cpu, HostBlocks([], OwnMemory(pin=False)), 0, False
            )
        else:
            base, _ = load_base(config, self.dtype, cpu, HostBlocks([], OwnMemory(pin=False)), 0, False)
            base.dequantize()
        if self.trained.vocabulary:  # resize_token_embeddings(n) with the size that there is changes nothing
            base.resize_token_embeddings(self.trained.vocabulary, mean_resizing=False)
        for name in self.trained.names:
            weight = base.get_parameter(name)
            weight.data = self._merged(base, name, weight.data)
        torch.nn.Module.to(base, self.dtype)
        base.save_pretrained(target)

    def _merged_expert(self, experts: StoredExperts, place: str) -> torch.Tensor:
        """As `_merged`, of one expert's tensor."""
        is_original = self.onto == "original"
        values = experts.stored_values(place) if is_original else experts.trained_with(place)
        name, expert, _ = experts.places[place]
        delta = self.trained.of_expert(name, experts.parameters[name].shape, expert, self.run.device)
        if delta is not None:
            values = values.to(self.run.device).float() + delta[experts.rows(place)]
        return self._in_type(place, values)

    def _merged(self, base: PreTrainedModel, name: str, values: torch.Tensor) -> torch.Tensor:
        """The base's values with what was trained of them, in this model's type and host memory."""
        trained, device = self.trained, self.run.device
        if name in trained.deltas:
            delta = trained.deltas[name].on(device)
            is_transposed = isinstance(base.get_submodule(name.rpartition(".")[0]), Conv1D)
            values = values.to(device).float() + (delta.T if is_transposed else delta)
        elif name in trained.rows:
            values = trained.rows[name].put_into(values.float(), trained.vocabulary)
        elif name in trained.whole:
            values = trained.whole[name]
        elif name.rpartition(".")[0] in trained.experts:  # a parameter that the files hold as a whole
            values = values.float()
            for expert in range(len(values)):
                delta = trained.of_expert(name, values.shape, expert, device)
                if delta is not None:
                    values[expert] += delta.to(values)
        return self._in_type(name, values)

    def _in_type(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """In host memory; raises ExitWith(BAD_INPUT) where the type does not hold them."""
        if values.is_floating_point():
            values = values.to("cpu", self.dtype)
            if not values.isfinite().all():
                reason = "has values that are no finite numbers in this type; write --dtype bf16 or fp32"
                raise refused(f"--dtype: {name} {reason}")
        return values.contiguous()

    def _write_companions(self, target: Path) -> None:
        """config.json, tokenizer, chat template, generation settings, licence."""
        place, final = locate(self.run.config.model), self.run.folder.final
        settings = trained_settings(self.run.config.model)
        for part in (settings, *(value for value in settings.values() if isinstance(value, dict))):
            if (part.get("quantization_config") or {}).get("quant_method") != "mxfp4":  # such experts are copied
                part.pop("quantization_config", None)
            for key in {"dtype", "torch_dtype"} & part.keys():
                part[key] = str(self.dtype).removeprefix("torch.")
            part.pop("_name_or_path", None)  # a path of whoever saved the base
            if part.get("vocab_size", self.trained.vocabulary) < self.trained.vocabulary:
                part["vocab_size"] = self.trained.vocabulary
        settings["dtype"] = str(self.dtype).removeprefix("torch.")
        (target / CONFIG_NAME).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        for pattern in COMPANIONS:
            for path in place.folder.glob(pattern):
                shutil.copyfile(path, target / path.name)
        for path in final.iterdir():
            if path.name not in OF_THE_ADAPTER:
                shutil.copyfile(path, target / path.name)


def load_merged(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model in a folder that a merge wrote, as those who serve it load it; raises ExitWith(BAD_INPUT)."""
    config = ModelConfig(name_or_path=str(folder), quantization="none")
    base, _ = load_base(config, dtype, device, HostBlocks([], OwnMemory(pin=False)), 0, False)
    base.generation_config = GenerationConfig()  # what generates says itself how
    return base.eval()


def refused(reason: str) -> ExitWith:
    """The end of a merge that cannot be done."""
    return ExitWith(ExitCode.BAD_INPUT, reason)


def _names_in_files(base: PreTrainedModel, stored: StoredWeights) -> dict[str, str]:
    """The names of the base's parameters by the names under which they are stored."""
    tied = tied_embedding(base)
    names = ((stored.place_of(name, name == tied), name) for name, _ in base.named_parameters())
    return {stored.tensors[found].place: name for found, name in names if found}


def _copied(stored: StoredWeights, place: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A weight beside the text part as it is, or what its codes stand for: config.json then tells of none."""
    if _is_part(place, stored.tensors):
        return {}
    return {place: dequantized(stored, place).to(dtype) if stored.is_packed(place) else stored.values(place)}


def _is_copy(base: PreTrainedModel, name: str) -> bool:
    """Whether this is the head's copy of an embedding that the two share."""
    return bool(tied_embedding(base)) and name == "lm_head.weight"


def _is_part(place: str, names: Container[str]) -> bool:
    """Whether a tensor is a scale or a table of a packed weight."""
    start, weight, _ = place.rpartition(".weight.")
    return bool(weight) and f"{start}.weight" in names

"""The adapters of a run as a GGUF file, which llama.cpp adds to the base's GGUF while it runs."""

from pathlib import Path

import torch

from train.deliver.adapter_delta import Trained
from train.deliver.gguf_shape import GgufShape, not_written
from train.deliver.gguf_writer import SUFFIXES
from train.deliver.optional import package


def adapter_tensors(folder: Path, shape: GgufShape, trained: Trained) -> dict[str, str]:
    """llama.cpp's names of the weights that the adapters of `folder` change.

    Raises ExitWith(BAD_INPUT) for an adapter that llama.cpp does not add.
    """
    gguf = package("gguf")
    arch = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}[shape.family.architecture]
    names = gguf.get_tensor_name_map(arch, shape.num_layers)
    others = [*trained.rows, *trained.whole]
    if others or not trained.deltas:
        reason = f"{', '.join(others) or 'nothing'} was trained, and only adapters of linear layers can be"
        raise not_written(folder, f"{reason} an adapter of llama.cpp; write the merged model")
    tensors = {weight: names.get_name(weight, try_suffixes=SUFFIXES) for weight in trained.deltas}
    for weight, tensor in tensors.items():
        if tensor is None or tensor not in shape.expected() or tensor == "token_embd.weight":
            raise not_written(folder, f"llama.cpp has no adapter of {weight} for this model")
    return tensors


def write_adapter_gguf(folder: Path, path: Path, shape: GgufShape, trained: Trained, name: str) -> None:
    """Writes the adapters of `folder` to `path` in fp32.

    llama.cpp multiplies by alpha / r, and has one alpha for all adapters: where ranks or scales differ, B carries the
    difference. Raises ExitWith(BAD_INPUT) as adapter_tensors does.
    """
    gguf, tensors = package("gguf"), adapter_tensors(folder, shape, trained)
    first = next(iter(trained.deltas.values()))
    alpha = first.scale * first.a.shape[0]
    writer = gguf.GGUFWriter(path, shape.family.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    writer.add_name(name)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    for weight, delta in trained.deltas.items():
        tensor, b = tensors[weight], delta.b * (delta.scale * delta.a.shape[0] / alpha)
        writer.add_tensor(f"{tensor}.lora_a", delta.a.contiguous().numpy())
        writer.add_tensor(f"{tensor}.lora_b", _rows(shape, tensor, b).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _rows(shape: GgufShape, name: str, b: torch.Tensor) -> torch.Tensor:
    """B with its rows in the order of the projection's."""
    return shape.permuted(name, b).contiguous()

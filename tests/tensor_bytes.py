"""How many bytes tensors take: those that some object stands on, and those that code makes on its way."""

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def storages(thing: Any, found: dict[int, int]) -> dict[int, int]:
    """Bytes of every storage that tensors in a dataclass or list stand on, by address."""
    if isinstance(thing, torch.Tensor):
        storage = thing.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    elif isinstance(thing, list):
        for each in thing:
            storages(each, found)
    elif hasattr(thing, "__dataclass_fields__"):
        for each in vars(thing).values():
            storages(each, found)
    return found


class PeakBytes(TorchDispatchMode):
    """The most bytes that tensors made while it is entered have at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}  # by address
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {tensor.untyped_storage().data_ptr() for tensor in tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for tensor in tensors(out):
            storage = tensor.untyped_storage()
            address = storage.data_ptr()
            if address not in given and address not in self.live:
                self.live[address] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, address)
        self.peak = max(self.peak, sum(self.live.values()))
        return out


def tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]

"""How many bytes of tensors are alive, counted storage by storage: what a step holds, whoever holds
it."""

import gc
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def storages(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages that the tensors lie in, each storage once; of a DTensor what is on
    this rank."""
    found: dict[int, int] = {}
    for tensor in tensors:
        here = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        found[here.untyped_storage()._cdata] = here.untyped_storage().nbytes()
    return sum(found.values())


def everything() -> int:
    """Bytes of all tensors that this process can reach; a DTensor's own part is one of them."""
    gc.collect()
    kinds = [
        (each, type(each)) for each in gc.get_objects()
    ]  # by type: some objects warn when asked for their class
    there = [
        each for each, kind in kinds if issubclass(kind, Tensor) and not issubclass(kind, DTensor)
    ]
    return storages(each for each in there if not each.is_meta and each.layout == torch.strided)


class Live(TorchDispatchMode):
    """Counts what operations allocate while it is entered, and what of it is freed.

    Attributes:
        now: bytes alive. peak: most bytes that were alive at once.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A DTensor has no storage of its own; its operation comes again with what is on this rank.
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        old = [
            x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)
        ]
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            # On the meta device there is no memory.
            if isinstance(tensor, Tensor) and not tensor.is_meta:
                self._enter(tensor.untyped_storage(), old)
        return out

    def _enter(self, storage: Any, old: list[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen or key in old:
            return

        def leave(_: Any) -> None:
            self.now -= size
            del self.seen[key]

        self.seen[key] = weakref.ref(storage, leave)
        self.now += size
        self.peak = max(self.peak, self.now)

"""Counts the bytes of tensors that are alive, storage by storage, fake ones too."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

Label = str
Observer = Callable[[Any, Any, Any, Any], None]


class Allocation:
    """One stretch of memory that a storage had, from an allocation to its end.

    Attributes:
        size: bytes.
        label: what was going on when it was allocated.
        ended: number of the last allocation before it was freed; None while it is alive.
        resized: whether it began or ended with a change of the size of its storage.
    """

    __slots__ = ("ended", "label", "resized", "size")

    def __init__(self, size: int, label: Label):
        self.size = size
        self.label = label
        self.ended: int | None = None
        self.resized = False


class LiveMemory(TorchDispatchMode):
    """Records what operations allocate while it is entered, and when it is freed.

    Attributes:
        label: is noted with each allocation from now on; see `labelled`.
        history: every allocation, by its number.
        observe: is called with (operation, arguments, result, named arguments); None = nobody.
    """

    def __init__(self) -> None:
        super().__init__()
        self.observe: Observer | None = None
        self.label: Label = ""
        self.history: list[Allocation] = []
        self._numbers: dict[int, int] = {}
        self._watched: dict[int, Any] = {}

    @contextmanager
    def labelled(self, label: Label) -> Iterator[None]:
        """Notes a label with what is allocated inside."""
        before = self.label
        self.label = label
        try:
            yield
        finally:
            self.label = before

    def hold_for_a_moment(self, size: int) -> None:
        """Notes so many bytes that are allocated and freed where no operation is seen."""
        key = -1  # of no storage
        self._begin(key, size)
        self._end(key)

    def number_of(self, tensor: Tensor) -> int | None:
        """Returns the number of the allocation that a tensor lies in; None of one unknown here."""
        here = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        return self._numbers.get(here.untyped_storage()._cdata)

    def __enter__(self) -> "LiveMemory":
        # Engines free gathered weights by shrinking their storage, which is no operation.
        self._resize = torch.UntypedStorage.resize_
        live = self

        def resize(storage: Any, size: int) -> Any:
            result = live._resize(storage, size)
            live._resized(storage)
            return result

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # A DTensor has no storage of its own; its operation comes again with what is on this rank.
        for kind in types:
            if issubclass(kind, DTensor):
                return NotImplemented
        result = func(*args, **(kwargs or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            fresh = storage._cdata not in self._watched and not tensor.is_meta
            if fresh and not _lies_in(storage._cdata, args):
                self._watch(storage)
        if self.observe is not None:
            self.observe(func, args, result, kwargs or {})
        return result

    def _watch(self, storage: Any) -> None:
        key = storage._cdata

        def leave(_: Any) -> None:
            self._end(key)
            del self._watched[key]

        self._watched[key] = weakref.ref(storage, leave)
        self._begin(key, storage.nbytes())

    def _resized(self, storage: Any) -> None:
        key = storage._cdata
        if key not in self._watched:
            return
        if key in self._numbers:
            self.history[self._numbers[key]].resized = True
        self._end(key)
        self._begin(key, storage.nbytes())
        if key in self._numbers:
            self.history[self._numbers[key]].resized = True

    def _begin(self, key: int, size: int) -> None:
        if not size:
            return
        self._numbers[key] = len(self.history)
        self.history.append(Allocation(size, self.label))

    def _end(self, key: int) -> None:
        number = self._numbers.pop(key, None)
        if number is not None:
            self.history[number].ended = len(self.history) - 1


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _lies_in(key: int, args: Any) -> bool:
    """Tells whether one of the tensors that an operation was given lies in that storage."""
    return any(tensor.untyped_storage()._cdata == key for tensor in _tensors(args))

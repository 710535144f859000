"""A device beside the host that computes like a CPU, for tests of what only a GPU would show.

A tensor on it holds one of the CPU and says that it lies on `card:0`. An operation that mixes it
with tensors of the host fails as on a GPU, it has no memory that numpy could read, and whoever
reads it, or copies to or from it and waits, is noted. Collectives send what it holds.

It is registered with torch for the life of a process, before the first backward pass of it: tests
use it in processes of their own (`card_pool`).
"""

import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import device_mesh
from torch.utils import backend_registration
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map

from models.kernels import backends, sdpa_cpu
from tests.support.pool import Pool
from trainer.planning.step_costs import tensors_in

NAME = "card"
ROOT = Path(__file__).parents[2]
OURS = tuple(f"{folder}/" for folder in ("models", "parallel", "trainer"))
# Operations of one argument that make tensors on a device; torch would fill ones of size 0.
FACTORIES = (
    *("arange", "linspace", "logspace", "eye", "range", "randperm"),
    *("tril_indices", "triu_indices"),
)

_aten = torch.ops.aten
COPIES = (_aten._to_copy, _aten.copy_, _aten._copy_from)
# How many there are is in the numbers.
READS = {
    _aten._local_scalar_dense: "read",
    _aten.equal: "read",
    _aten.is_nonzero: "read",
    _aten.nonzero: "counted",
    _aten.masked_select: "counted",
    _aten._unique2: "counted",
    _aten.unique_dim: "counted",
    _aten.unique_consecutive: "counted",
    _aten.bincount: "counted",
}
# Marks on a view that a tensor around another one would not know of.
PHYSICAL = {_aten._conj: torch.conj_physical, _aten._neg_view: torch.neg}


class Wait(NamedTuple):
    """What a thread waits for the device for: what it does, and where in our code."""

    thread: str
    what: str
    where: str


waits: list[Wait] = []
_plain = {name: getattr(torch, name) for name in ("tensor", "as_tensor")}


class CardTensor(Tensor):
    """A tensor on the card.

    Attributes: held: the tensor of the CPU that has its numbers.
    """

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> "CardTensor":
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=torch.device(NAME, 0),
        )

    def __init__(self, held: Tensor):
        self.held = held

    def __repr__(self) -> str:  # type: ignore[override]
        return f"CardTensor({self.held!r})"

    def tolist(self) -> Any:
        """Reads all numbers."""
        _note("read")
        return self.held.tolist()

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


@cache
def the_card() -> torch.device:
    """Registers the device in this process and returns it."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
    _libraries.append(torch.library.Library("_", "IMPL"))
    _libraries[-1].fallback(lambda func, *args, **kwargs: _compute(func, args, kwargs), _KEY)
    _libraries.append(torch.library.Library("aten", "IMPL"))
    for name in FACTORIES:
        packet = getattr(_aten, name)
        for overload in packet.overloads():
            if "out" not in overload:
                _implement(packet, overload)
    for name in _plain:
        setattr(torch, name, _maker(name))
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        backends.TABLE[NAME, dtype] = sdpa_cpu
    device_mesh._get_device_handle = lambda *_: torch.cpu  # type: ignore[assignment]
    return torch.device(NAME, 0)


@contextmanager
def card_pool(size: int) -> Iterator[Callable[..., list]]:
    """Yields what runs a worker on ranks that may have a card; see tests/support/pool.py."""
    pools = [Pool(size)]

    def run(worker: Any, *args: Any) -> list:
        try:
            return pools[0].run(worker, args)
        except BaseException:
            # What other ranks still say would be taken for the next answer.
            pools[0].close(politely=False)
            pools[0] = Pool(size)
            raise

    try:
        yield run
    finally:
        pools[0].close(politely=False)


_KEY = "PrivateUse1"
_libraries: list[torch.library.Library] = []


class _Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def synchronize(self, device: Any = None) -> None:
        pass


def _implement(packet: Any, overload: str) -> None:
    func = getattr(packet, overload)
    name = func._schema.name.partition("::")[2]
    name = name if overload == "default" else f"{name}.{overload}"
    _libraries[-1].impl(name, lambda *args, **kwargs: _compute(func, args, kwargs), _KEY)


def _maker(name: str) -> Callable[..., Tensor]:
    """Returns torch.tensor or torch.as_tensor, which build on the host and copy from there."""

    def make(data: Any, *, device: Any = None, **settings: Any) -> Tensor:
        if device is None or torch.device(device).type != NAME:
            return _plain[name](data, device=device, **settings)
        wants = settings.pop("requires_grad", False)
        made = _plain[name](data, **settings).to(device)
        return made.requires_grad_() if wants else made

    return make


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Computes with what tensors of the card hold."""
    packet = func.overloadpacket
    tensors = [*tensors_in(args), *tensors_in(list(kwargs.values()))]
    there = [tensor for tensor in tensors if isinstance(tensor, CardTensor)]
    host = [tensor for tensor in tensors if not isinstance(tensor, CardTensor)]
    device = kwargs.get("device")
    stays = torch.device(device).type == NAME if device is not None else bool(there)
    if packet is _aten.copy_:
        stays = isinstance(args[0], CardTensor)
    if packet in COPIES:
        if bool(there) != stays or (host and there):
            late = kwargs.get("non_blocking") or (packet is _aten.copy_ and any(args[2:]))
            # What comes back is read at once, however it was asked for.
            if not (late and stays):
                _note("copied to it" if stays else "copied from it")
    elif there and any(tensor.dim() for tensor in host):
        raise RuntimeError(f"{func} mixes tensors of the card and of the host")
    if packet in READS and there:
        _note(READS[packet])
    if packet is _aten.index and any(t.dtype == torch.bool for t in there[1:]):
        _note("counted")
    given = dict(kwargs)
    if device is not None and stays:
        given["device"] = torch.device("cpu")
    given.pop("pin_memory", None)  # there is no driver that could
    compute: Any = PHYSICAL.get(packet, func)
    found = compute(*tree_map(_held, args), **tree_map(_held, given))
    for tensor in there:
        assert tensor.shape == tensor.held.shape, f"{func} changed a shape in place"
    own = {id(tensor.held): tensor for tensor in there}

    def around(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return own[id(value)] if id(value) in own else CardTensor(value)

    if func.namespace == "c10d":
        return tree_map(lambda value: own.get(id(value), value), found)
    if not stays:
        return found
    wrapped = tree_map(around, found)
    if packet in PHYSICAL:
        return wrapped
    return return_and_correct_aliasing(func, args, kwargs, wrapped)


def _held(value: Any) -> Any:
    return value.held if isinstance(value, CardTensor) else value


def _note(what: str) -> None:
    """Notes a wait, by the last place of our code that led to it."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        name = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else ""
        if name.startswith(OURS) and name != "models/span.py":
            thread = threading.current_thread().name
            waits.append(Wait(thread, what, f"{name} {frame.name}"))
            return

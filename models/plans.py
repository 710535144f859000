"""Plans that layers make of addresses: noted in one step, and made for later ones ahead of time.

What a layer plans (the blocks that a mask needs, an exchange between ranks, the runs of a scan)
depends on addresses alone, and it lies in the caches that spans carry. `@planned` says so of a
function. While a PlanLog listens to a step, it notes which plans were asked for, with every span
told by the way that leads to it from the micro-batch; for the micro-batch of a later step it asks
for the same, so that layers find them made. Nothing here knows a mixer, a mask or a driver.
"""

import threading
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar

from torch import Tensor

from models.micro_batch import MicroBatch
from models.span import Span

Params = ParamSpec("Params")
Made = TypeVar("Made")
# From "span" or "source" of a micro-batch, or from the number of a plan, to what it holds.
Way = tuple[str | int, ...]

_thread = threading.local()  # `log`: the PlanLog that listens to this thread


def planned(function: Callable[Params, Made]) -> Callable[Params, Made]:
    """Declares that a function is a plan: it reads addresses, and caches its result with them.

    Its arguments are positional: spans, what a span or another plan holds, and settings. Asked
    again with the same, it returns the same object.
    """

    @wraps(function)
    def ask(*args: Params.args, **settings: Params.kwargs) -> Made:
        made = function(*args, **settings)
        log: PlanLog | None = getattr(_thread, "log", None)
        if log is not None and not settings:
            log.note(function, args, made)
        return made

    return ask


class ArgumentPlace(NamedTuple):
    """An argument that is found at the end of a way."""

    way: Way


class PlanCall(NamedTuple):
    """A plan that was asked for; its arguments are places and settings."""

    function: Callable[..., Any]
    args: tuple[Any, ...]


class PlanLog:
    """The plans that a model asks for, whatever the numbers in the addresses.

    One thread listens while another makes plans for other micro-batches; they share nothing but the
    list of calls, which only grows.
    """

    def __init__(self) -> None:
        self.calls: list[PlanCall] = []
        self._numbers: dict[Any, int] = {}
        self._ways: dict[int, tuple[Way, object]] = {}

    @contextmanager
    def listening(self, micro_batch: MicroBatch) -> Iterator[None]:
        """Notes what this thread plans for a micro-batch."""
        for name, root in _roots(micro_batch).items():
            self._learn(root, (name,))
        _thread.log = self
        try:
            yield
        finally:
            _thread.log = None
            self._ways = {}

    def note(self, function: Callable[..., Any], args: tuple[Any, ...], made: object) -> None:
        """Notes a plan, unless it is of addresses that no way leads to."""
        told = []
        for arg in args:
            way = self._ways.get(_identity(arg))
            if way is not None:
                told.append(ArgumentPlace(way[0]))
            elif _is_of_a_step(arg):
                return
            else:
                told.append(arg)
        key = function, tuple(map(_comparable, told))
        number = self._numbers.setdefault(key, len(self.calls))
        if number == len(self.calls):
            self.calls.append(PlanCall(function, tuple(told)))
        self._learn(made, (number,))

    def make(self, micro_batch: MicroBatch) -> int:
        """Makes the plans for another micro-batch; returns how many there are."""
        roots = _roots(micro_batch)
        plans: list[Any] = []
        for function, args in tuple(self.calls):
            found = [
                _followed(a.way, roots, plans) if isinstance(a, ArgumentPlace) else a for a in args
            ]
            plans.append(function(*found))
        return len(plans)

    def _learn(self, held: object, way: Way) -> None:
        """Notes the ways to all that an object holds."""
        for further, part in _parts(held, way):
            # Kept, so that its id stays its own.
            self._ways.setdefault(_identity(part), (further, part))


def _roots(micro_batch: MicroBatch) -> dict[str, Span]:
    """Returns the spans that a model is called with."""
    roots = {"span": micro_batch.span}
    if isinstance(micro_batch.source, MicroBatch):
        roots["source"] = micro_batch.source.span
    return roots


def _followed(way: Way, roots: dict[str, Span], plans: list[Any]) -> Any:
    held: Any
    root, *steps = way
    if isinstance(root, int):
        held = plans[root]
    else:
        held = roots[root]
    for step in steps:
        held = held[step] if isinstance(step, int) else getattr(held, step)
    return held


def _parts(held: Any, way: Way) -> Iterator[tuple[Way, object]]:
    """Yields what plans can be asked of: spans, shardings, records of plans, and their lists."""
    names: list[Any]
    if isinstance(held, Span):
        yield way, held
        names, values = ["sharding"], [held.sharding]
    elif is_dataclass(held) and not isinstance(held, type):
        yield way, held
        names = [field.name for field in fields(held)]
        values = [getattr(held, name) for name in names]
    elif isinstance(held, tuple) and hasattr(held, "_fields"):
        yield way, held
        names, values = list(getattr(held, "_fields")), list(held)  # noqa: B009
    elif isinstance(held, tuple) and held and isinstance(held[0], Span):
        names, values = list(range(len(held))), list(held)
    else:
        if isinstance(held, list):
            yield way, held
        return
    for name, value in zip(names, values):
        yield from _parts(value, (*way, name))


def _identity(part: object) -> int:
    # Spans that differ in their past alone share what is derived from their addresses.
    return id(part.cache) if isinstance(part, Span) else id(part)


def _is_of_a_step(arg: object) -> bool:
    """Tells whether an argument holds addresses, so that it is no setting."""
    return isinstance(arg, list) or any(isinstance(part, Span) for _, part in _parts(arg, ()))


def _comparable(arg: Any) -> Any:
    if isinstance(arg, Tensor):
        return arg.dtype, arg.shape, tuple(arg.flatten().tolist())
    return arg if isinstance(arg, Hashable) else id(arg)

"""Spread a model's sequence over ranks by swapping its leaves for drivers: one table from kind to driver."""

from collections.abc import Callable
from typing import Any

from torch import nn

from models.mixing.convolution import Convolution
from models.mixing.lookup import Lookup
from models.mixing.scan import Scan
from models.mixing.softmax import Softmax
from models.mixing.window import Window
from parallel.drivers.auto import Auto
from parallel.drivers.channels import Channels
from parallel.drivers.fetch import Fetch
from parallel.drivers.halo import Halo
from parallel.drivers.heads import Heads
from parallel.drivers.passing import Passing
from parallel.drivers.ring import Ring
from parallel.drivers.top_k import TopK
from parallel.drivers.usp import Usp
from parallel.moves import Wire

METHODS: dict[str, Callable[..., nn.Module]] = {  # parallel.method: (leaf, wire) -> who drives a Softmax
    "ring": Ring,
    "heads": Heads,
    "fetch": Fetch,
    "usp": lambda leaf, wire: Usp(leaf, wire.grid(wire.heads)),
}

TRADING = "heads", "usp"  # methods that need queries with heads


def _softmax(leaf: Softmax, wire: Wire, method: str) -> nn.Module:
    return Auto(leaf, wire) if method == "auto" else METHODS[method](leaf, wire)


DRIVERS: dict[type[nn.Module], Callable[[Any, Wire, str], nn.Module]] = {  # kind -> (leaf, wire, method) -> driver
    Softmax: _softmax,
    Lookup: lambda leaf, wire, method: TopK(leaf, wire),
    Scan: lambda leaf, wire, method: Passing(leaf, wire),
    Window: lambda leaf, wire, method: Halo(leaf, wire),
    Convolution: lambda leaf, wire, method: Channels(leaf, wire),
}


def refusals(model: nn.Module, method: str) -> list[str]:
    """Why a model cannot be shared by this method: one sentence for each attention that has no exact form under it."""
    leaves = [(name, leaf) for name, leaf in model.named_modules() if isinstance(leaf, Softmax)]
    return [
        f"parallel.method={method} trades heads, but the queries of {name or 'this attention'} have none; use ring or fetch"
        for name, leaf in leaves
        if method in TRADING and leaf.score.query_heads[0] is None
    ]


def spread(
    model: nn.Module, group: Any, method: str = "ring", *, grid: tuple[Any, Any] | None = None, heads: int | None = None
) -> Wire:
    """Replace every leaf in place; parameters, names and state dict are untouched.

    Args:
        model: any module of models/, built as for one device.
        group: the ranks that share one sequence.
        method: which driver serves a Softmax; auto: each gets the one that sends least, see `Wire.choices`.
        grid: groups (of ranks that trade heads, of the ring), as a Mesh has them; what usp needs and auto may use.
        heads: ranks that trade heads, where no grid of groups is at hand: the groups are made here.

    Returns:
        The wire that all drivers send over; it counts the bytes.

    Raises:
        ValueError: no method of that name, usp without a grid, or what `refusals` says.
    """
    if method != "auto" and method not in METHODS:
        raise ValueError(f"parallel.method={method} is none that there is; choose one of auto, {', '.join(METHODS)}")
    if reasons := refusals(model, method):
        raise ValueError("\n".join(reasons))
    wire = Wire(group)
    if grid is not None:
        wire.lay(*grid)
    wire.heads = next(iter(wire.grids), heads)
    if method == "usp" and wire.heads is None:
        raise ValueError("parallel.method=usp needs parallel.heads and parallel.ring; give both, or use parallel.method=auto")
    for path, parent in list(model.named_modules()):
        for name, leaf in list(parent.named_children()):
            for kind, driver in DRIVERS.items():
                if isinstance(leaf, kind):
                    swapped = driver(leaf, wire, method)
                    setattr(parent, name, swapped)
                    if isinstance(swapped, Auto):
                        swapped.name = f"{path}.{name}".lstrip(".")
    return wire

"""Spread a model's sequence, and its experts, over ranks by swapping leaves for drivers: one table from kind to driver."""

from collections.abc import Callable
from typing import Any

from torch import nn

from models.mixing.compress import Compress
from models.mixing.convolution import Convolution
from models.mixing.dispatch import Dispatch
from models.mixing.lookup import Lookup
from models.mixing.recall import Recall
from models.mixing.relay import Relay, misfits, stepped
from models.mixing.scan import Scan
from models.mixing.softmax import Softmax
from models.mixing.tally import Tally
from models.mixing.window import Window
from parallel.drivers.auto import Auto
from parallel.drivers.channels import Channels
from parallel.drivers.compress import Compressing
from parallel.drivers.fetch import Fetch
from parallel.drivers.halo import Halo
from parallel.drivers.hand_on import HandOn
from parallel.drivers.heads import Heads
from parallel.drivers.passing import Passing
from parallel.drivers.recall import Recalling
from parallel.drivers.ring import Ring
from parallel.drivers.tally import Tallying
from parallel.drivers.top_k import TopK
from parallel.drivers.travel import Travel
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


Drivers = dict[type[nn.Module], Callable[[Any, Wire, str], nn.Module]]

DRIVERS: Drivers = {  # kind -> (leaf, wire, method) -> driver
    Softmax: _softmax,
    Lookup: lambda leaf, wire, method: TopK(leaf, wire),
    Scan: lambda leaf, wire, method: Passing(leaf, wire),
    Window: lambda leaf, wire, method: Halo(leaf, wire),
    Compress: lambda leaf, wire, method: Compressing(leaf, wire),
    Recall: lambda leaf, wire, method: Recalling(leaf, wire),
    Convolution: lambda leaf, wire, method: Channels(leaf, wire),
    Tally: lambda leaf, wire, method: Tallying(leaf, wire),
    Relay: lambda leaf, wire, method: HandOn(leaf, wire),
}

# What a compiler does not look into: exchanges and plans, which are Python over lengths that change from step to step, and
# kernels, which are compiled already. Between them it meets plain arithmetic on tensors of one shape.
OPAQUE: tuple[type[nn.Module], ...] = (
    *DRIVERS, Dispatch, Auto, Channels, Compressing, Fetch, Halo, HandOn, Heads, Passing, Recalling, Ring, Tallying, TopK,
    Travel, Usp,
)  # fmt: skip


def refusals(model: nn.Module, method: str) -> list[str]:
    """Why a model cannot be shared by this method: one sentence for each layer that has no exact form under it."""
    inside = stepped(model)  # computed by one rank at a time
    leaves = [(name, leaf) for name, leaf in model.named_modules() if isinstance(leaf, Softmax) and leaf not in inside]
    return misfits(model) + [
        f"parallel.method={method} trades heads, but the queries of {name or 'this attention'} have none; use ring or fetch"
        for name, leaf in leaves
        if method in TRADING and leaf.score.query_heads[0] is None
    ]


def unreachable(model: nn.Module) -> list[str]:
    """Why experts cannot lie over ranks: a sentence for each layer that ranks pass through unequal numbers of times."""
    inside = stepped(model)
    return [
        f"{name.rpartition('.')[0]} has experts, and memory passes through it segment by segment, as many times as documents "
        "have segments: ranks would not meet; use parallel.experts=1"
        for name, leaf in model.named_modules()
        if isinstance(leaf, Dispatch) and leaf in inside
    ]


def spread(
    model: nn.Module,
    group: Any,
    method: str = "ring",
    *,
    grid: tuple[Any, Any] | None = None,
    heads: int | None = None,
    experts: Any = None,
) -> Wire:
    """Replace every leaf in place; parameters, names and state dict are untouched.

    Args:
        model: any module of models/, built as for one device.
        group: the ranks that share one sequence; None where none is shared, and only experts are.
        method: which driver serves a Softmax; auto: each gets the one that sends least, see `Wire.choices`.
        grid: groups (of ranks that trade heads, of the ring), as a Mesh has them; what usp needs and auto may use.
        heads: ranks that trade heads, where no grid of groups is at hand: the groups are made here.
        experts: the ranks that hold all experts between them, rank by rank in order; None: each holds all of them.

    Returns:
        The wire that all drivers send over; it counts the bytes, those to experts too.

    Raises:
        ValueError: no method of that name, usp without a grid, or what `refusals` and `unreachable` say.
    """
    if method != "auto" and method not in METHODS:
        raise ValueError(f"parallel.method={method} is none that there is; choose one of auto, {', '.join(METHODS)}")
    if group is not None and (reasons := refusals(model, method)):
        raise ValueError("\n".join(reasons))
    if experts is not None and (reasons := unreachable(model)):
        raise ValueError("\n".join(reasons))
    wire = Wire(experts if group is None else group)
    if grid is not None:
        wire.lay(*grid)
    wire.heads = next(iter(wire.grids), heads)
    if group is not None and method == "usp" and wire.heads is None:
        raise ValueError("parallel.method=usp needs parallel.heads and parallel.ring; give both, or use parallel.method=auto")
    if experts is not None:
        roads = Wire(experts)
        roads.sent = wire.sent
        _swap(model, {Dispatch: lambda leaf, wire, method: Travel(leaf, roads)}, wire, method)
    if group is not None:
        _swap(model, DRIVERS, wire, method)
    return wire


def _swap(model: nn.Module, drivers: Drivers, wire: Wire, method: str) -> None:
    """Put the driver of its kind in the place of every leaf, but for what runs inside the steps of a Relay."""
    inside = stepped(model)
    for path, parent in list(model.named_modules()):
        for name, leaf in list(parent.named_children()) if parent not in inside else ():
            for kind, driver in drivers.items():
                if isinstance(leaf, kind):
                    swapped = driver(leaf, wire, method)
                    setattr(parent, name, swapped)
                    if isinstance(swapped, Auto | HandOn):
                        swapped.name = f"{path}.{name}".lstrip(".")

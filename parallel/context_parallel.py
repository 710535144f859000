"""Spread a model's sequence, and its experts, over ranks by swapping leaves for drivers: one table
from kind to driver."""

from collections.abc import Callable
from typing import Any

from torch import nn

from models.primitive import Primitive
from models.primitives.block_topk import BlockTopK
from models.primitives.causal_conv import CausalConv
from models.primitives.compressive import CompressiveScan
from models.primitives.expert_dispatch import ExpertDispatch
from models.primitives.knn import KNN
from models.primitives.long_conv import LongConv
from models.primitives.memory_read import MemoryRead
from models.primitives.neighbors import Neighbors
from models.primitives.pooled_attention import PooledAttention
from models.primitives.row_replica import RowReplica
from models.primitives.scan import Scan
from models.primitives.segment_sum import SegmentSum
from models.primitives.sequential import SequentialScan, misfits, sequential_modules
from models.primitives.softmax import Softmax
from parallel.collectives import Communicator
from parallel.drivers.block_topk import ShardedBlockTopK
from parallel.drivers.causal_conv import Halo
from parallel.drivers.compressive import ShardedCompressive
from parallel.drivers.expert_dispatch import ExpertAllToAll
from parallel.drivers.knn import ShardedKNN
from parallel.drivers.long_conv import ChannelAllToAll
from parallel.drivers.memory_read import SharedMemoryRead, SharedRowReplica
from parallel.drivers.neighbors import NeighborExchange
from parallel.drivers.pooled_attention import MergedPooledAttention
from parallel.drivers.scan import StatePassing
from parallel.drivers.segment_sum import ShardedSegmentSum
from parallel.drivers.sequential import Wavefront
from parallel.drivers.softmax_allgather import AllGather
from parallel.drivers.softmax_auto import Auto
from parallel.drivers.softmax_ring import Ring
from parallel.drivers.softmax_ulysses import Ulysses
from parallel.drivers.softmax_usp import Usp

METHODS: dict[
    str, Callable[..., nn.Module]
] = {  # parallel.method: (core, communicator) -> driver of a Softmax
    "ring": Ring,
    "ulysses": Ulysses,
    "allgather": AllGather,
    "usp": lambda leaf, communicator: Usp(leaf, communicator.grid(communicator.heads)),
}

TRADING = "ulysses", "usp"  # methods that need queries with heads


def _softmax(leaf: Softmax, communicator: Communicator, method: str) -> nn.Module:
    return Auto(leaf, communicator) if method == "auto" else METHODS[method](leaf, communicator)


Drivers = dict[type[nn.Module], Callable[[Any, Communicator, str], nn.Module]]

DRIVERS: Drivers = {  # primitive -> (core, communicator, method) -> driver
    Softmax: _softmax,
    BlockTopK: lambda leaf, communicator, method: ShardedBlockTopK(leaf, communicator),
    Scan: lambda leaf, communicator, method: StatePassing(leaf, communicator),
    CausalConv: lambda leaf, communicator, method: Halo(leaf, communicator),
    CompressiveScan: lambda leaf, communicator, method: ShardedCompressive(leaf, communicator),
    KNN: lambda leaf, communicator, method: ShardedKNN(leaf, communicator),
    LongConv: lambda leaf, communicator, method: ChannelAllToAll(leaf, communicator),
    Neighbors: lambda leaf, communicator, method: NeighborExchange(leaf, communicator),
    PooledAttention: lambda leaf, communicator, method: MergedPooledAttention(leaf, communicator),
    SegmentSum: lambda leaf, communicator, method: ShardedSegmentSum(leaf, communicator),
    SequentialScan: lambda leaf, communicator, method: Wavefront(leaf, communicator),
    MemoryRead: lambda leaf, communicator, method: SharedMemoryRead(leaf, communicator),
    RowReplica: lambda leaf, communicator, method: SharedRowReplica(leaf, communicator),
}

# What a compiler does not look into: exchanges and plans, which are Python over lengths that change
# from step to step, and kernels, which are compiled already. Between them it meets plain arithmetic
# on tensors of one shape.
OPAQUE: tuple[type[nn.Module], ...] = (
    Primitive,
    Auto,
    ChannelAllToAll,
    ShardedCompressive,
    AllGather,
    Halo,
    Wavefront,
    Ulysses,
    StatePassing,
    ShardedKNN,
    Ring,
    ShardedSegmentSum,
    SharedRowReplica,
    ShardedBlockTopK,
    ExpertAllToAll,
    Usp,
)


def without_driver(model: nn.Module) -> list[str]:
    """One sentence for each primitive of the model that a sharded row would silently change.

    A primitive that stays in place works on the shard of its rank alone: it runs, it learns, and
    its results are those of another model.
    """
    inside = sequential_modules(model)  # these see whole segments on one rank
    sentences = []
    for name, module in model.named_modules():
        if not isinstance(module, Primitive) or not module.needs_driver or module in inside:
            continue
        if not isinstance(module, tuple(DRIVERS)):
            sentences.append(
                f"parallel.context: no driver for {type(module).__name__} ({name or 'the model'}),"
                " so every rank would see only its own part of a row; add one to DRIVERS in"
                " parallel/context_parallel.py, or use parallel.context=1"
            )
    return sentences


def refusals(model: nn.Module, method: str) -> list[str]:
    """Why a model cannot be shared by this method: one sentence for each layer that has no exact
    form under it."""
    sentences = without_driver(model) + misfits(model)
    if method not in TRADING:
        return sentences
    inside = sequential_modules(model)  # computed by one rank at a time
    for name, leaf in model.named_modules():
        if not isinstance(leaf, Softmax) or leaf in inside:
            continue
        if leaf.score.query_heads[0] is None:
            sentences.append(
                f"parallel.method={method} trades heads, but the queries of"
                f" {name or 'this attention'} have none; use ring or allgather"
            )
    return sentences


def unreachable(model: nn.Module) -> list[str]:
    """Why experts cannot lie over ranks: a sentence for each layer that ranks pass through unequal
    numbers of times."""
    inside = sequential_modules(model)
    return [
        f"{name.rpartition('.')[0]} has experts, and memory passes through it segment by segment,"
        " as many times as documents have segments: ranks would not meet; use parallel.experts=1"
        for name, leaf in model.named_modules()
        if isinstance(leaf, ExpertDispatch) and leaf in inside
    ]


def apply_context_parallel(
    model: nn.Module,
    group: Any,
    method: str = "ring",
    *,
    grid: tuple[Any, Any] | None = None,
    heads: int | None = None,
    experts: Any = None,
) -> Communicator:
    """Replace every leaf in place; parameters, names and state dict are untouched.

    Args:
        model: any module of models/, built as for one device.
        group: the ranks that share one sequence; None where none is shared, and only experts are.
        method: which driver serves a Softmax; auto: each gets the one that sends least, see
            `Wire.choices`.
        grid: groups (of ranks that trade heads, of the ring), as a Mesh has them; what usp needs
            and auto may use.
        heads: ranks that trade heads, where no grid of groups is at hand: the groups are made here.
        experts: the ranks that hold all experts between them, rank by rank in order; None: each
            holds all of them.

    Returns:
        The communicator of all drivers; it counts the bytes sent, those to experts too.

    Raises:
        ValueError: no method of that name, usp without a grid, or what `refusals` and `unreachable`
            say.
    """
    if method != "auto" and method not in METHODS:
        raise ValueError(
            f"unknown parallel.method={method}; choose one of auto, {', '.join(METHODS)}"
        )
    if group is not None and (reasons := refusals(model, method)):
        raise ValueError("\n".join(reasons))
    if experts is not None and (reasons := unreachable(model)):
        raise ValueError("\n".join(reasons))
    communicator = Communicator(experts if group is None else group)
    if grid is not None:
        communicator.add_grid(*grid)
    communicator.heads = next(iter(communicator.grids), heads)
    if group is not None and method == "usp" and communicator.heads is None:
        raise ValueError(
            "parallel.method=usp needs parallel.ulysses and parallel.ring; give both, or use"
            " parallel.method=auto"
        )
    if experts is not None:
        roads = Communicator(experts)
        roads.bytes_sent = communicator.bytes_sent
        _swap_drivers(
            model,
            {ExpertDispatch: lambda leaf, communicator, method: ExpertAllToAll(leaf, roads)},
            communicator,
            method,
        )
    if group is not None:
        _swap_drivers(model, DRIVERS, communicator, method)
    return communicator


def _swap_drivers(
    model: nn.Module, drivers: Drivers, communicator: Communicator, method: str
) -> None:
    """Put the driver of its kind in the place of every leaf, but for what runs inside the steps of
    a SequentialScan."""
    inside = sequential_modules(model)
    for path, parent in list(model.named_modules()):
        for name, leaf in list(parent.named_children()) if parent not in inside else ():
            for kind, driver in drivers.items():
                if isinstance(leaf, kind):
                    swapped = driver(leaf, communicator, method)
                    setattr(parent, name, swapped)
                    if isinstance(swapped, Auto | Wavefront):
                        swapped.name = f"{path}.{name}".lstrip(".")

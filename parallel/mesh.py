"""Which ranks share a sequence, which read other data, which share experts, and the meshes that
parameters lie on.

Global ranks are numbered data-major: with `context` = 4, ranks 0-3 share the rows of data rank 0,
ranks 4-7 those of data rank 1. Under USP a context group is itself a grid, heads innermost (so that
the all-to-all stays inside a node): context rank = ring rank x heads + heads rank. Neighbours share
experts (their all-to-all too should stay inside a node)
whatever else they share: with `experts` = 2, ranks 0 and 1 hold all experts between them, and so do
ranks 2 and 3.
"""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class Mesh:
    """This rank's place, and every group it belongs to; created once, handed on as an argument.

    Attributes: rank, size: among all ranks; data_rank, data_size: among groups that read different
        rows; context_rank, context_size: among the ranks that share a row. context_group,
        data_group, world_group: None only where torch.distributed was never started (`alone`).
        device_mesh: all ranks of data x context, what FSDP2 shards over: one axis, or (replicas,
        shards) where the
            parameters are held several times (HSDP). None under `alone`.
        heads_group, ring_group: the two sides of the context group's grid; None unless they were
            asked for.
        experts_rank, experts_size: among the ranks that hold all experts between them.
        experts_group: those ranks; experts_data_group: the ranks that hold the same experts. None
            unless experts are shared.
        experts_mesh: axes (shards, experts), or (replicas, shards, experts): what stacks of experts
            lie on. Ranks that differ in `experts` hold other experts, the others copies or shards
            of the same. None as the groups.
        device: where this rank computes.
    """

    rank: int
    size: int
    context_rank: int
    context_size: int
    data_rank: int
    data_size: int
    context_group: ProcessGroup | None
    data_group: ProcessGroup | None
    world_group: ProcessGroup | None
    device_mesh: DeviceMesh | None
    device: torch.device
    heads_rank: int = 0
    heads_size: int = 1
    heads_group: ProcessGroup | None = None
    ring_rank: int = 0
    ring_size: int = 1
    ring_group: ProcessGroup | None = None
    experts_rank: int = 0
    experts_size: int = 1
    experts_group: ProcessGroup | None = None
    experts_data_group: ProcessGroup | None = None
    experts_mesh: DeviceMesh | None = None

    @staticmethod
    def alone(device: torch.device | str = "cpu") -> "Mesh":
        """A single process that needs no group: `plan`, `generate`, a notebook."""
        return Mesh(0, 1, 0, 1, 0, 1, None, None, None, None, torch.device(device))


def validate_shape(
    size: int,
    context: int,
    data: int,
    heads: int | None = None,
    ring: int | None = None,
    *,
    experts: int = 1,
    replicas: int = 1,
) -> None:
    """Refuse a mesh that the ranks cannot form; pure, so that the config check can ask before any
    rank starts.

    Raises:
        ValueError: a size below 1, context x data other than the ranks, heads without ring or the
            other way round, heads x ring other than context, and what `misfits` says.
    """
    asked = {
        "parallel.context": context,
        "parallel.data": data,
        "parallel.ulysses": heads,
        "parallel.ring": ring,
    }
    for name, count in {**asked, "parallel.experts": experts, "engine.replicate": replicas}.items():
        if count is not None and count < 1:
            raise ValueError(f"{name}={count} is no number of ranks; it must be at least 1")
    if context * data != size:
        raise ValueError(
            f"parallel.context={context} x parallel.data={data} asks for {context * data} ranks,"
            f" but {size} were started; start {context * data} ranks or change one of the two"
        )
    if (heads is None) != (ring is None):
        given, missing = ("heads", "ring") if ring is None else ("ring", "heads")
        raise ValueError(
            f"parallel.{given} is given without parallel.{missing}; usp needs both (or give"
            " neither)"
        )
    if heads is not None and ring is not None and heads * ring != context:
        raise ValueError(
            f"parallel.ulysses={heads} x parallel.ring={ring} is {heads * ring}, but"
            f" parallel.context={context}; their product must be the number of ranks that share a"
            " sequence"
        )
    if reasons := shape_errors(size, experts, replicas):
        raise ValueError("\n".join(reasons))


def shape_errors(size: int, experts: int, replicas: int) -> list[str]:
    """Why `size` ranks cannot share experts, or hold replicas, so many at a time: a sentence each;
    empty where they can."""
    found = [
        f"{name}={wish} does not divide the number of ranks, {size} (parallel.context x"
        f" parallel.data); use {name}={nearest_divisor(size, wish)}, or other ranks"
        for name, wish in (("parallel.experts", experts), ("engine.replicate", replicas))
        if size % wish
    ]
    shards = size // replicas
    if not found and shards % experts and experts % shards:
        found.append(
            f"parallel.experts={experts} and engine.replicate={replicas} do not fit: {shards} ranks"
            " hold a replica, and neither number of ranks divides the other; use"
            f" parallel.experts={nearest_divisor(shards, experts)}, or engine.replicate=1"
        )
    return found


def nearest_divisor(size: int, wish: int) -> int:
    """The divisor of `size` next to `wish`."""
    return min((n for n in range(1, size + 1) if size % n == 0), key=lambda n: (abs(n - wish), n))


def build_mesh(
    context: int,
    data: int,
    *,
    heads: int | None = None,
    ring: int | None = None,
    experts: int = 1,
    replicas: int = 1,
    device: torch.device | str = "cpu",
) -> Mesh:
    """Create the groups of a run; every rank calls it once, after torch.distributed was
    initialised.

    Args:
        context: ranks that share one sequence. data: groups that read different rows.
        heads, ring: the grid inside a context group (USP); both or neither.
        experts: neighbours that hold all experts between them; 1 = every rank holds all.
        replicas: how often the parameters are held; each replica is sharded over neighbours (HSDP).

    Raises:
        ValueError: as `check_shape`.
    """
    size = dist.get_world_size()
    validate_shape(size, context, data, heads, ring, experts=experts, replicas=replicas)
    device = torch.device(device)
    world = init_device_mesh(device.type, (size,), mesh_dim_names=("world",))
    plane = init_device_mesh(device.type, (data, context), mesh_dim_names=("data", "context"))
    flat = world
    if replicas > 1:
        flat = init_device_mesh(
            device.type, (replicas, size // replicas), mesh_dim_names=("replicas", "shards")
        )
    mesh = Mesh(
        rank=dist.get_rank(),
        size=size,
        context_rank=plane.get_local_rank("context"),
        context_size=context,
        data_rank=plane.get_local_rank("data"),
        data_size=data,
        context_group=plane.get_group("context"),
        data_group=plane.get_group("data"),
        world_group=world.get_group(),
        device_mesh=flat,
        device=device,
    )
    if heads is not None and ring is not None:
        mesh = _gridded(mesh, heads, ring)
    return _expert(mesh, experts, replicas) if experts > 1 else mesh


def _gridded(mesh: Mesh, heads: int, ring: int) -> Mesh:
    """The same mesh with the two sides of its context group's grid."""
    shape = (mesh.data_size, ring, heads)
    names = ("data", "ring", "heads")
    grid = init_device_mesh(mesh.device.type, shape, mesh_dim_names=names)
    return replace(
        mesh,
        heads_rank=grid.get_local_rank("heads"),
        heads_size=heads,
        heads_group=grid.get_group("heads"),
        ring_rank=grid.get_local_rank("ring"),
        ring_size=ring,
        ring_group=grid.get_group("ring"),
    )


def _expert(mesh: Mesh, experts: int, replicas: int) -> Mesh:
    """The same mesh with the groups of expert parallelism."""
    grid = init_device_mesh(
        mesh.device.type, (mesh.size // experts, experts), mesh_dim_names=("shards", "experts")
    )
    across = grid
    if replicas > 1:
        names = ("replicas", "shards", "experts")
        across = init_device_mesh(
            mesh.device.type, expert_axes(mesh.size, experts, replicas), mesh_dim_names=names
        )
    return replace(
        mesh,
        experts_rank=grid.get_local_rank("experts"),
        experts_size=experts,
        experts_group=grid.get_group("experts"),
        experts_data_group=grid.get_group("shards"),
        experts_mesh=across,
    )


def expert_axes(size: int, experts: int, replicas: int) -> tuple[int, int, int]:
    """Ranks along (replicas, shards, experts): of the ranks that hold the same experts, those of
    one replica shard them.

    A replica of fewer ranks than `experts` holds a part of them only; then an expert is not
    sharded, only copied.
    """
    shards = max(1, size // replicas // experts)
    return size // experts // shards, shards, experts

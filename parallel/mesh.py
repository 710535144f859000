"""The mesh of ranks: named axes with this rank's coordinate, size and process group on each.

Global ranks are numbered data-major: with `context` = 4, ranks 0-3 share the rows of data rank 0,
ranks 4-7 those of data rank 1. Under USP a context group is itself a grid with the ulysses axis
innermost, so that the all-to-all stays inside a node: context rank = ring rank x ulysses size +
ulysses rank. The ranks that hold all experts between them are neighbours too, for the same reason
and independently of the other axes: with `experts` = 2, ranks 0 and 1 hold all experts, and so do
ranks 2 and 3.
"""

from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class Axis:
    """One axis of the mesh as this rank sees it.

    Attributes:
        rank: this rank's coordinate along the axis.
        size: number of ranks along the axis.
        group: the ranks along the axis; None where the axis was not asked for, or where
            torch.distributed was never started.
    """

    rank: int = 0
    size: int = 1
    group: ProcessGroup | None = None


@dataclass(frozen=True)
class Mesh:
    """All axes of a run, created once per rank and passed as an argument.

    Attributes:
        device: device of this rank's computation.
        world: all ranks.
        data: ranks that read different rows.
        context: ranks that share each row.
        ulysses, ring: inner and outer side of the context axis under USP; without a group unless
            both were asked for.
        experts: ranks that hold all experts between them; without a group unless experts are
            sharded.
        expert_data: ranks that hold the same experts; without a group unless experts are sharded.
        device_mesh: DTensor mesh over data x context that FSDP2 shards parameters over: one axis
            (world), or (replicas, shards) where the parameters are held several times (HSDP). None
            where torch.distributed was never started.
        experts_mesh: DTensor mesh of stacks of experts, with axes (shards, experts) or (replicas,
            shards, experts): ranks that differ along `experts` hold other experts, all others
            copies or shards of the same. None unless experts are sharded.
    """

    device: torch.device
    world: Axis = Axis()
    data: Axis = Axis()
    context: Axis = Axis()
    ulysses: Axis = Axis()
    ring: Axis = Axis()
    experts: Axis = Axis()
    expert_data: Axis = Axis()
    device_mesh: DeviceMesh | None = None
    experts_mesh: DeviceMesh | None = None

    @staticmethod
    def alone(device: torch.device | str = "cpu") -> "Mesh":
        """Returns the mesh of a single process without groups, as for `plan` or a notebook."""
        return Mesh(torch.device(device))

    @property
    def groups(self) -> list[ProcessGroup]:
        """Process groups of all axes, each once."""
        distinct: dict[int, ProcessGroup] = {}
        for axis in vars(self).values():
            if isinstance(axis, Axis) and axis.group is not None:
                # Axes over the same ranks may share a group, and groups do not compare by value.
                distinct[id(axis.group)] = axis.group
        return list(distinct.values())

    @property
    def grid(self) -> tuple[ProcessGroup, ProcessGroup] | None:
        """Groups (ulysses, ring) of the USP grid, or None without one."""
        if self.ulysses.group is None or self.ring.group is None:
            return None
        return self.ulysses.group, self.ring.group


def validate_shape(
    size: int,
    context: int,
    data: int,
    ulysses: int | None = None,
    ring: int | None = None,
    *,
    experts: int = 1,
    replicas: int = 1,
) -> None:
    """Refuses a mesh that the ranks cannot form.

    Pure, so that the config can be checked before any rank starts.

    Args:
        size: number of ranks. The other arguments are those of `build_mesh`.

    Raises:
        ValueError: a size below 1, context x data other than the number of ranks, ulysses without
            ring or the other way round, ulysses x ring other than context, or what `shape_errors`
            reports.
    """
    sizes = {
        "parallel.context": context,
        "parallel.data": data,
        "parallel.ulysses": ulysses,
        "parallel.ring": ring,
        "parallel.experts": experts,
        "engine.replicate": replicas,
    }
    for key, value in sizes.items():
        if value is not None and value < 1:
            raise ValueError(f"{key}={value}: must be at least 1, a number of ranks")
    required = context * data
    if required != size:
        raise ValueError(
            f"parallel.context={context} x parallel.data={data}: needs {required} ranks, but"
            f" {size} were started; start {required} ranks or change one of the two"
        )
    _validate_grid(context, ulysses, ring)
    errors = shape_errors(size, experts, replicas)
    if errors:
        raise ValueError("\n".join(errors))


def _validate_grid(context: int, ulysses: int | None, ring: int | None) -> None:
    """Refuses a USP grid that does not cover the context axis."""
    if ulysses is None and ring is None:
        return
    if ring is None:
        raise ValueError(
            f"parallel.ulysses={ulysses}: is set without parallel.ring; usp needs both, the other"
            " methods neither"
        )
    if ulysses is None:
        raise ValueError(
            f"parallel.ring={ring}: is set without parallel.ulysses; usp needs both, the other"
            " methods neither"
        )
    if ulysses * ring != context:
        raise ValueError(
            f"parallel.ulysses={ulysses} x parallel.ring={ring}: is {ulysses * ring}, but"
            f" parallel.context={context}; their product must be the number of ranks that share a"
            " sequence"
        )


def shape_errors(size: int, experts: int, replicas: int) -> list[str]:
    """Lists the reasons why `size` ranks cannot hold that many expert shards or replicas.

    Returns:
        One sentence for each reason, empty where the numbers fit.
    """
    errors = []
    for key, count in (("parallel.experts", experts), ("engine.replicate", replicas)):
        if size % count:
            errors.append(
                f"{key}={count} does not divide the number of ranks, {size} (parallel.context x"
                f" parallel.data); use {key}={nearest_divisor(size, count)}, or other ranks"
            )
    # The two may only be compared once each of them divides the ranks.
    shards = size // replicas
    if not errors and shards % experts and experts % shards:
        errors.append(
            f"parallel.experts={experts} and engine.replicate={replicas} do not fit: {shards} ranks"
            " hold a replica, and neither number of ranks divides the other; use"
            f" parallel.experts={nearest_divisor(shards, experts)}, or engine.replicate=1"
        )
    return errors


def nearest_divisor(size: int, target: int) -> int:
    """Returns the divisor of `size` nearest to `target`, the smaller of two equally near ones."""
    divisors = [number for number in range(1, size + 1) if size % number == 0]
    return min(divisors, key=lambda divisor: (abs(divisor - target), divisor))


def build_mesh(
    context: int,
    data: int,
    *,
    ulysses: int | None = None,
    ring: int | None = None,
    experts: int = 1,
    replicas: int = 1,
    device: torch.device | str = "cpu",
) -> Mesh:
    """Creates the process groups of a run.

    Collective: every rank calls it once, after torch.distributed was initialised.

    Args:
        context: ranks that share one sequence.
        data: groups of ranks that read different rows.
        ulysses, ring: sides of the grid inside a context group (USP); both or neither.
        experts: neighbours that hold all experts between them; 1 means that every rank holds all.
        replicas: copies of the parameters; each copy is sharded over neighbours (HSDP).

    Raises:
        ValueError: as `validate_shape`.
    """
    size = dist.get_world_size()
    validate_shape(size, context, data, ulysses, ring, experts=experts, replicas=replicas)
    device = torch.device(device)
    world = init_device_mesh(device.type, (size,), mesh_dim_names=("world",))
    plane = init_device_mesh(device.type, (data, context), mesh_dim_names=("data", "context"))
    device_mesh = world
    if replicas > 1:
        device_mesh = init_device_mesh(
            device.type, (replicas, size // replicas), mesh_dim_names=("replicas", "shards")
        )
    mesh = Mesh(
        device=device,
        world=_axis(world, "world"),
        data=_axis(plane, "data"),
        context=_axis(plane, "context"),
        device_mesh=device_mesh,
    )
    if ulysses is not None and ring is not None:
        mesh = _with_usp_grid(mesh, ulysses, ring)
    if experts > 1:
        mesh = _with_expert_axes(mesh, experts, replicas)
    return mesh


def _axis(device_mesh: DeviceMesh, name: str) -> Axis:
    """Returns one named dimension of a device mesh as an axis."""
    group = device_mesh.get_group(name)
    return Axis(device_mesh.get_local_rank(name), dist.get_world_size(group), group)


def _with_usp_grid(mesh: Mesh, ulysses: int, ring: int) -> Mesh:
    """Returns the mesh with the two sides of its context group's grid."""
    grid = init_device_mesh(
        mesh.device.type,
        (mesh.data.size, ring, ulysses),
        mesh_dim_names=("data", "ring", "ulysses"),
    )
    return replace(mesh, ulysses=_axis(grid, "ulysses"), ring=_axis(grid, "ring"))


def _with_expert_axes(mesh: Mesh, experts: int, replicas: int) -> Mesh:
    """Returns the mesh with the axes of expert parallelism."""
    size = mesh.world.size
    grid = init_device_mesh(
        mesh.device.type, (size // experts, experts), mesh_dim_names=("shards", "experts")
    )
    experts_mesh = grid
    if replicas > 1:
        experts_mesh = init_device_mesh(
            mesh.device.type,
            expert_axes(size, experts, replicas),
            mesh_dim_names=("replicas", "shards", "experts"),
        )
    return replace(
        mesh,
        experts=_axis(grid, "experts"),
        expert_data=_axis(grid, "shards"),
        experts_mesh=experts_mesh,
    )


def expert_axes(size: int, experts: int, replicas: int) -> tuple[int, int, int]:
    """Returns the ranks along (replicas, shards, experts) of the mesh of stacks of experts.

    The ranks of one replica that hold the same experts shard them. A replica of fewer ranks than
    `experts` holds only some of the experts; then an expert is copied but not sharded.
    """
    shards = max(1, size // replicas // experts)
    copies = size // experts // shards
    return copies, shards, experts

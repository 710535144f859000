"""Which ranks share a sequence, which read other data, and the one flat mesh that parameters are sharded over.

Global ranks are numbered data-major: with `context` = 4, ranks 0-3 share the rows of data rank 0, ranks 4-7 those of
data rank 1. Under USP a context group is itself a grid, heads innermost (so that the all-to-all stays inside a node):
context rank = ring rank x heads + heads rank.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh


@dataclass(frozen=True)
class Mesh:
    """This rank's place, and every group it belongs to; created once, handed on as an argument.

    Attributes:
        rank, size: among all ranks; data_rank, data_size: among groups that read different rows;
        context_rank, context_size: among the ranks that share a row.
        context_group, data_group, world_group: None only where torch.distributed was never started (`alone`).
        device_mesh: one dimension, all ranks of data x context: what FSDP2 shards over. None under `alone`.
        heads_group, ring_group: the two sides of the context group's grid; None unless they were asked for.
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

    @staticmethod
    def alone(device: torch.device | str = "cpu") -> "Mesh":
        """A single process that needs no group: `plan`, `generate`, a notebook."""
        return Mesh(0, 1, 0, 1, 0, 1, None, None, None, None, torch.device(device))


def check_shape(size: int, context: int, data: int, heads: int | None = None, ring: int | None = None) -> None:
    """Refuse a mesh that the ranks cannot form; pure, so that the config check can ask before any rank starts.

    Raises:
        ValueError: a size below 1, context x data other than the ranks, heads without ring or the other way round,
            heads x ring other than context.
    """
    asked = {"parallel.context": context, "parallel.data": data, "parallel.heads": heads, "parallel.ring": ring}
    for name, count in asked.items():
        if count is not None and count < 1:
            raise ValueError(f"{name}={count} is no number of ranks; it must be at least 1")
    if context * data != size:
        raise ValueError(
            f"parallel.context={context} x parallel.data={data} asks for {context * data} ranks, but {size} were "
            f"started; start {context * data} ranks or change one of the two"
        )
    if (heads is None) != (ring is None):
        given, missing = ("heads", "ring") if ring is None else ("ring", "heads")
        raise ValueError(f"parallel.{given} is given without parallel.{missing}; usp needs both (or give neither)")
    if heads is not None and ring is not None and heads * ring != context:
        raise ValueError(
            f"parallel.heads={heads} x parallel.ring={ring} is {heads * ring}, but parallel.context={context}; "
            "their product must be the number of ranks that share a sequence"
        )


def build_mesh(
    context: int, data: int, *, heads: int | None = None, ring: int | None = None, device: torch.device | str = "cpu"
) -> Mesh:
    """Create the groups of a run; every rank calls it once, after torch.distributed was initialised.

    Args:
        context: ranks that share one sequence. data: groups that read different rows.
        heads, ring: the grid inside a context group (USP); both or neither.

    Raises:
        ValueError: as `check_shape`.
    """
    size = dist.get_world_size()
    check_shape(size, context, data, heads, ring)
    device = torch.device(device)
    world = init_device_mesh(device.type, (size,), mesh_dim_names=("world",))
    plane = init_device_mesh(device.type, (data, context), mesh_dim_names=("data", "context"))
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
        device_mesh=world,
        device=device,
    )
    return mesh if heads is None or ring is None else _gridded(mesh, heads, ring)


def _gridded(mesh: Mesh, heads: int, ring: int) -> Mesh:
    """The same mesh with the two sides of its context group's grid."""
    shape, names = (mesh.data_size, ring, heads), ("data", "ring", "heads")
    grid = init_device_mesh(mesh.device.type, shape, mesh_dim_names=names)
    sides = {
        "heads_rank": grid.get_local_rank("heads"),
        "heads_size": heads,
        "heads_group": grid.get_group("heads"),
        "ring_rank": grid.get_local_rank("ring"),
        "ring_size": ring,
        "ring_group": grid.get_group("ring"),
    }
    return Mesh(**{**vars(mesh), **sides})

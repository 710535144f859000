"""Ranks are numbered data-major, a context group is consecutive ranks, and wrong shapes are refused
in plain words."""

import warnings

import pytest
import torch
import torch.distributed as dist

from parallel.mesh import Axis, Mesh, build_mesh, expert_axes, validate_shape
from tests.support.pool import ranks

SIZE = 4


def place(env, context, data, grid):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mesh = build_mesh(context, data, **grid)
    axes = {}
    for name in ("world", "data", "context", "ulysses", "ring"):
        axis = getattr(mesh, name)
        members = dist.get_process_group_ranks(axis.group) if axis.group is not None else None
        axes[name] = (axis.rank, axis.size, members)
    return axes, len(mesh.groups), mesh.device_mesh.mesh.tolist()


def test_a_context_group_is_consecutive_ranks():
    for rank, (axes, groups, device_mesh) in enumerate(ranks(SIZE, place, 2, 2, {})):
        context, data = rank % 2, rank // 2
        assert axes == {
            "world": (rank, 4, [0, 1, 2, 3]),
            "data": (data, 2, [context, context + 2]),
            "context": (context, 2, [2 * data, 2 * data + 1]),
            "ulysses": (0, 1, None),
            "ring": (0, 1, None),
        }
        assert groups == 3
        assert device_mesh == [0, 1, 2, 3]


def test_heads_are_the_inner_side_of_the_grid():
    grid = {"ulysses": 2, "ring": 2}
    for rank, (axes, _, _) in enumerate(ranks(SIZE, place, 4, 1, grid)):
        assert axes["ring"] == (rank // 2, 2, [rank % 2, rank % 2 + 2])
        assert axes["ulysses"] == (rank % 2, 2, [rank // 2 * 2, rank // 2 * 2 + 1])


def lie(env, shape):
    mesh = build_mesh(**shape)
    named = (mesh.experts, mesh.expert_data, mesh.context)
    groups = [dist.get_process_group_ranks(axis.group) for axis in named]
    axes = dict(zip(mesh.experts_mesh.mesh_dim_names, mesh.experts_mesh.shape))
    return (
        mesh.experts.rank,
        mesh.experts.size,
        *groups,
        axes,
        dict(zip(mesh.device_mesh.mesh_dim_names, mesh.device_mesh.shape)),
    )


def test_neighbours_share_experts_whatever_else_they_share():
    for rank, found in enumerate(ranks(SIZE, lie, {"context": 4, "data": 1, "experts": 2})):
        assert found[:2] == (rank % 2, 2)
        assert found[2:5] == (
            [rank // 2 * 2, rank // 2 * 2 + 1],
            [rank % 2, rank % 2 + 2],
            [0, 1, 2, 3],
        )
        assert found[5:] == ({"shards": 2, "experts": 2}, {"world": 4})


@pytest.mark.parametrize(
    "experts, replicas, axes",
    [(2, 2, (2, 1, 2)), (2, 4, (2, 1, 2)), (4, 2, (1, 1, 4)), (1, 2, None)],
)
def test_an_expert_is_copied_over_replicas_and_sharded_within_one(experts, replicas, axes):
    shape = {"context": 2, "data": 2, "experts": experts, "replicas": replicas}
    if axes is None:
        assert ranks(SIZE, flat, shape) == [({"replicas": 2, "shards": 2}, None)] * SIZE
        return
    for found in ranks(SIZE, lie, shape):
        assert tuple(found[5].values()) == axes and list(found[5]) == [
            "replicas",
            "shards",
            "experts",
        ]
        assert found[6] == {"replicas": replicas, "shards": SIZE // replicas}


@pytest.mark.parametrize(
    "size, experts, replicas, axes",
    [(8, 2, 2, (2, 2, 2)), (16, 2, 2, (2, 4, 2)), (8, 4, 4, (2, 1, 4)), (8, 2, 1, (1, 4, 2))],
)
def test_the_ranks_of_a_replica_that_hold_the_same_experts_shard_them(
    size, experts, replicas, axes
):
    assert expert_axes(size, experts, replicas) == axes


def flat(env, shape):
    mesh = build_mesh(**shape)
    return dict(zip(mesh.device_mesh.mesh_dim_names, mesh.device_mesh.shape)), mesh.experts_mesh


def test_one_process_needs_no_group():
    mesh = Mesh.alone()
    assert mesh.world == mesh.context == Axis(0, 1, None)
    assert mesh.groups == [] and mesh.grid is None
    assert mesh.device == torch.device("cpu")


@pytest.mark.parametrize(
    "shape, words",
    [
        ((4, 3, 1), "needs 3 ranks, but 4 were started"),
        ((1, 0, 1), "parallel.context=0: must be at least 1"),
        ((4, 4, 1, 2), "parallel.ulysses=2: is set without parallel.ring"),
        ((4, 4, 1, None, 2), "parallel.ring=2: is set without parallel.ulysses"),
        ((4, 4, 1, 2, 3), "is 6, but parallel.context=4"),
    ],
)
def test_a_shape_that_the_ranks_cannot_form_is_refused(shape, words):
    with pytest.raises(ValueError, match=words):
        validate_shape(*shape)


@pytest.mark.parametrize(
    "size, experts, replicas, words",
    [
        (
            4,
            3,
            1,
            "parallel.experts=3 does not divide the number of ranks, 4 .*use parallel.experts=2",
        ),
        (
            6,
            1,
            4,
            "engine.replicate=4 does not divide the number of ranks, 6 .*use engine.replicate=3",
        ),
        (
            12,
            4,
            2,
            (
                "experts=4 and engine.replicate=2 do not fit: 6 ranks hold a replica.*use"
                " parallel.experts=3"
            ),
        ),
        (4, 0, 1, "parallel.experts=0: must be at least 1"),
    ],
)
def test_experts_and_replicas_that_the_ranks_cannot_hold_are_refused(
    size, experts, replicas, words
):
    with pytest.raises(ValueError, match=words):
        validate_shape(size, size, 1, experts=experts, replicas=replicas)


def test_a_shape_that_fits_is_taken():
    validate_shape(4, 2, 2)
    validate_shape(8, 4, 2, 2, 2)
    validate_shape(
        12, 4, 3, experts=6, replicas=4
    )  # a replica is 3 ranks, which hold half of the experts

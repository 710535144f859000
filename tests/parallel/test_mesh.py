"""Ranks are numbered data-major, a context group is consecutive ranks, and wrong shapes are refused in plain words."""

import warnings

import pytest
import torch
import torch.distributed as dist

from parallel.mesh import Mesh, build_mesh, check_shape
from tests.pool import ranks

SIZE = 4


def place(env, context, data, grid):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mesh = build_mesh(context, data, **grid)
    numbers = {
        name: getattr(mesh, name)
        for name in ("rank", "size", "context_rank", "context_size", "data_rank", "data_size", "heads_rank", "ring_rank")
    }
    groups = {
        name: dist.get_process_group_ranks(group)
        for name in ("context_group", "data_group", "world_group", "heads_group", "ring_group")
        if (group := getattr(mesh, name)) is not None
    }
    return numbers, groups, mesh.device_mesh.mesh.tolist()


def test_a_context_group_is_consecutive_ranks():
    for rank, (numbers, groups, flat) in enumerate(ranks(SIZE, place, 2, 2, {})):
        context, data = rank % 2, rank // 2
        assert numbers == {
            "rank": rank, "size": 4, "context_rank": context, "context_size": 2, "data_rank": data, "data_size": 2,
            "heads_rank": 0, "ring_rank": 0,
        }  # fmt: skip
        assert groups == {
            "context_group": [2 * data, 2 * data + 1],
            "data_group": [context, context + 2],
            "world_group": [0, 1, 2, 3],
        }
        assert flat == [0, 1, 2, 3]


def test_heads_are_the_inner_side_of_the_grid():
    for rank, (numbers, groups, _) in enumerate(ranks(SIZE, place, 4, 1, {"heads": 2, "ring": 2})):
        assert (numbers["ring_rank"], numbers["heads_rank"]) == divmod(rank, 2)
        assert groups["heads_group"] == [rank // 2 * 2, rank // 2 * 2 + 1]
        assert groups["ring_group"] == [rank % 2, rank % 2 + 2]


def test_one_process_needs_no_group():
    mesh = Mesh.alone()
    assert (mesh.rank, mesh.size, mesh.context_size, mesh.world_group) == (0, 1, 1, None)
    assert mesh.device == torch.device("cpu")


@pytest.mark.parametrize(
    "shape, words",
    [
        ((4, 3, 1), "asks for 3 ranks, but 4 were started"),
        ((1, 0, 1), "parallel.context=0 is no number of ranks"),
        ((4, 4, 1, 2), "parallel.heads is given without parallel.ring"),
        ((4, 4, 1, None, 2), "parallel.ring is given without parallel.heads"),
        ((4, 4, 1, 2, 3), "is 6, but parallel.context=4"),
    ],
)
def test_a_shape_that_the_ranks_cannot_form_is_refused(shape, words):
    with pytest.raises(ValueError, match=words):
        check_shape(*shape)


def test_a_shape_that_fits_is_taken():
    check_shape(4, 2, 2)
    check_shape(8, 4, 2, 2, 2)

"""Experts over ranks, tokens over ranks, both or neither: outputs, losses and every gradient are
those of one device."""

import pytest
import torch
import torch.distributed as dist

from parallel.context_parallel import apply_context_parallel
from parallel.drivers.expert_dispatch import sent_bytes
from parallel.mesh import build_mesh
from tests.support.mixtures import EXPERTS, LAYERS, LENGTHS, WIDTH, built, compare, given, passed
from tests.support.parity import packed
from tests.support.pool import ranks

SHAPES = [  # ranks, context, experts
    (2, 1, 2),
    (2, 2, 2),
    (2, 2, 1),
    (3, 3, 3),
    (3, 3, 1),
    (4, 1, 4),
    (4, 2, 4),
    (4, 2, 2),
    (4, 4, 4),
]
POLICIES = ("zigzag", "contiguous", "balanced")
EXACT = {torch.float64: 1e-11, torch.float32: 2e-5}


def cases():
    """Every layer with every shape, layouts in turn."""
    return [
        (name, *shape, POLICIES[(row + column) % 3])
        for row, name in enumerate(LAYERS)
        for column, shape in enumerate(SHAPES)
    ]


@pytest.mark.parametrize(("name", "size", "context", "experts", "policy"), cases())
def test_where_tokens_and_experts_lie_is_invisible(name, size, context, experts, policy):
    for found in ranks(size, compare, name, context, experts, policy, torch.float64):
        assert max(found.values()) < EXACT[torch.float64], found


@pytest.mark.parametrize("name", ["switch", "top 3, biased"])
def test_in_float32_too(name):
    for found in ranks(4, compare, name, 2, 2, "zigzag", torch.float32):
        assert max(found.values()) < EXACT[torch.float32], found


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("lengths", [[[1], []], [[2], [1]]], ids=["one token", "three tokens"])
def test_a_batch_of_next_to_nothing_is_exact(name, lengths):
    for shape in ((4, 1, 4), (4, 4, 4), (4, 2, 2)):
        rows = lengths * (4 // len(lengths))
        for found in ranks(*shape[:1], compare, name, *shape[1:], "zigzag", torch.float64, rows):
            assert max(found.values()) < EXACT[torch.float64], found


@pytest.mark.parametrize("name", ["undecided switch", "undecided top 2"])
def test_the_first_expert_gets_everybody_and_whole_ranks_nobody(name):
    layer = built(name, torch.float64)
    _, _, sums = passed(layer, *given(torch.float64, LENGTHS), packed(LENGTHS))
    assert (sums[next(key for key in sums if "load" in key)] > 0).sum() == (2 if "2" in name else 1)


@pytest.mark.parametrize("name", ["switch", "switch over rows"])
def test_some_are_dropped(name):
    """Else the comparisons above would say nothing of places in a queue."""
    layer = built(name, torch.float64)
    passed(layer, *given(torch.float64, LENGTHS), packed(LENGTHS))
    _, _, sums = passed(layer, *given(torch.float64, LENGTHS), packed(LENGTHS))
    assert 10 < sums["/dropped"] < sums["/tokens"] / 2


def sending(env, name, context, experts):
    """What a rank sent in one layer, and what the formula says it should have."""
    mesh = build_mesh(context, env.size // context, experts=experts)
    layer, (x, weight), span = (
        built(name, torch.float64),
        given(torch.float64, LENGTHS),
        packed(LENGTHS),
    )
    held = EXPERTS // experts
    mine = slice(mesh.experts.rank * held, (mesh.experts.rank + 1) * held)
    for key, stack in list(layer.experts.named_parameters()):
        setattr(layer.experts, key, torch.nn.Parameter(stack.detach()[mine].clone()))
    communicator = apply_context_parallel(layer, None, experts=mesh.experts.group)
    rows = slice(mesh.data.rank, None, mesh.data.size)
    x = x[rows].requires_grad_()
    _, _, sums = passed(layer, x, weight[rows], span.map(lambda t: t[rows]))
    every = [torch.zeros_like(sums["/load"]) for _ in range(env.size)]
    dist.all_gather(every, sums["/load"])
    here = (
        torch.stack(every)[mesh.world.rank // experts * experts :][:experts]
        .view(experts, experts, held)
        .sum(-1)
        .long()
    )
    mine, rank = here.tolist(), mesh.experts.rank
    formula = sent_bytes(
        mine[rank],
        [row[rank] for row in mine],
        rank,
        width=WIDTH,
        item=8,
        experts=EXPERTS,
        keys=layer.chance is not None,
    )
    return communicator.bytes_sent, formula


@pytest.mark.parametrize(
    "name", ["switch without drops", "top 2", "top 3, biased", "undecided switch"]
)
@pytest.mark.parametrize(("size", "experts"), [(2, 2), (3, 3), (4, 2), (4, 4)])
def test_bytes_sent_are_those_of_the_formula(name, size, experts):
    for sent, formula in ranks(size, sending, name, 1, experts):
        assert sent == formula
        assert sum(sent.values()) > 0

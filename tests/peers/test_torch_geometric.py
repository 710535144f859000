"""Set blocks and graph attention against torch-geometric's, with the same weights."""

import pytest
import torch
import torch_geometric.nn as geometric

from models.graphs.attention import GraphAttention
from models.init import initialise
from models.primitives.neighbors import NO_NEIGHBOR
from models.sets.blocks import (
    InducedSetAttentionBlock,
    MultiheadAttentionBlock,
    PoolingByMultiheadAttention,
    SetAttentionBlock,
)
from models.span import Span

WIDTH, HEADS, POINTS, NODES = 12, 3, 4, 14


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2), requires_grad=True)


def copy_block(mine: MultiheadAttentionBlock, theirs):
    """Gives their block the weights of ours."""
    with torch.no_grad():
        projections = (mine.q, mine.k, mine.v)
        theirs.attn.in_proj_weight.copy_(torch.cat([each.weight for each in projections]))
        none = torch.zeros_like(mine.q.bias)
        theirs.attn.in_proj_bias.copy_(torch.cat([mine.q.bias, none, mine.v.bias]))
        theirs.attn.out_proj.load_state_dict(mine.out.state_dict())
        theirs.lin.load_state_dict(mine.feedforward.state_dict())


def compare(mine, theirs, x):
    """Compares outputs and the gradient of the input, at 1e-5 in float32."""
    gradients = []
    for out in (mine, theirs):
        weight = torch.linspace(-1, 1, out.numel()).view_as(out)
        gradients += torch.autograd.grad((out * weight).sum(), x)
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", [True, False])
def test_set_blocks(norm):
    utils, x, span = geometric.aggr.utils, drawn(2, 9, WIDTH), Span.line(2, 9)
    sab = initialise(SetAttentionBlock(WIDTH, HEADS, norm=norm), seed=1)
    peer = utils.SetAttentionBlock(WIDTH, HEADS, norm)
    copy_block(sab.block, peer.mab)
    compare(sab(x, span), peer(x), x)

    isab = initialise(InducedSetAttentionBlock(WIDTH, HEADS, POINTS, norm=norm), seed=1)
    peer = utils.InducedSetAttentionBlock(WIDTH, POINTS, HEADS, norm)
    peer.ind.data = isab.points.data[None]
    copy_block(isab.inward, peer.mab1)
    copy_block(isab.outward, peer.mab2)
    compare(isab(x, span), peer(x), x)

    pma = initialise(PoolingByMultiheadAttention(WIDTH, HEADS, POINTS, norm=norm), seed=1)
    peer = utils.PoolingByMultiheadAttention(WIDTH, POINTS, HEADS, norm)
    peer.seed.data = pma.seeds.data[None]
    peer.lin.load_state_dict(pma.feedforward.state_dict())
    copy_block(pma.block, peer.mab)
    compare(pma(x, span)[0], peer(x), x)


def graph():
    """Neighbour lists [1, NODES, 4] and the same edges as [2, E] (source, destination)."""
    generator = torch.Generator().manual_seed(5)
    lists = torch.full((1, NODES, 4), NO_NEIGHBOR)
    pairs = []
    for node in range(1, NODES):  # node 0 has none
        for slot, other in enumerate(torch.randperm(NODES, generator=generator)[:4].tolist()):
            lists[0, node, slot] = other
            pairs.append((other, node))
    return lists, torch.tensor(pairs).T


@pytest.mark.parametrize("self_loops", [True, False])
@pytest.mark.parametrize("concat", [True, False])
@pytest.mark.parametrize("scoring", ["gat", "gatv2", "gatv2 shared"])
def test_graph_attention(scoring, concat, self_loops):
    kind, _, shared = scoring.partition(" ")
    lists, pairs = graph()
    x = drawn(1, NODES, WIDTH)
    settings = {"concat": concat, "self_loops": self_loops, "share_weights": bool(shared)}
    mine = initialise(GraphAttention(WIDTH, 5, HEADS, scoring=kind, **settings), seed=1)
    conv = geometric.GATConv if kind == "gat" else geometric.GATv2Conv
    more = {} if kind == "gat" else {"share_weights": bool(shared)}
    theirs = conv(WIDTH, 5, HEADS, concat=concat, add_self_loops=self_loops, **more)
    with torch.no_grad():
        theirs.bias.copy_(torch.linspace(-1, 1, len(theirs.bias)))
        mine.bias.copy_(theirs.bias)
        if kind == "gat":
            theirs.lin.weight.copy_(mine.source.weight)
            theirs.att_src.copy_(mine.score[None])
            theirs.att_dst.copy_(mine.target_score[None])
        else:
            target = mine.source if mine.target is None else mine.target
            theirs.lin_l.weight.copy_(mine.source.weight)
            theirs.lin_r.weight.copy_(target.weight)
            theirs.lin_l.bias.zero_()
            theirs.lin_r.bias.zero_()
            theirs.att.copy_(mine.score[None])
    compare(mine(x, lists, Span.line(1, NODES))[0], theirs(x[0], pairs), x)

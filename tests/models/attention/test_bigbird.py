"""BigBird: the graph it draws, and what that graph is for."""

import torch

from models.attention.bigbird import BigBird
from models.init import initialise
from models.kernels.block_plan import plan_tiles
from models.masks.algebra import visible
from models.positions.rope import Rope
from models.span import Span


def _layer(**settings) -> BigBird:
    return initialise(BigBird(16, 4, 2, Rope(), 0, 3, **settings), seed=0).double()


def _graph(layer: BigBird, tokens: int) -> torch.Tensor:
    span = Span.line(1, tokens)
    return visible(layer.mix.mask, span, span, torch.arange(4))[0]


def test_it_is_softmax_attention_over_its_graph():
    layer, span = _layer(block=3, random=1), Span.line(2, 25)
    x = torch.randn(2, 25, 16, dtype=torch.float64) * 3
    q, k, v = (p(x).unflatten(-1, (-1, 4)) for p in (layer.q, layer.k, layer.v))
    q, k, v = (
        layer.position.rotate(q, span),
        layer.position.rotate(k, span).repeat_interleave(2, 2),
        v.repeat_interleave(2, 2),
    )
    logits = torch.einsum("bthd,bshd->bhts", q, k) / 2
    weights = logits.masked_fill(~_graph(layer, 25), -torch.inf).softmax(-1)
    want = layer.out(torch.einsum("bhts,bshd->bthd", weights, v).flatten(-2))
    torch.testing.assert_close(layer(x, span), want, rtol=0, atol=1e-13)


def test_each_query_sees_as_many_keys_however_long_the_document():
    layer = _layer(block=4, window=1, first=1, random=2)
    seen = _graph(layer, 256).sum(-1)
    assert seen[:, 64:].max() == 4 * (1 + 1 + 1 + 2)  # first, one before, its own, two drawn
    assert (seen[:, 64:] >= 4 * 4 + 1).all()


def test_random_blocks_shorten_the_way_between_tokens():
    def steps(layer) -> float:
        """Mean number of hops from the last query to every key, along one head's causal graph,
        without global blocks."""
        edges = _graph(layer, 256)[0].float()
        reached, total, hops = torch.zeros(256), torch.zeros(256), 0
        reached[255] = 1
        while not reached.all():
            hops += 1
            fresh = ((reached @ edges) > 0) & (reached == 0)
            total[fresh] = hops
            reached[fresh] = 1
        return total.mean().item()

    without, drawn = (steps(_layer(block=4, first=0, random=r)) for r in (0, 2))
    assert drawn < without / 3


def test_a_symmetric_graph_is_symmetric():
    graph = _graph(_layer(block=4, random=2, symmetric=True), 64)
    assert torch.equal(graph, graph.transpose(-1, -2))


def test_work_grows_with_the_visible_area():
    layer = _layer(block=256, random=1, per_head=False)

    def area(tokens: int) -> int:
        span = Span.line(1, tokens)
        return sum((b.q1 - b.q0) * (b.k1 - b.k0) for b in plan_tiles(layer.mix.mask, span, span))

    assert area(32768) < 5 * area(8192)  # all pairs would be 16 times as many

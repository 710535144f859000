"""Graph attention: equal to attention under an adjacency mask, to itself under other numbers of the
nodes, and to itself over ranks, dropout included."""

import pytest
import torch
import torch.distributed as dist

from models.attention.functional import attention_weights, masked_scores
from models.auxiliary import on_step_begin
from models.graphs.attention import AddressedDropout, GraphAttention
from models.init import initialise
from models.primitives.neighbors import NO_NEIGHBOR
from models.span import Span
from parallel.context_parallel import apply_context_parallel
from parallel.layout import layouts
from parallel.sharding import shard_span
from tests.support.parity import packed, relative
from tests.support.pool import ranks

WIDTH, HEADS, HEAD_WIDTH, DEGREE = 10, 3, 4, 5
TOKENS = 29
LENGTHS = [[9, 1, 12], [3, 17, 1, 4]]  # graphs of a row, some of a single node
FEW = [[2, 1], [3]]  # over three ranks and contiguously, some rank holds padding alone
ISOLATED = (0, 4)  # row and token of a node without edges
LAYERS = {
    "gat": {"scoring": "gat"},
    "gatv2": {"scoring": "gatv2"},
    "gatv2, shared": {"scoring": "gatv2", "share_weights": True},
    "mean": {"scoring": "mean"},
    "averaged": {"scoring": "gat", "concat": False},
    "without self-loops": {"scoring": "gatv2", "self_loops": False},
    "dropout": {"feature_dropout": 0.3, "weight_dropout": 0.4},
}


def built(name):
    layer = GraphAttention(WIDTH, HEAD_WIDTH, HEADS, seed=5, **LAYERS[name])
    layer = initialise(layer, seed=3).double()
    on_step_begin(layer, 7)
    return layer


def drawn(span, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*span.shape, WIDTH, generator=generator, dtype=torch.float64)


def edges(lengths, tokens=TOKENS):
    """[B, T, DEGREE] neighbours within the documents, some lists short, one empty."""
    generator = torch.Generator().manual_seed(6)
    lists = torch.full((len(lengths), tokens, DEGREE), NO_NEIGHBOR)
    for row, sizes in enumerate(lengths):
        start = 0
        for size in sizes:
            for node in range(start, start + size):
                degree = min(size, int(torch.randint(1, DEGREE + 1, (), generator=generator)))
                chosen = torch.randperm(size, generator=generator)[:degree]
                lists[row, node, :degree] = chosen
            start += size
    lists[ISOLATED] = NO_NEIGHBOR
    return lists


def adjacency(lists, self_loops):
    """[n, n] bool of one graph: which nodes (columns) a node reads."""
    nodes = len(lists)
    seen = torch.zeros(nodes, nodes, dtype=torch.bool)
    for node, entries in enumerate(lists.tolist()):
        for entry in entries:
            if entry != NO_NEIGHBOR:
                seen[node, entry] = True
    return seen | torch.eye(nodes, dtype=torch.bool) if self_loops else seen


@pytest.mark.parametrize("name", [name for name in LAYERS if name != "dropout"])
def test_it_is_attention_under_a_mask(name):
    layer, nodes = built(name), 12
    span, lists = Span.line(1, nodes), edges([[nodes]], nodes)
    x = drawn(span)
    sent = layer.source(x)[0].unflatten(-1, (HEADS, -1))
    received = sent if layer.target is None else layer.target(x)[0].unflatten(-1, (HEADS, -1))
    leaky = torch.nn.functional.leaky_relu
    if name == "mean":
        scores = torch.zeros(HEADS, nodes, nodes, dtype=torch.float64)
    elif layer.target_score is not None:
        own = torch.einsum("ihd,hd->hi", received, layer.target_score)
        scores = leaky(
            own[:, :, None] + torch.einsum("jhd,hd->hj", sent, layer.score)[:, None], 0.2
        )
    else:
        pairs = leaky(received[:, None] + sent[None], 0.2)
        scores = torch.einsum("ijhd,hd->hij", pairs, layer.score)
    seen = adjacency(lists[0], name != "without self-loops")
    weights = attention_weights(masked_scores(scores, seen))
    want = torch.einsum("hij,jhd->ihd", weights, sent)
    want = want.mean(1) if name == "averaged" else want.flatten(1)
    got = layer(x, lists, span)
    assert (got[0] - want - layer.bias).abs().max() < 1e-12


def test_an_isolated_node_reads_itself_or_nothing():
    span, lists = packed(LENGTHS, TOKENS), edges(LENGTHS)
    x = drawn(span)
    row, token = ISOLATED
    looped, bare = built("gat"), built("without self-loops")
    assert torch.allclose(looped(x, lists, span)[row, token], looped.source(x)[row, token])
    assert torch.equal(bare(x, lists, span)[row, token], bare.bias)


def test_other_numbers_of_the_nodes_make_no_difference():
    layer, nodes = built("gatv2"), 12
    span, lists = Span.line(1, nodes), edges([[nodes]], nodes)
    x = drawn(span)
    order = torch.randperm(nodes, generator=torch.Generator().manual_seed(4))
    number = order.argsort()
    renamed = torch.where(lists == NO_NEIGHBOR, NO_NEIGHBOR, number[lists.clamp_min(0)])
    want = layer(x, lists, span)
    got = layer(x[:, order], renamed[:, order], span)
    assert (got - want[:, order]).abs().max() < 1e-12


def test_a_graph_in_a_packed_row_is_that_graph_alone():
    layer, span, lists = built("gatv2"), packed(LENGTHS, TOKENS), edges(LENGTHS)
    x = drawn(span)
    out = layer(x, lists, span)
    alone = layer(x[1:, 3:20], lists[1:, 3:20], Span.line(1, 17))
    assert (out[1, 3:20] - alone[0]).abs().max() < 1e-12


def over_ranks(env, name, lengths, policy):
    """Worst relative difference of outputs and of all gradients."""
    span, lists = packed(lengths, TOKENS), edges(lengths)
    x, weight = drawn(span), drawn(span, 2)[..., :HEAD_WIDTH] * span.valid()[..., None]
    one, many = built(name), built(name)
    whole = x.clone().requires_grad_()
    want = one(whole, lists, span)
    (want[..., :HEAD_WIDTH] * weight).sum().backward()

    apply_context_parallel(many, env.group, "ring")
    here = shard_span(span, layouts(policy, span, env.size), env.rank)
    shard, valid = here.sharding.shard, here.valid()[..., None]
    part = shard(x, 0).requires_grad_()
    got = many(part, shard(lists, NO_NEIGHBOR), here)
    (got[..., :HEAD_WIDTH] * shard(weight, 0)).sum().backward()
    worst = [relative(got * valid, shard(want.detach(), 0) * valid)]
    worst.append(relative(part.grad * valid, shard(whole.grad, 0) * valid))
    for a, b in zip(one.parameters(), many.parameters(), strict=True):
        dist.all_reduce(b.grad, group=env.group)
        worst.append(relative(b.grad, a.grad))
    return max(worst)


@pytest.mark.parametrize(
    ("size", "policy", "lengths"),
    [
        (2, "zigzag", LENGTHS),
        (3, "contiguous", LENGTHS),
        (3, "contiguous", FEW),
        (4, "balanced", LENGTHS),
    ],
)
@pytest.mark.parametrize("name", LAYERS)
def test_sharing_a_graph_over_ranks_is_invisible(name, size, policy, lengths):
    assert max(ranks(size, over_ranks, name, lengths, policy)) < 1e-11


def sent(env):
    """Bytes of features that rank 2 sends: a path, whose ends alone are read elsewhere."""
    nodes, width = 30, HEADS * HEAD_WIDTH
    span = packed([[nodes]], nodes)
    line = torch.arange(nodes)
    lists = torch.stack([line - 1, torch.where(line + 1 < nodes, line + 1, NO_NEIGHBOR)], 1)[None]
    layer = built("gat")
    communicator = apply_context_parallel(layer, env.group, "ring")
    here = shard_span(span, layouts("contiguous", span, env.size), env.rank)
    shard = here.sharding.shard
    layer(shard(drawn(span), 0), shard(lists, NO_NEIGHBOR), here)
    return communicator.bytes_sent["neighbors"] / (8 * width)


def test_only_nodes_that_others_read_are_sent():
    assert ranks(3, sent) == [1, 2, 1]


def test_dropout_has_its_share_and_another_choice_at_every_step():
    dropout, addresses = AddressedDropout(0.25, "feature dropout", 0, 1), torch.arange(4000)
    ones = torch.ones(4000, 3)
    first = dropout(ones, addresses)
    assert abs(float((first == 0).float().mean()) - 0.25) < 0.02
    assert abs(float(first.mean()) - 1) < 0.02
    assert torch.equal(first, dropout(ones, addresses))
    on_step_begin(dropout, 2)
    assert not torch.equal(first, dropout(ones, addresses))
    assert torch.equal(dropout.eval()(ones, addresses), ones)


def test_a_share_that_leaves_nothing_is_refused():
    with pytest.raises(ValueError, match=r"model.weight_dropout=1.0: .* below 1; use 0"):
        AddressedDropout(1.0, "weight dropout", 0, 1)

"""The whole graph network over ranks, with dropout, by the road that a run takes."""

import torch
import torch.distributed as dist

from models.architectures.gat import GraphAttentionNetwork
from models.auxiliary import on_step_begin
from models.cost.flops import count_flops
from models.init import initialise
from models.loss import IGNORE
from models.micro_batch import MicroBatch
from models.span import Span
from parallel.context_parallel import apply_context_parallel
from parallel.mesh import build_mesh
from tests.support.parity import relative
from tests.support.pool import ranks
from trainer.data.batch_sharding import BatchSharder
from trainer.data.streams.synthetic import SyntheticStream
from trainer.data.tasks.graphs import Graphs

ROWS, LENGTH = 3, 43


def built(**settings):
    model = initialise(GraphAttentionNetwork(8, 12, 2, 3, 0, **settings), seed=3).double()
    on_step_begin(model, 4)
    return model


def batch():
    task = Graphs(min_nodes=6, max_nodes=14, degree=3)
    stream = SyntheticStream(task, context_length=LENGTH, rows=ROWS, seed=0)
    return stream.read(stream.start())[0]


def over_ranks(env, settings):
    """Worst relative difference of losses and of all gradients, of all rows of a step."""
    whole = batch()
    one, many = built(**settings), built(**settings)
    numbered = whole.numbered()
    want = one(MicroBatch(numbered.inputs(), numbered.span(), numbered.targets()))
    want.sum().backward()
    mesh = build_mesh(env.size, 1)
    apply_context_parallel(many, mesh.context.group, "ring")
    share = BatchSharder(mesh, rows=ROWS, context_length=LENGTH, micro_batch=2, policy="zigzag")
    total = torch.zeros((), dtype=torch.float64)
    for micro_batch, _ in share(whole):
        losses = many(micro_batch)
        losses.sum().backward()
        total += losses.detach().sum()
    dist.all_reduce(total, group=mesh.context.group)
    worst = [relative(total, want.detach().sum())]
    for a, b in zip(one.parameters(), many.parameters(), strict=True):
        dist.all_reduce(b.grad, group=mesh.context.group)
        worst.append(relative(b.grad, a.grad))
    return max(worst)


def test_a_step_of_graphs_over_ranks_is_that_of_one():
    dropout = {"feature_dropout": 0.3, "weight_dropout": 0.4}
    assert max(ranks(3, over_ranks, dropout)) < 1e-11
    assert max(ranks(3, over_ranks, {"scoring": "mean", "self_loops": False})) < 1e-11


def test_losses_are_those_of_its_logits_and_bare_numbers_have_edges():
    model, whole = built(), batch()
    rows = MicroBatch(whole.inputs(), whole.span(), whole.targets())
    assert rows.targets is not None
    logits = model(rows.without_targets())
    want = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), rows.targets.flatten(), reduction="none", ignore_index=IGNORE
    )
    assert torch.equal(model(rows).flatten(), want)
    tokens = torch.tensor([[1, 2, 3, 4]])
    moved = model(torch.tensor([[1, 5, 3, 4]])) - model(tokens)
    assert (moved.abs().amax(-1)[0] > 1e-6).tolist() == [False, True, True, True]


def test_flops_are_those_of_its_matrices():
    model = built(scoring="gat")
    matrices = 12 * 12 + 12 * 3 * 8
    assert count_flops(model).forward(Span.line(1, 10)) == 2 * 10 * matrices

"""Which tokens a rank computes: every one once, whatever the ranks, with the same count of
targets."""

import dataclasses

import pytest
import torch

from models.counter_rng import address
from models.kernels.block_plan import plan_rows
from models.loss import IGNORE
from models.masks.basic import Causal, SameDocument, SlidingWindow
from parallel.drivers.causal_conv import halo_plan
from parallel.drivers.key_exchange import gather_plan
from parallel.drivers.scan import run_order
from parallel.mesh import Axis, Mesh
from trainer.data import batch_sharding
from trainer.data.batch import Batch
from trainer.data.batch_sharding import BatchSharder, single_row

ROWS, LENGTH = 5, 23


def batch():
    tokens = torch.arange(ROWS * (LENGTH + 1)).view(ROWS, -1)
    pos = torch.arange(LENGTH + 1).remainder(9).expand(ROWS, -1).clone()
    doc = torch.arange(LENGTH + 1).div(9, rounding_mode="floor").expand(ROWS, -1).clone()
    doc[:, -2:] = -1
    return Batch(tokens, doc, pos, torch.zeros_like(tokens))


def mesh(data, data_rank, context, context_rank):
    return dataclasses.replace(
        Mesh.alone(),
        world=Axis(size=data * context),
        data=Axis(data_rank, data),
        context=Axis(context_rank, context),
    )


def share(*where, micro_batch=2, policy="zigzag", prefix=0):
    return BatchSharder(
        mesh(*where),
        rows=ROWS,
        context_length=LENGTH,
        micro_batch=micro_batch,
        policy=policy,
        prefix=prefix,
    )


@pytest.mark.every_case
@pytest.mark.parametrize("policy", ["zigzag", "contiguous", "balanced"])
@pytest.mark.parametrize(("data", "context"), [(1, 1), (1, 3), (2, 2), (3, 1), (4, 2)])
def test_every_token_is_computed_once(data, context, policy):
    seen, targets, sizes = [], [], set()
    for data_rank in range(data):
        for context_rank in range(context):
            pieces = list(share(data, data_rank, context, context_rank, policy=policy)(batch()))
            sizes.add(tuple(tuple(p.tokens.shape) for p, _ in pieces))
            assert [last for _, last in pieces] == [False] * (len(pieces) - 1) + [True]
            seen += [t for p, _ in pieces for t in p.tokens[p.span.valid()].tolist()]
            targets += [t for p, _ in pieces for t in p.targets[p.targets != IGNORE].tolist()]
    assert len(sizes) == 1, "every rank does the same micro-batches"
    valid = batch().doc[:, :-1] >= 0
    assert sorted(seen) == sorted(batch().tokens[:, :-1][valid].tolist())
    want = batch().targets()
    assert sorted(targets) == sorted(want[want != IGNORE].tolist())


def test_a_target_follows_its_token_through_the_cut():
    for context_rank in range(3):
        for piece, _ in share(1, 0, 3, context_rank)(batch()):
            valid = piece.targets != IGNORE
            assert (piece.targets[valid] == piece.tokens[valid] + 1).all()


def test_tokens_in_plain_sight_are_nobodys_target():
    with_prefix = share(1, 0, 1, 0, prefix=4)
    targets = with_prefix.targets(batch())
    hidden = (batch().pos[:, 1:] < 4) & (batch().targets() != IGNORE)
    assert hidden.any() and (targets[hidden] == IGNORE).all()
    assert with_prefix.valid(batch()) == batch().predictions() - int(hidden.sum())


def test_auto_computes_at_least_a_row_at_once():
    assert share(1, 0, 1, 0, micro_batch="auto").micro_batch == ROWS
    long = BatchSharder(
        mesh(1, 0, 1, 0), rows=2, context_length=10**6, micro_batch="auto", policy="zigzag"
    )
    assert long.micro_batch == 1 and long.pieces == 2


def test_a_line_for_generation_holds_all_of_its_tokens():
    one = single_row([5, 6, 7], torch.device("cpu"))
    assert one.inputs().tolist() == [[5, 6, 7]] and one.predictions() == 2


def addressed(data, context, micro_batch):
    """{address: token} of all that the ranks compute, and how many tokens that is."""
    found, count = {}, 0
    for data_rank in range(data):
        for context_rank in range(context):
            for piece, _ in share(data, data_rank, context, context_rank, micro_batch=micro_batch)(
                batch()
            ):
                here = piece.span.valid()
                found.update(zip(address(piece.span)[here].tolist(), piece.tokens[here].tolist()))
                count += int(here.sum())
    return found, count


def test_every_token_of_a_step_has_an_address_of_its_own_whatever_the_ranks():
    want, count = addressed(1, 1, 5)
    assert len(want) == count == int((batch().doc[:, :-1] >= 0).sum())
    for data, context, micro_batch in ((1, 1, 1), (2, 1, 2), (1, 3, 2), (3, 2, 1)):
        assert addressed(data, context, micro_batch) == (want, count)


@pytest.mark.parametrize("policy", ["zigzag", "balanced"])
def test_plans_of_addresses_on_a_device_do_not_read_it(policy, monkeypatch):
    """Tensors of the meta device stand in for those of a GPU: reading one would be an error."""
    (here, _), *_ = share(1, 0, 4, 1, policy=policy)(batch())
    monkeypatch.setattr(batch_sharding, "to_device", lambda tensor, device: tensor.to("meta"))
    (there, _), *_ = share(1, 0, 4, 1, policy=policy)(batch())
    assert there.tokens.is_meta and there.targets.is_meta and there.span.sharding.whole.pos.is_meta
    mask = Causal() & SameDocument() & SlidingWindow(5)
    heads = torch.zeros(1, dtype=torch.long)
    for plans in (
        lambda span: [plan_rows(mask, span, source) for source in span.sharding.spans],
        lambda span: plan_rows(mask, span, gather_plan(mask, span, span, heads).span),
        lambda span: gather_plan(mask, span, span, heads).takes,
        lambda span: plan_rows(mask, span, span.sharding.grouped(2).whole),
        lambda span: plan_rows(mask, span, span.sharding.whole),
        lambda span: run_order(span).lengths,
        lambda span: halo_plan(span, 3).given,
    ):
        assert plans(there.span) == plans(here.span)

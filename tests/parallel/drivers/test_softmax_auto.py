"""parallel.method=auto: each attention gets the driver that sends least, the same on all ranks, and
stays exact."""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from models.attention.full import CAUSAL
from models.masks.basic import SlidingWindow
from models.primitives.softmax import Softmax
from models.span import READ, Span
from parallel.collectives import Communicator
from parallel.context_parallel import apply_context_parallel
from parallel.drivers.softmax_auto import Auto, remote_share
from parallel.layout import layouts
from parallel.load_balance import visible_keys
from parallel.sharding import shard_span
from tests.support.parity import packed, relative
from tests.support.pool import ranks


def choices(env, policy, heads):
    """What each of two attentions gets, and how far it then is from one device."""
    span, wide, near = packed(), Softmax(CAUSAL), Softmax(CAUSAL & SlidingWindow(3))
    model = nn.ModuleDict({"wide": wide, "near": near})
    torch.manual_seed(3)
    q, k, v = (torch.randn(*span.shape, heads, 4, dtype=torch.float64) for _ in range(3))
    want = {key: leaf((q,), (k, v), span=span) for key, leaf in model.items()}
    communicator = apply_context_parallel(model, env.group, "auto")
    here = shard_span(span, layouts(policy, span, env.size), env.rank)
    shard, valid = here.sharding.shard, here.valid()[..., None, None]
    worst = 0.0
    for key, driver in model.items():
        assert isinstance(driver, Auto)
        got = driver((shard(q, 0),), (shard(k, 0), shard(v, 0)), span=here)
        worst = max(worst, relative(got * valid, shard(want[key], 0) * valid))
    return communicator.choices, worst


def test_the_choice_and_its_reason_are_said_and_are_the_same_on_all_ranks():
    for found, worst in ranks(2, choices, "contiguous", 4):
        assert found["wide"].startswith("ulysses: 4 heads divide among 2 ranks")
        assert found["near"].startswith("allgather: its mask needs")
        assert worst < 1e-12
    for found, worst in ranks(3, choices, "zigzag", 4):
        assert found["wide"].startswith("ring: ") and "do not divide among 3 ranks" in found["wide"]
        assert worst < 1e-12


def test_where_heads_run_out_the_grid_is_made():
    for found, worst in ranks(4, choices, "zigzag", 2):
        assert found["wide"].startswith("usp: heads over 2 ranks x ring of 2")
        assert worst < 1e-12


def patience(env):
    """How long the groups of a grid would wait that is made on the way, in seconds."""
    make, asked = dist.new_group, []

    def noted(*args, **kwargs):
        asked.append(kwargs["timeout"].total_seconds())
        return make(*args, **kwargs)

    communicator = Communicator(env.group)
    communicator.timeout, dist.new_group = timedelta(seconds=77), noted
    try:
        communicator.grid(2)
    finally:
        dist.new_group = make
    return asked


def test_groups_that_are_made_on_the_way_wait_no_longer_than_the_others():
    assert ranks(4, patience) == [[77, 77]] * 4


def test_the_choice_does_not_look_at_the_documents():
    def share(span, mask):
        cut = shard_span(span, layouts("contiguous", span, 4), 0).sharding
        return remote_share(mask, cut, cut, 1)

    near = CAUSAL & SlidingWindow(4)
    assert share(packed([[1] * 48], 48), near) == share(Span.line(1, 48), near) == 3 / 36
    assert share(Span.line(1, 48), CAUSAL) == 1.0
    assert int(visible_keys(Span.line(1, 48), near).max()) == 4


def test_what_was_read_before_the_row_counts_as_its_document():
    row, kept = (
        shard_span(s, layouts("contiguous", s, 4), 0) for s in (packed(), packed([[1, 1], [2]], 8))
    )
    joined = kept.cast(READ).join(row)
    assert joined.sharding.before() == 8
    assert remote_share(CAUSAL, row.sharding, joined.sharding, 1) == 1.0
    assert remote_share(CAUSAL & SlidingWindow(3), row.sharding, joined.sharding, 1) == 2 / (
        38 + 6
    )  # rank 0 needs the last two kept tokens
    near = remote_share(CAUSAL & SlidingWindow(13), row.sharding, joined.sharding, 1)
    assert near == 12 / (
        39 + 6
    )  # rank 0 needs the 6 kept tokens of others, the last rank 12 of the row before its own

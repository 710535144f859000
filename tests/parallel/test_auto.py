"""parallel.method=auto: each attention gets the driver that sends least, the same on all ranks, and stays exact."""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from models.attention.full import CAUSAL
from models.masks import Reach
from models.mixing.softmax import Softmax
from models.span import READ, Span
from parallel.balance import visible_keys
from parallel.cut import cut_span
from parallel.drivers.auto import Auto, remote_share
from parallel.layout import layouts
from parallel.moves import Wire
from parallel.spread import spread
from tests.parallel.parity import packed, relative
from tests.pool import ranks


def choices(env, policy, heads):
    """What each of two attentions gets, and how far it then is from one device."""
    span, wide, near = packed(), Softmax(CAUSAL), Softmax(CAUSAL & Reach(3))
    model = nn.ModuleDict({"wide": wide, "near": near})
    torch.manual_seed(3)
    q, k, v = (torch.randn(*span.shape, heads, 4, dtype=torch.float64) for _ in range(3))
    want = {key: leaf((q,), (k, v), at=span) for key, leaf in model.items()}
    wire = spread(model, env.group, "auto")
    here = cut_span(span, layouts(policy, span, env.size), env.rank)
    shard, valid = here.cut.shard, here.valid()[..., None, None]
    worst = 0.0
    for key, driver in model.items():
        assert isinstance(driver, Auto)
        got = driver((shard(q, 0),), (shard(k, 0), shard(v, 0)), at=here)
        worst = max(worst, relative(got * valid, shard(want[key], 0) * valid))
    return wire.choices, worst


def test_the_choice_and_its_reason_are_said_and_are_the_same_on_all_ranks():
    for found, worst in ranks(2, choices, "contiguous", 4):
        assert found["wide"].startswith("heads: 4 heads divide among 2 ranks")
        assert found["near"].startswith("fetch: its mask needs")
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

    wire = Wire(env.group)
    wire.timeout, dist.new_group = timedelta(seconds=77), noted
    try:
        wire.grid(2)
    finally:
        dist.new_group = make
    return asked


def test_groups_that_are_made_on_the_way_wait_no_longer_than_the_others():
    assert ranks(4, patience) == [[77, 77]] * 4


def test_the_choice_does_not_look_at_the_documents():
    def share(span, mask):
        cut = cut_span(span, layouts("contiguous", span, 4), 0).cut
        return remote_share(mask, cut, cut, 1)

    near = CAUSAL & Reach(4)
    assert share(packed([[1] * 48], 48), near) == share(Span.line(1, 48), near) == 3 / 36
    assert share(Span.line(1, 48), CAUSAL) == 1.0
    assert int(visible_keys(Span.line(1, 48), near).max()) == 4


def test_what_was_read_before_the_row_counts_as_its_document():
    row, kept = (cut_span(s, layouts("contiguous", s, 4), 0) for s in (packed(), packed([[1, 1], [2]], 8)))
    joined = kept.cast(READ).join(row)
    assert joined.cut.before() == 8
    assert remote_share(CAUSAL, row.cut, joined.cut, 1) == 1.0
    assert remote_share(CAUSAL & Reach(3), row.cut, joined.cut, 1) == 2 / (38 + 6)  # rank 0 needs the last two kept tokens
    near = remote_share(CAUSAL & Reach(13), row.cut, joined.cut, 1)
    assert near == 12 / (39 + 6)  # rank 0 needs the 6 kept tokens of others, the last rank 12 of the row before its own

"""A model's causality, worked out from its masks, is what its outputs show."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from torch import nn

from models.attention.bidirectional import Bidirectional
from models.attention.full import CAUSAL, Attention
from models.attention.prefix import PrefixAttention
from models.attention.softcap import Softcap
from models.causality import Ahead, layers_ahead, plain_sight, score_mismatches
from models.init import initialise
from models.masks.algebra import FAR, Mask
from models.masks.basic import Causal, FirstTokens, SameChunk, SameDocument, SlidingWindow
from models.masks.roles import GlobalKey, GlobalQuery, PrefixTokens, RoleKey
from models.masks.segments import PreviousTokens, SegmentRecurrence
from models.masks.sparse import DilatedWindow, NeighborBlocks, RandomBlocks
from models.memory.tokens import MEMORY
from models.positions.rope import Rope
from models.positions.t5 import T5
from models.span import READ, Span
from tests.models.masks.test_algebra import MASKS
from tests.variants import VARIANTS, WIDTH

TOKENS = 40
HEADS = torch.arange(6)


def seen_ahead(mask: Mask) -> int:
    """One more than the last position seen from before it, on one document; 0 where there is
    none."""
    line = Span.line(1, TOKENS)
    seen = mask.dense(line, line, HEADS)[0].any(0)
    ahead = (seen & torch.ones_like(seen).triu(1)).any(0).nonzero()
    return int(ahead[-1]) + 1 if len(ahead) else 0


@given(MASKS)
@settings(max_examples=200, deadline=None)
def test_no_mask_shows_more_than_it_says(mask):
    assert mask.causal_from() >= seen_ahead(mask)


KNOWN = [
    (Mask(), FAR),
    (CAUSAL, 0),
    (CAUSAL & SlidingWindow(3), 0),
    (CAUSAL & (SlidingWindow(3) | FirstTokens(9)), 0),
    (SlidingWindow(3), FAR),
    (SameDocument() & (Causal() | PrefixTokens() | FirstTokens(7)), 7),
    (FirstTokens(1), 0),
    (SameChunk(4), FAR),
    (SameChunk(1), 0),
    (~Causal(), FAR),
    (SameDocument() & ~~Causal(), 0),
    (DilatedWindow(3, (1, 2, 1, 1, 1, 5)), FAR),
    (CAUSAL & ~GlobalQuery(2) & (DilatedWindow(3) | GlobalKey(2)), 0),
    (GlobalKey(5), 5),
    (GlobalKey(0, 4), FAR),
    (GlobalQuery(1), FAR),
    (NeighborBlocks(1, 0), 0),
    (NeighborBlocks(2, 0), FAR),
    (RandomBlocks(2, 1, 1, 2, 7, 0), 0),
    (RandomBlocks(2, 1, 1, 2, 7, 0, both=True), FAR),
    (RoleKey(READ), 0),
    (CAUSAL | MEMORY, 0),
    (PreviousTokens(5, 9), 0),
    (SegmentRecurrence(5, 9), FAR),
    (CAUSAL & SegmentRecurrence(5, 9), 0),
]


@pytest.mark.parametrize(("mask", "limit"), KNOWN, ids=[str(mask) for mask, _ in KNOWN])
def test_a_mask_says_from_where_on_it_is_causal(mask, limit):
    assert mask.causal_from() == limit
    assert (seen_ahead(mask) > 0) == (limit > 0)


@dataclass(frozen=True)
class Next(Causal):
    """Inherits from a causal mask and also shows the next token."""

    def dense(self, q, k, heads=None):
        return (q.pos[:, :, None] - k.pos[:, None, :] >= -1)[:, None]


def test_a_mask_that_shows_other_keys_does_not_inherit_its_parents_word():
    assert Next().causal_from() == FAR
    assert (CAUSAL & Next()).causal_from() == 0


def moved_before(mixer: nn.Module) -> int:
    """One more than the last position of which the output moves earlier outputs; 0 where there is
    none."""
    span = Span.line(1, TOKENS)
    x = torch.randn(
        1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )
    before = mixer(x, span).detach()
    for place in range(TOKENS - 1, 0, -1):
        other = x.clone()
        other[0, place] += 1.0
        after = mixer(other, Span.line(1, TOKENS)).detach()
        if (after - before)[0, :place].abs().max() > 1e-9:
            return place + 1
    return 0


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_judged_by_what_it_does(name):
    torch.manual_seed(0)
    mixer = initialise(VARIANTS[name](), seed=1).double()
    for parameter in mixer.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    assert min(plain_sight(mixer), TOKENS) == moved_before(mixer)


class Centred(nn.Module):
    """A convolution that sees both sides and says so, as a user may write one."""

    def causal_from(self):
        return FAR


def test_layers_are_named_and_other_kinds_may_state_it_themselves():
    rope = Rope()
    model = nn.ModuleDict(
        {
            "full": Attention(8, 2, 1, rope),
            "both": Bidirectional(8, 2, 1, rope),
            "prefix": PrefixAttention(8, 2, 1, rope, length=6),
            "user": Centred(),
        }
    )
    ahead = [
        Ahead("both", "Bidirectional", FAR),
        Ahead("prefix", "PrefixAttention", 6),
        Ahead("user", "Centred", FAR),
    ]
    assert layers_ahead(model) == ahead


@pytest.mark.parametrize(
    ("layer", "mismatches"),
    [
        (Attention(8, 2, 1, T5(8, 20)), []),
        (Attention(8, 2, 1, T5(8, 20, bidirectional=True)), [True]),
        (Softcap(8, 2, 1, T5(8, 20, bidirectional=True)), [True]),
        (Bidirectional(8, 2, 1, T5(8, 20)), [False]),
        (Bidirectional(8, 2, 1, T5(8, 20, bidirectional=True)), []),
        (Bidirectional(8, 2, 1, Rope()), []),
    ],
)
def test_a_score_made_for_another_mask_is_noticed(layer, mismatches):
    assert [two_sided for _, two_sided in score_mismatches(nn.ModuleList([layer]))] == mismatches

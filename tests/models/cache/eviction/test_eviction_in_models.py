"""Evicting caches inside attention: exact with room for all, equal to masks where masks say the
same, and the same after rows are picked, joined, exported and imported."""

import pytest
import torch
from torch import nn

from models.attention.differential import Differential
from models.attention.full import CAUSAL, Attention
from models.attention.functional import attention_scores, attention_weights, scaled_scores
from models.attention.latent import LatentAttention
from models.attention.sink_logit import SinkLogit
from models.cache.contiguous import Contiguous
from models.cache.decoding_state import DecodingState
from models.cache.eviction.h2o import H2O
from models.cache.eviction.snapkv import SnapKV
from models.cache.eviction.streaming import Streaming
from models.cache.eviction.tova import Tova
from models.cache.eviction.window import Window
from models.carried_state import name_stateful_modules
from models.init import initialise
from models.masks.algebra import visible
from models.masks.basic import FirstTokens, SlidingWindow
from models.positions.alibi import Alibi
from models.positions.learned import Learned
from models.positions.rope import Rope
from models.positions.yarn import Yarn
from models.recurrent.linear import LinearAttention
from models.span import Span
from tests.support.pieces import addresses, cut, piece_span, put, taken

WIDTH, HEADS, GROUPS = 24, 6, 3
ROOMY = {
    "h2o": lambda: H2O(99),
    "snapkv": lambda: SnapKV(99, 4),
    "tova": lambda: Tova(99),
    "window": lambda: Window(99),
    "streaming": lambda: Streaming(99),
}
TIGHT = {
    "h2o": lambda: H2O(6, 2),
    "snapkv": lambda: SnapKV(6, 2, 3),
    "tova": lambda: Tova(6),
    "window": lambda: Window(6),
    "streaming": lambda: Streaming(6, 2),
}
MIXERS = {
    "full": lambda: Attention(WIDTH, HEADS, GROUPS, Rope()),
    "alibi": lambda: Attention(WIDTH, HEADS, GROUPS, Alibi()),
    "latent": lambda: LatentAttention(WIDTH, HEADS, Rope()),
    "sink_logit": lambda: SinkLogit(WIDTH, HEADS, GROUPS, Rope()),
}
STEPS = ((1,), (1,), (1,))


def made(mixer):
    model = initialise(mixer, seed=1).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # so large that weights differ between tokens
            parameter.mul_(8)
    name_stateful_modules(model)
    return model


def decoded(model, x, span, factory, first=None):
    factory.prepare(model)
    state = DecodingState(factory)
    y = torch.full_like(x, torch.nan)
    for index in cut(span) if first is None else cut(span, first):
        part = model(taken(x, index, torch.nan), state.attach(piece_span(span, index)))
        state.advance()
        put(y, index, part)
    return y, state


def error(y, truth, span):
    valid = span.valid()
    return float((y[valid] - truth[valid]).abs().max() / truth[valid].abs().max())


# The other pairs are refused, which a test below shows.
FITTING = [
    (mixer, name)
    for mixer in MIXERS
    for name in ROOMY
    if not ROOMY[name]().misfits(made(MIXERS[mixer]()))
]


def test_every_cache_and_every_mixer_is_among_those_that_fit():
    assert {mixer for mixer, _ in FITTING} == set(MIXERS)
    assert {name for _, name in FITTING} == set(ROOMY)


@pytest.mark.parametrize("mixer, name", FITTING)
@torch.no_grad()
def test_a_cache_with_room_for_all_is_exact(name, mixer):
    model = made(MIXERS[mixer]())
    factory = ROOMY[name]()
    span = addresses()
    x = torch.randn(*span.shape, WIDTH, dtype=torch.float64)
    y, _ = decoded(model, x, span, factory)
    assert error(y, model(x, span), span) < 1e-12


@pytest.mark.parametrize(
    ("factory", "mask"),
    [
        (Window(5), SlidingWindow(5)),
        (Streaming(7, 2, "text"), SlidingWindow(5) | FirstTokens(2)),
    ],
)
@torch.no_grad()
def test_steps_equal_the_mask_that_shows_the_same_tokens(factory, mask):
    trained = made(Attention(WIDTH, HEADS, GROUPS, Rope()))
    masked = Attention(WIDTH, HEADS, GROUPS, Rope(), mask=CAUSAL & mask).double()
    masked.load_state_dict(trained.state_dict())
    span = Span.line(2, 20)
    x = torch.randn(2, 20, WIDTH, dtype=torch.float64)
    y, state = decoded(trained, x, span, factory, STEPS)
    assert error(y, masked(x, span), span) < 1e-12
    assert state.counters()["evicted"] == 2 * (20 - factory.budget)


@pytest.mark.parametrize("position", [Rope(), Yarn(4.0, 64)])
@torch.no_grad()
def test_streaming_gives_tokens_their_places_in_the_cache(position):
    """The paper's form: keys without positions, rotated at each read to 0, 1, 2, ..."""
    budget, sinks, tokens = 7, 2, 30
    model = made(Attention(WIDTH, HEADS, GROUPS, position))
    x = torch.randn(1, tokens, WIDTH, dtype=torch.float64)
    y, _ = decoded(model, x, Span.line(1, tokens), Streaming(budget, sinks), STEPS)
    for token in range(tokens):
        held = sorted({*range(min(sinks, token + 1)), *range(token + 1)[-(budget - sinks) :]})
        if token < budget:
            held = list(range(token + 1))
        place = Span.line(1, len(held))
        key, value = model.project_payload(x[:, held])
        query = model.project_query(x[:, token : token + 1])
        last = Span.of(place.pos[:, -1:], place.doc[:, -1:])
        scores = attention_scores(position.rotate(query, last), position.rotate(key, place))
        weights = attention_weights(scaled_scores(scores, key.shape[-1]))
        mean = torch.einsum("bhts,bshe->bthe", weights, value.repeat_interleave(2, 2))
        expected = model.out(mean.flatten(-2))
        assert torch.allclose(y[:, token : token + 1], expected, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_h2o_counts_the_weights_of_attention():
    model = made(Attention(WIDTH, HEADS, GROUPS, Rope()))
    span = addresses(((30,), (17,)))
    x = torch.randn(*span.shape, WIDTH, dtype=torch.float64)
    _, state = decoded(model, x, span, H2O(99), ((13, 5), (7, 6)))
    query = model.position.rotate(model.project_query(x), span)
    key, _ = model.project_payload(x)
    scores = scaled_scores(attention_scores(query, model.position.rotate(key, span)), 4)
    seen = visible(CAUSAL, span, span)
    logits = scores.masked_fill(~seen, -torch.inf)
    # padding sees nothing, and is no query
    weights = attention_weights(logits) * span.valid()[:, None, :, None]
    expected = weights.sum(2).unflatten(1, (GROUPS, -1)).sum(2).flatten(0, 1)
    (cache,) = state.caches.values()
    assert torch.allclose(cache.scores, expected, atol=1e-12)


@pytest.mark.parametrize("name", TIGHT)
@torch.no_grad()
def test_rows_can_be_picked_joined_and_carried_elsewhere(name):
    """Two halves of a batch, decoded apart, joined, exported and imported on the way."""
    model = made(Attention(WIDTH, HEADS, GROUPS, Rope()))
    span = addresses(((30,), (17,), (22,)))
    x = torch.randn(*span.shape, WIDTH, dtype=torch.float64)
    first = ((9, 3), (12, 2), (4, 4))
    truth, whole = decoded(model, x, span, TIGHT[name](), first)
    factory = TIGHT[name]()
    factory.prepare(model)
    parts = [(DecodingState(factory), [2, 0]), (DecodingState(factory), [1])]
    y = torch.full_like(x, torch.nan)
    for number, index in enumerate(cut(span, first)):
        if number == 3:
            (state, above), (other, below) = parts
            state.join(other)
            moved = DecodingState(factory)
            moved.import_state(state.export_state())
            # rows 2, 0, 1 of the text come into their order
            assert above + below == [2, 0, 1]
            moved.select(torch.tensor([1, 2, 0]))
            parts = [(moved, [0, 1, 2])]
        for state, rows in parts:
            piece = index[rows]
            x_piece = taken(x[rows], piece, torch.nan)
            part = model(x_piece, state.attach(piece_span(_rows(span, rows), piece)))
            state.advance()
            here = y[rows]
            put(here, piece, part)
            y[rows] = here
    assert error(y, truth, span) < 1e-12
    assert parts[0][0].bytes() == whole.bytes()


def _rows(span, rows):
    return span.map(lambda tensor: tensor[rows])


class Two(nn.Module):
    """A decoder's outline: positions in the embeddings, and a layer."""

    def __init__(self, mixer, position=None):
        super().__init__()
        self.position = position
        self.mixer = mixer


@pytest.mark.parametrize(
    ("factory", "model", "words"),
    [
        (H2O(8), Two(LinearAttention(WIDTH, HEADS)), "no layer of this model holds any"),
        (Window(8), Two(LinearAttention(WIDTH, HEADS)), "state of constant size"),
        (H2O(8), Two(MIXERS["latent"]()), "mixer.mix holds latents"),
        (SnapKV(8, 2), Two(MIXERS["alibi"]()), "adds to its logits what differs between heads"),
        (H2O(8), Two(MIXERS["sink_logit"]()), "adds to its logits what differs between heads"),
        (H2O(8), Two(Differential(WIDTH, HEADS, HEADS, Rope(), layer=1)), "share"),
        (
            Streaming(8),
            Two(MIXERS["full"](), Learned(64).embedding(WIDTH)),
            "PositionTable adds positions to the embeddings",
        ),
    ],
)
def test_combinations_without_meaning_are_refused_by_name(factory, model, words):
    (sentence,) = factory.misfits(model)
    assert words in sentence and "; use " in sentence


def test_what_does_not_choose_by_head_takes_latents_and_biases():
    for mixer in MIXERS.values():
        model = Two(mixer())
        for factory in (Tova(8), Window(8), Streaming(8)):
            assert not factory.misfits(model)
    assert not Streaming(8, positions="text").misfits(
        Two(MIXERS["full"](), Learned(64).embedding(WIDTH))
    )
    assert not Contiguous().misfits(Two(LinearAttention(WIDTH, HEADS)))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: H2O(0), "cache.budget=0"),
        (lambda: H2O(8, 9), "cache.recent=9 is a part of cache.budget=8"),
        (lambda: SnapKV(8, 8), "cache.window=8 is a part of cache.budget=8"),
        (lambda: SnapKV(8, 2, 4), "cache.kernel=4"),
        (lambda: SnapKV(8, 2, 3, "median"), "cache.pooling=median is unknown"),
        (lambda: Streaming(4, 4), "cache.sinks=4 is a part of cache.budget=4"),
        (lambda: Streaming(4, 1, "row"), "cache.positions=row is unknown"),
    ],
)
def test_settings_without_meaning_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()

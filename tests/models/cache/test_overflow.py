"""Each policy cuts what it says; a shift gives keys the values of their new places."""

import pytest
import torch
from torch import nn

from models.attention.full import Attention
from models.attention.latent import LatentAttention
from models.attention.sliding import Sliding
from models.cache.contiguous import Contiguous
from models.cache.decoding_state import DecodingState
from models.cache.eviction.window import Window
from models.cache.overflow import POLICIES, ContextFull, Cut, Shift, TruncateMiddle, policy_of
from models.cache.quantized import QuantizedKV
from models.cache.shifting import cannot_shift, shift
from models.cache.turning import turns
from models.carried_state import name_stateful_modules
from models.convolution.short_conv import ShortConv
from models.init import initialise
from models.micro_batch import MicroBatch
from models.positions.alibi import Alibi
from models.positions.learned import Learned
from models.positions.none import NoPosition
from models.positions.rope import Rope
from models.positions.yarn import Yarn
from models.recurrent.linear import LinearAttention
from models.span import Span
from tests.models.cache.eviction.test_eviction_in_models import Two

WIDTH, HEADS, GROUPS, VOCABULARY = 24, 6, 3, 11
TEXT = list(range(100, 120))


def test_a_prompt_that_fits_is_read_whole_under_every_policy():
    for name in POLICIES:
        assert policy_of(name).prompt(TEXT, 40, 20) == TEXT


@pytest.mark.parametrize("name", ["raise", "stop"])
def test_a_prompt_that_is_too_long_is_an_error(name):
    assert policy_of(name).prompt(TEXT, 21, 5) == TEXT
    with pytest.raises(ContextFull, match=f"overflow={name}: the prompt has 20 tokens, and a"):
        policy_of(name).prompt(TEXT, 20, 5)


def test_a_prompt_that_is_too_long_is_cut_and_leaves_room_for_its_answer():
    assert policy_of("truncate_start").prompt(TEXT, 15, 5) == TEXT[-10:]
    # but for no more than half of the context
    assert policy_of("truncate_start").prompt(TEXT, 12, 50) == TEXT[-6:]
    for name in ("truncate_middle", "shift", "recompute"):
        assert policy_of(name, 3).prompt(TEXT, 15, 5) == TEXT[:3] + TEXT[-7:]
        assert policy_of(name, 30).prompt(TEXT, 40, 50) == TEXT


def test_what_happens_at_the_limit():
    with pytest.raises(ContextFull, match="overflow=raise: the text has reached the limit of 16"):
        policy_of("raise").full(16)
    for name in ("stop", "truncate_start", "truncate_middle"):
        assert policy_of(name).full(16) is None
    assert policy_of("shift", 4).full(16) == Cut(4, 10, recompute=False)
    assert policy_of("recompute", 4).full(17) == Cut(4, 10, recompute=True)
    assert Cut(4, 10, True).of(TEXT[:16]) == TEXT[:4] + TEXT[10:16]


def test_settings_without_meaning_are_refused():
    with pytest.raises(ValueError, match="overflow=slide is unknown; use raise, stop"):
        policy_of("slide")
    with pytest.raises(ValueError, match="n_keep=3: overflow=stop keeps no first tokens"):
        policy_of("stop", 3)
    with pytest.raises(ValueError, match=r"overflow\.n_keep=-1"):
        Shift(-1)
    with pytest.raises(ValueError, match=r"overflow\.n_keep=8 leaves no token .*; use 7 or less"):
        Shift(8).full(9)
    with pytest.raises(ValueError, match=r"overflow\.n_keep=8"):
        TruncateMiddle(8).prompt(TEXT, 9, 1)


class Small(nn.Module):
    """Tokens [B, T] -> logits [B, T, V], through two mixers."""

    def __init__(self, mixer):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.first = mixer()
        self.second = mixer()
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, batch):
        tokens, span, *_ = batch
        hidden = self.embed(tokens)
        hidden = hidden + self.first(hidden, span)
        return self.head(hidden + self.second(hidden, span))


def small(mixer, dtype=torch.float64):
    model = initialise(Small(mixer), seed=3).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(6)
    name_stateful_modules(model)
    return model


MIXERS = {
    "rope": lambda: Attention(WIDTH, HEADS, GROUPS, Rope()),
    "yarn": lambda: Attention(WIDTH, HEADS, GROUPS, Yarn(4.0, 64)),
    "alibi": lambda: Attention(WIDTH, HEADS, GROUPS, Alibi()),
    "none": lambda: Attention(WIDTH, HEADS, GROUPS, NoPosition()),
    "latent": lambda: LatentAttention(WIDTH, HEADS, Rope()),
    "sliding": lambda: Sliding(WIDTH, HEADS, GROUPS, Rope(), window=5),
}


@pytest.mark.every_case
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize("name", MIXERS)
@torch.no_grad()
def test_shifted_keys_equal_keys_computed_at_their_new_places(name, dtype, tolerance):
    """Of a single layer, whose keys depend on their own token alone; rows of uneven length."""
    model = initialise(MIXERS[name](), seed=1).to(dtype)
    holder = Two(model)
    name_stateful_modules(holder)
    lengths = (14, 9, 11)
    pos = torch.arange(14).expand(3, 14)
    doc = torch.where(pos < torch.tensor(lengths)[:, None], 0, -1)
    x = torch.randn(3, 14, WIDTH, dtype=dtype)
    state = DecodingState(Contiguous(block=4))
    model(x, state.attach(Span.of(pos, doc)))
    state.advance()
    start = torch.tensor([2, 3, 0])
    stop = torch.tensor([7, 5, 0])
    for _ in range(2):
        shift(state, start, stop, turns(holder))
        stop = torch.where(stop > start, start + 1, stop)
    (cache,) = state.caches.values()
    payload, span = cache.read()
    dropped = ([2, 3, 4, 5, 6, 7], [3, 4, 5], [])
    for row, length in enumerate(lengths):
        stays = [token for token in range(length) if token not in dropped[row]]
        valid = span.valid()[row]
        assert span.pos[row][valid].tolist() == list(range(len(stays)))
        fresh = model.payload(x[row : row + 1, stays], Span.line(1, len(stays)))
        for held, expected in zip(payload, fresh, strict=True):
            assert torch.allclose(held[row][valid], expected[0], rtol=0, atol=tolerance)


def generate(model, policy, limit, prompt, count):
    """Greedy text of one row; returns (tokens, slots of the cache at each step, logits)."""
    text = policy.prompt(prompt, limit, count)
    state = DecodingState(Contiguous(block=1))
    made = []
    slots = []

    def feed(tokens, begin):
        pos = torch.arange(begin, begin + len(tokens))[None]
        span = Span.of(pos, torch.zeros_like(pos))
        logits = model(MicroBatch(torch.tensor([tokens]), state.attach(span)))
        state.advance()
        return logits[0, -1]

    logits = feed(text, 0)
    while len(made) < count:
        assert logits.isfinite().all()
        token = int(logits.argmax())
        if len(text) == limit:
            cut = policy.full(limit)
            if cut is None:
                break
            text = cut.of(text)
            if cut.recompute:
                state = DecodingState(Contiguous(block=1))
                feed(text, 0)
            else:
                shift(state, torch.tensor([cut.start]), torch.tensor([cut.stop]), turns(model))
        made.append(token)
        text.append(token)
        logits = feed([token], len(text) - 1)
        slots.append(state.slots["first.mix#0"].read().shape[1])
    return made, slots, text, logits


@torch.no_grad()
def test_a_state_that_was_imported_is_shifted_as_it_was_before():
    model = small(MIXERS["rope"])
    start = torch.tensor([2, 0])
    stop = torch.tensor([6, 0])
    tokens = torch.arange(18).view(2, 9) % VOCABULARY
    logits = []
    for imports in (False, True):
        state = DecodingState(Contiguous(block=4))
        model(MicroBatch(tokens, state.attach(Span.line(2, 9))))
        state.advance()
        if imports:
            exported = state.export_state()
            state = DecodingState(Contiguous(block=4))
            state.import_state(exported)
        shift(state, start, stop, turns(model))
        pos = 9 - (stop - start)[:, None]
        span = Span.of(pos, torch.zeros_like(pos))
        logits.append(model(MicroBatch(tokens[:, :1], state.attach(span))))
    assert torch.equal(*logits)
    # Dropping nothing gives other logits.
    state = DecodingState(Contiguous(block=4))
    model(MicroBatch(tokens, state.attach(Span.line(2, 9))))
    state.advance()
    plain = model(MicroBatch(tokens[:, :1], state.attach(span)))
    assert (plain - logits[0])[0].abs().max() > 1e-3


@pytest.mark.parametrize("name", ["rope", "alibi", "latent"])
@pytest.mark.parametrize("policy", ["shift", "recompute"])
@torch.no_grad()
def test_ten_times_the_context_without_growth(name, policy):
    model = small(MIXERS[name], torch.float32)
    limit = 16
    made, slots, text, logits = generate(model, policy_of(policy, 2), limit, [1, 2, 3], 160)
    assert len(made) == 160
    assert max(slots) == limit
    assert text[:2] == [1, 2]
    if policy == "recompute":
        # the last state is that of a fresh text
        fresh = model(MicroBatch(torch.tensor([text]), Span.line(1, len(text))))[0, -1]
        assert torch.allclose(logits, fresh, atol=1e-4)


@torch.no_grad()
def test_stop_stops_exactly_at_the_limit():
    made, _, text, _ = generate(small(MIXERS["rope"]), policy_of("stop"), 16, [1, 2, 3], 160)
    assert len(text) == 16 and len(made) == 13


@torch.no_grad()
def test_a_single_layer_cannot_tell_a_shift_from_a_fresh_text():
    """Values of one layer depend on their own token alone, so there shift is exact."""
    model = small(MIXERS["rope"])
    model.second = nn.Identity()
    model.second.forward = lambda hidden, span: 0 * hidden
    shifted = generate(model, policy_of("shift", 2), 12, [1, 2, 3], 60)
    exact = generate(model, policy_of("recompute", 2), 12, [1, 2, 3], 60)
    assert shifted[0] == exact[0]


@pytest.mark.parametrize(
    ("model", "factory", "words"),
    [
        (MIXERS["rope"], QuantizedKV(), "QuantizedKV does not hold all of them"),
        (MIXERS["rope"], Window(8), "Window does not hold all of them"),
        (lambda: LinearAttention(WIDTH, HEADS), Contiguous(), "holds a state from which no token"),
    ],
)
def test_shift_without_meaning_is_refused_by_name(model, factory, words):
    sentences = cannot_shift(Two(model()), factory)
    assert words in sentences[0] and "; use " in sentences[0]


def test_positions_in_embeddings_cannot_be_shifted():
    model = Two(MIXERS["none"](), Learned(64).embedding(WIDTH))
    (sentence,) = cannot_shift(model, Contiguous())
    assert "PositionTable adds positions to the embeddings" in sentence
    for mixer in MIXERS.values():
        assert not cannot_shift(Two(mixer()), Contiguous())
    assert not cannot_shift(Two(ShortConv(WIDTH)), Contiguous())

"""Transformer-XL's recurrence on one device: against the paper's equations, and segment by segment
against the whole."""

import pytest
import torch
from torch import Tensor, nn

from models.attention.compressed import Compressed
from models.attention.full import Attention
from models.attention.lsh import LSHAttention
from models.carried_state import CarriedState
from models.convolution.hyena import Hyena
from models.masks.segments import SegmentRecurrence
from models.memory.segments import SegmentMemory
from models.positions.learned import Learned
from models.positions.relative import Relative
from models.positions.rope import Rope
from models.recurrent.retention import Retention
from tests.support.knn_rows import Stack, build, lanes
from tests.variants import HEADS, WIDTH

LENGTHS = [[20, 1, 16, 50], [37, 50]]
TOKENS = 45
CUTS = {
    "anywhere": [8, 9, 22, 30],
    "at the ends of documents": [20, 21, 37],
    "at the ends of segments": [10, 15, 40],
}
RECALLING = [
    "full",
    "multi_head",
    "multi_query",
    "relative",
    "alibi",
    "t5",
    "no_position",
    "sliding",
    "chunked",
    "sinks",
    "sink_logit",
    "softcap",
    "qk_norm",
    "gated",
    "latent",
    "differential",
    "longformer",
    "bigbird",
    "yarn",
]


def content(rows: int = 2, tokens: int = TOKENS) -> Tensor:
    return torch.randn(
        rows, tokens, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64
    )


def pieces(
    model: nn.Module, x: Tensor, lengths: list[list[int]], cuts: list[int], past: CarriedState
) -> Tensor:
    """Read row by row."""
    edges, out = [0, *cuts, x.shape[1]], []
    for start, stop in zip(edges[:-1], edges[1:]):
        out.append(model(x[:, start:stop], past.attach(lanes(lengths, start, stop))))
        past.advance()
    return torch.cat(out, 1)


def apart(a: Tensor, b: Tensor) -> float:
    return float(((a - b).abs().max() / b.abs().max()).detach())


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("name", RECALLING)
def test_rows_with_their_past_give_what_the_whole_gives_wherever_they_are_cut(name, cuts):
    for length, segment in ((7, 5), (1, 3), (60, 4)):
        model, x = build(name, SegmentMemory(length, segment)), content()
        want = model(x, lanes(LENGTHS, 0, TOKENS))
        assert apart(pieces(model, x, LENGTHS, CUTS[cuts], CarriedState()), want) < 1e-12


@pytest.mark.parametrize("name", ["full", "relative", "alibi", "chunked", "latent", "differential"])
def test_a_memory_that_reaches_to_the_start_of_the_document_is_full_attention(name):
    x = content()
    want = build(name, SegmentMemory(1, 1))
    for block in want.blocks:  # undo: plain attention over the whole row
        block.mixer.recall = None
        block.mixer.mix.mask = block.mixer.mix.mask.a
    got = pieces(build(name, SegmentMemory(TOKENS)), x, LENGTHS, CUTS["anywhere"], CarriedState())
    assert apart(got, want(x, lanes(LENGTHS, 0, TOKENS))) < 1e-12


class Attached(CarriedState):
    """Keeps the gradient of what it keeps, on one device: what the recurrence would be without its
    stop."""

    def tokens(self, name, x, length):
        kept, kv_span = super().tokens(name, x, length)
        self._tokens[name] = x, length
        return kept, kv_span

    def advance(self):
        kept = {
            n: torch.cat([self._kept(n, x, m), x], 1)[:, x.shape[1] :]
            for n, (x, m) in self._tokens.items()
        }
        super().advance()
        self.kept = {n: (self.kept[n][0], x) for n, x in kept.items()}


def gradients(model: nn.Module, x: Tensor, out: Tensor) -> list[Tensor]:
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(4), dtype=out.dtype)
    return list(torch.autograd.grad((out * weight).sum(), [x, *model.parameters()]))


@pytest.mark.parametrize("name", ["full", "relative", "latent", "differential"])
def test_without_the_stop_all_gradients_are_those_of_the_whole(name):
    x, model = content().requires_grad_(), build(name, SegmentMemory(TOKENS))
    want = gradients(model, x, model(x, lanes(LENGTHS, 0, TOKENS)))
    got = gradients(model, x, pieces(model, x, LENGTHS, CUTS["anywhere"], Attached()))
    assert max(apart(a, b) for a, b in zip(got, want, strict=True)) < 1e-11


@pytest.mark.parametrize("name", ["full", "relative", "latent", "differential", "longformer"])
def test_rows_cut_between_segments_have_the_gradients_of_the_whole(name):
    """Where a row ends with a segment, the stop between segments is the stop between rows."""
    x, model, lengths = (
        content().requires_grad_(),
        build(name, SegmentMemory(7, 5)),
        [[20, 10, 50], [50]],
    )
    want = gradients(model, x, model(x, lanes(lengths, 0, TOKENS)))
    got = gradients(model, x, pieces(model, x, lengths, [5, 20, 25], CarriedState()))
    assert max(apart(a, b) for a, b in zip(got, want, strict=True)) < 1e-11


def test_nothing_is_learned_through_what_is_recalled_but_it_is_seen():
    model, x = build("relative", SegmentMemory(4, 4)), content().requires_grad_()
    out = model(x, lanes([[TOKENS]] * 2, 0, TOKENS))
    (grad,) = torch.autograd.grad(out[:, 8:12].square().sum(), x)
    assert (grad[:, :8] == 0).all() and (grad[:, 8:12] != 0).any(-1).all()
    other = torch.cat([x[:, :6] + 1, x[:, 6:]], 1)
    changed = (model(other, lanes([[TOKENS]] * 2, 0, TOKENS)) != out).any(-1)
    assert changed[:, 8:12].all() and not changed[:, 16:].any()  # two layers see two segments back


def by_distance(
    layer: Attention, tables: tuple[Tensor, ...], norm: nn.Module, kept: Tensor, x: Tensor
) -> Tensor:
    """The paper's equations, head by head, query by query, key by key; kept [M, W], x [T, W], one
    document."""
    u, v, by = tables
    seen, width, out = norm(torch.cat([kept.detach(), x])), layer.head_width, []
    q, k, value = (
        project(seen).unflatten(-1, (-1, width)) for project in (layer.q, layer.k, layer.v)
    )
    share = q.shape[1] // k.shape[1]
    for i in range(len(kept), len(seen)):
        for head in range(q.shape[1]):
            scores = []
            for j in range(i + 1):
                pair = torch.arange(-(-by.shape[2] // 2), dtype=x.dtype)
                angle = (i - j) * 10_000.0 ** (-2 * pair / by.shape[2])
                wave = torch.cat([angle.sin(), angle.cos()])[: by.shape[2]]
                content = (q[i, head] + u[head]) @ k[j, head // share]
                place = (q[i, head] + v[head]) @ (by[head] @ wave)
                scores.append((content + place) / width**0.5)
            out.append(torch.stack(scores).softmax(0) @ value[: i + 1, head // share])
    return layer.out(torch.stack(out).unflatten(0, (len(x), -1)).flatten(1))


def shifted(
    layer: Attention, tables: tuple[Tensor, ...], norm: nn.Module, kept: Tensor, x: Tensor
) -> Tensor:
    """As the authors' code computes it: a matrix over distances, falling, each row of it shifted
    against the one before."""
    u, v, by = tables
    seen, width = norm(torch.cat([kept.detach(), x])), layer.head_width
    q, k, value = (
        project(seen).unflatten(-1, (-1, width)) for project in (layer.q, layer.k, layer.v)
    )
    q, k, value = (
        q[len(kept) :],
        *(t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, value)),
    )
    fall = torch.arange(len(seen) - 1, -1, -1.0, dtype=x.dtype)
    angle = torch.outer(
        fall, 1 / 10_000 ** (torch.arange(0.0, by.shape[2], 2, dtype=x.dtype) / by.shape[2])
    )
    r = torch.einsum("jw,hdw->jhd", torch.cat([angle.sin(), angle.cos()], -1), by)
    there = torch.einsum("ihd,jhd->hij", q + v, r)
    padded = nn.functional.pad(there, (1, 0)).view(
        there.shape[0], there.shape[2] + 1, there.shape[1]
    )
    scores = (torch.einsum("ihd,jhd->hij", q + u, k) + padded[:, 1:].view_as(there)) / width**0.5
    hidden = torch.ones(len(x), len(seen), dtype=torch.bool).triu(1 + len(kept))
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return layer.out(torch.einsum("hij,jhd->ihd", weights, value).flatten(1))


@pytest.mark.parametrize("equations", [by_distance, shifted])
def test_it_is_what_the_paper_computes_gradients_of_all_weights_included(equations):
    length, rows, x = 6, [9, 5, 8], content(1, 22)
    model = build("relative", SegmentMemory(length))
    for block in model.blocks:
        block.mixer.mix.score.clamp = None
    layer, norm = model.blocks[0].mixer, model.blocks[0].mixer_norm
    with torch.no_grad():
        for weight, middle in ((layer.tables.u, 0), (layer.tables.v, 0), (norm.weight, 1)):
            weight.normal_(middle, 0.5)
    parameters, past, start, kept = [norm.weight, *layer.parameters()], CarriedState(), 0, x[0, :0]
    for size in rows:
        row = x[:, start : start + size].clone().requires_grad_()
        got = layer(row, past.attach(lanes([[22]], start, start + size)), norm)
        past.advance()
        want = equations(layer, layer.tables(), norm, kept, row[0])
        assert apart(got[0], want) < 1e-13
        weight = torch.randn(
            want.shape, generator=torch.Generator().manual_seed(1), dtype=want.dtype
        )
        grads = (
            torch.autograd.grad((out * weight).sum(), [row, *parameters]) for out in (got[0], want)
        )
        assert max(apart(a, b) for a, b in zip(*grads, strict=True)) < 1e-12
        start += size
        kept = x[0, max(0, start - length) : start]


def test_names_and_initial_weights_are_those_without_memory():
    with_memory, without = build("relative", SegmentMemory(5, 3)), Stack([])
    without = build("relative", NoMemory())
    assert list(with_memory.state_dict()) == list(without.state_dict())
    for a, b in zip(with_memory.parameters(), without.parameters(), strict=True):
        assert torch.equal(a, b)


class NoMemory(SegmentMemory):
    """Leaves mixers as they are."""

    def __init__(self):
        super().__init__(1)

    def around(self, mixer, **sizes):
        return mixer


def test_a_row_without_a_past_is_a_first_row():
    for segment in (None, 5):
        model, x = build("relative", SegmentMemory(7, segment)), content()
        first = model(x, CarriedState().attach(lanes(LENGTHS, 0, TOKENS)))
        assert apart(model(x, lanes(LENGTHS, 0, TOKENS)), first) < 1e-13


def test_a_layer_keeps_no_more_than_it_may_need():
    past = CarriedState()
    model, x = build("full", SegmentMemory(7, 5)), content()
    model(x, past.attach(lanes(LENGTHS, 0, TOKENS)))
    past.advance()
    assert {name: kept.shape for name, (_, kept) in past.kept.items()} == {
        f"blocks.{i}.mixer.recall": (2, 11, WIDTH) for i in range(2)
    }
    assert past.bytes() == 2 * 2 * 11 * WIDTH * 8


@pytest.mark.parametrize(
    ("memory", "mixer", "reason"),
    [
        (
            SegmentMemory(4),
            lambda: LSHAttention(WIDTH, HEADS, Rope(), 0, 1, 64),
            "lsh numbers the tokens",
        ),
        (
            SegmentMemory(4),
            lambda: Compressed(WIDTH, HEADS, Rope(), rope_dim=2, index_channels=4),
            "compressed attention chooses",
        ),
        (SegmentMemory(4), lambda: Hyena(WIDTH, 64), "Hyena takes documents of 64 tokens"),
        (
            SegmentMemory(4),
            lambda: Attention(WIDTH, HEADS, 3, Learned(64)),
            "this position has 64 of them",
        ),
        (SegmentMemory(0), lambda: Attention(WIDTH, HEADS, 3, Relative()), "nothing to recall"),
    ],
)
def test_what_has_no_exact_form_is_refused_with_a_way_out(memory, mixer, reason):
    with pytest.raises(ValueError, match=f"{reason}.*use "):
        memory.around(mixer())


def test_settings_that_no_layer_takes_are_refused():
    memory = SegmentMemory(4, 2)
    memory.around(Retention(WIDTH, HEADS))
    with pytest.raises(ValueError, match="no layer is attention"):
        memory.stack(WIDTH)
    SegmentMemory(0).stack(WIDTH)
    for wrong in (lambda: SegmentMemory(-1), lambda: SegmentMemory(3, 0)):
        with pytest.raises(ValueError, match="is a number of tokens"):
            wrong()


def test_a_mixer_is_told_of_segments_by_its_mask():
    mixer = Attention(WIDTH, HEADS, 3, Rope())
    own = mixer.mix.mask
    assert SegmentMemory(4, 2).around(mixer) is mixer and mixer.mix.mask == own & SegmentRecurrence(
        2, 4
    )

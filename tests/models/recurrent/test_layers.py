"""What layers of the recurrent family promise beside parity (tests/variants.py): causality,
documents, meta, own formulas."""

import math

import pytest
import torch
from torch.nn import functional as F

from models.init import initialise
from models.primitives.scan import Scan
from models.recurrent.linear import LinearAttention
from models.recurrent.performer import ROOM, Performer, directions
from models.recurrent.retention import Retention
from models.recurrent.rwkv7 import Rwkv7
from models.span import Span
from tests.support.parity import build, packed, relative
from tests.variants import VARIANTS, WIDTH

LINEAR = [
    "linear",
    "performer",
    "retention",
    "gated_linear",
    "mamba2",
    "delta",
    "gated_delta",
    "rwkv6",
    "rwkv7",
    "rwkv7_stacked",
]
FAMILY = [*LINEAR, "short_conv", "hyena"]


@pytest.mark.parametrize("name", FAMILY)
def test_no_token_hears_the_future_or_another_document(name):
    layer, span = build(name), packed()
    x = torch.randn(*span.shape, WIDTH, dtype=torch.float64, requires_grad=True)
    y = layer(x, span)
    (d_x,) = torch.autograd.grad(y[0, 30].sum(), x)  # document 2 of row 0, tokens 14 to 37
    heard = (
        d_x[0].abs().sum(-1) > 1e-13 * d_x.abs().max()
    )  # an FFT rounds within a document, never beyond
    assert not d_x[0][:14].any()
    assert (
        heard[30]
        and heard[29]
        and not heard[:14].any()
        and not heard[31:].any()
        and not d_x[1].any()
    )
    if name != "short_conv":
        assert heard[14]


@pytest.mark.parametrize("name", FAMILY)
def test_a_document_does_not_care_what_lies_around_it(name):
    layer, span = build(name), packed()
    x = torch.randn(*span.shape, WIDTH, dtype=torch.float64)
    alone = layer(x[:1, 14:38], Span.line(1, 24))
    assert relative(layer(x, span)[:1, 14:38], alone) < 1e-12


@pytest.mark.parametrize("name", FAMILY)
def test_nan_in_other_documents_and_padding_changes_no_bit(name):
    layer, span = build(name), packed()
    x = torch.randn(*span.shape, WIDTH, dtype=torch.float64)
    mine = span.doc == 2
    bad = torch.where(mine[..., None], x, torch.nan)
    assert torch.equal(layer(bad, span)[mine], layer(x, span)[mine])


@pytest.mark.parametrize("name", FAMILY)
def test_a_layer_is_built_and_traced_on_meta_without_a_buffer_of_its_own(name):
    with torch.device("meta"):
        layer = VARIANTS[name]()
        out = layer(torch.empty(2, 40, WIDTH, requires_grad=True), Span.line(2, 40, "meta"))
        out.sum().backward()
    assert out.shape == (2, 40, WIDTH)
    assert all(p.is_meta for p in layer.parameters()) and not list(layer.buffers())


@pytest.mark.parametrize("name", FAMILY)
def test_bfloat16_is_near(name):
    span = packed()
    x = torch.randn(*span.shape, WIDTH, dtype=torch.float64)
    want, got = build(name)(x, span), build(name, torch.bfloat16)(x.bfloat16(), span)
    assert got.dtype == torch.bfloat16 and got.isfinite().all()
    assert relative(got.double()[span.valid()], want[span.valid()]) < 0.1


def test_linear_attention_is_the_weighted_mean_it_says():
    layer, span = initialise(LinearAttention(8, 2), 1).double(), Span.line(1, 9)
    x = torch.randn(1, 9, 8, dtype=torch.float64) * 30
    q, k, v = (p(x).unflatten(-1, (2, 4)) for p in (layer.q, layer.k, layer.v))
    weight = torch.einsum("bthd,bshd->bhts", F.elu(q) + 1, F.elu(k) + 1).tril()
    mean = torch.einsum("bhts,bshd->bthd", weight / weight.sum(-1, keepdim=True), v)
    assert relative(layer(x, span), layer.out(mean.flatten(-2))) < 1e-13


def test_retention_is_its_parallel_form():
    layer, span = initialise(Retention(16, 2), 1).double(), Span.line(1, 9)
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    q, k, v = (p(x).unflatten(-1, (2, -1)) for p in (layer.q, layer.k, layer.v))
    turn = 10_000.0 ** -(torch.arange(4).double() / 3)
    phase = torch.polar(torch.ones(9, 4).double(), torch.arange(9)[:, None] * turn)[:, None]
    q, k = (torch.view_as_complex(y.unflatten(-1, (4, 2)).contiguous()) * phase for y in (q, k))
    apart = torch.arange(9)[:, None] - torch.arange(9)
    gamma = torch.tensor([1 - 2**-5, 1 - 2**-6]).double()
    fade = torch.where(apart >= 0, gamma[:, None, None] ** apart.clamp_min(0), 0)
    y = torch.einsum("bthd,bshd,hts,bshe->bthe", q, k.conj(), fade.to(q.dtype), v.to(q.dtype)).real
    want = layer.out(layer.norm(y).flatten(-2) * F.silu(layer.gate(x)))
    assert relative(layer(x, span), want) < 1e-12


def test_random_features_are_orthogonal_long_as_normal_vectors_and_a_function_of_their_names():
    drawn = directions(1, 2, 3, 2, 16, 8)
    gram = drawn[0, :8] @ drawn[0, :8].T
    assert (gram - torch.diag(gram.diag())).abs().max() < 1e-12
    assert abs(directions(1, 2, 3, 4, 4096, 8).square().sum(-1).mean().item() - 8) < 0.2
    torch.manual_seed(99)
    assert torch.equal(drawn, directions.__wrapped__(1, 2, 3, 2, 16, 8))
    assert not any(
        torch.equal(drawn, directions(*names, 2, 16, 8))
        for names in ((2, 2, 3), (1, 3, 3), (1, 2, 4))
    )


def test_more_random_features_come_nearer_to_the_softmax():
    q, k, v = (torch.randn(1, 64, 2, 16, dtype=torch.float64) / 2 for _ in range(3))
    weight = (torch.einsum("bthd,bshd->bhts", q, k) / 4).exp().tril()
    want = torch.einsum("bhts,bshd->bthd", weight / weight.sum(-1, keepdim=True), v)
    errors = []
    for features in (16, 256, 4096):
        layer = Performer(32, 2, 1, 0, features=features)
        weight = torch.einsum(
            "bthm,bshm->bhts", layer.features(q, True), layer.features(k, False)
        ).tril()
        mean = torch.einsum("bhts,bshd->bthd", weight / weight.sum(-1, keepdim=True), v)
        errors.append(((mean - want).norm() / want.norm()).item())
    assert errors[0] > 1.5 * errors[1] > 2 * errors[2] and errors[2] < 0.15


def test_features_are_redrawn_at_the_step_that_says_so():
    layer = Performer(16, 2, 1, 0, redraw=10)
    draws = []
    for step in (1, 10, 11, 31):
        layer.on_step_begin(step)
        draws.append(layer.draw)
    assert draws == [0, 0, 1, 3]


def test_performer_does_not_overflow_whatever_the_keys_are():
    layer = initialise(Performer(256, 1, 1, 0, features=64), 1)
    drawn = directions(1, 0, 0, 1, 64, 256)
    worst = (drawn[0, :4] * 256**0.25).float()[
        None, :, None
    ]  # the keys that make a feature as large as it can be
    found = layer.features(worst, False)
    assert found.isfinite().all() and math.log(found.max()) < ROOM + 1


@pytest.mark.every_case
@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("most", [1, 2])
def test_rwkv7_is_the_published_recurrence(level, given, most):
    """Re-derived from the paper (arXiv:2503.14456, section 4), a token and a head at a time, values
    in rows."""
    layer, tokens, heads, size = (
        initialise(Rwkv7(16, 2, level, 3, rank=4, allow_neg_eigval=most == 2), 1).double(),
        11,
        2,
        8,
    )
    for parameter in layer.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    x, first = torch.randn(2, tokens, 16, dtype=torch.float64)
    look = dict(zip("rwkvag", layer.look))
    before = torch.cat([torch.zeros(1, 16).double(), x[:-1]])
    states, out, own = [torch.zeros(size, size).double() for _ in range(heads)], [], []
    for t in range(tokens):
        mixed = {name: x[t] + (before[t] - x[t]) * mu for name, mu in look.items()}
        r, k, v = layer.r(mixed["r"]), layer.k(mixed["k"]), layer.v(mixed["v"])
        own.append(v)
        if level and given:
            v = v + (first[t] - v) * torch.sigmoid(layer.pull.up(layer.pull.down(mixed["v"])))
        w = (
            -math.exp(-0.5)
            * torch.sigmoid(layer.decay.up(torch.tanh(layer.decay.down(mixed["w"]))))
        ).exp()
        a = torch.sigmoid(layer.rate.up(layer.rate.down(mixed["a"])))
        g = layer.gate.up(torch.sigmoid(layer.gate.down(mixed["g"])))
        removal, k = k * layer.direction, k * (1 + (a - 1) * layer.strength)
        rows, extra = [], []
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            kk = removal[part] / removal[part].norm()
            states[h] = (
                states[h] * w[part]
                - torch.outer(states[h] @ kk, most * kk * a[part])
                + torch.outer(v[part], k[part])
            )
            rows.append(states[h] @ r[part])
            extra.append((r[part] * k[part] * layer.bonus[h]).sum() * v[part])
        normed = F.group_norm(
            torch.cat(rows)[None], heads, layer.norm.weight, layer.norm.bias, size * 1e-5
        )[0]
        out.append(layer.out((normed + torch.cat(extra)) * g))
    got, passed = layer.values(x[None], Span.line(1, tokens), first[None] if given else None)
    assert relative(got[0], torch.stack(out)) < 1e-12
    assert relative(passed[0], first if given else torch.stack(own)) < 1e-12


def test_rwkv7_begins_as_its_public_trainer_has_it():
    lowest, top = (initialise(Rwkv7(64, 2, layer, 2, rank=8), 1) for layer in range(2))
    eye = torch.eye(64)
    assert ((lowest.r.weight @ lowest.r.weight.T) - eye).abs().max() < 1e-5
    assert ((top.k.weight @ top.k.weight.T) - 0.01 * eye).abs().max() < 1e-5
    assert lowest.pull is None and not top.pull.down.weight.any()
    assert [top.pull.up.bias[i].item() for i in (0, -1)] == pytest.approx([0.93, 0.53])
    assert [top.direction[i].item() for i in (0, -1)] == pytest.approx([0.76, 0.66])
    assert [top.rate.up.bias[i].item() for i in (0, -1)] == pytest.approx([-0.69, 0.31])
    assert [top.decay.up.bias[i].item() for i in (0, -1)] == pytest.approx([-8.0, 3.0])
    assert lowest.norm.weight[0].item() == pytest.approx(0.5**0.7) and top.norm.weight[0] == 1


def test_the_state_while_decoding_does_not_grow():
    query, key, value = (torch.randn(1, 40, 2, 4) for _ in range(3))
    decay = torch.full((1, 40, 2), -0.1)
    sizes, state = set(), None
    for t in range(40):
        now = Span.of(torch.tensor([[t]]), torch.tensor([[0]]))
        here = [y[:, t : t + 1] for y in (key, value, decay)]
        _, state = Scan().recur((query[:, t : t + 1],), here, span=now, state=state)
        sizes.add(state.numel())
    assert sizes == {2 * 4 * 4}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: LinearAttention(10, 3), "does not divide"),
        (lambda: Retention(6, 2), "even"),
        (lambda: Performer(8, 2, 0, 0, features=0), "features=0"),
        (lambda: Scan(chunk=12), "power of two"),
    ],
)
def test_wishes_that_cannot_be_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()

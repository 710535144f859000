"""Compressed sparse attention against loops, its indexer's loss, and what neither may do."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from models.attention.compressed import Compressed
from models.attention.compressed_blocks import rotate_last
from models.auxiliary import auxiliary_loss, on_step_begin
from models.init import initialise
from models.positions.alibi import Alibi
from models.positions.rope import Rope
from models.positions.yarn import Yarn
from models.primitives.block_topk import BlockEnds
from models.span import Span

SETTINGS = {
    "block": 3,
    "top": 2,
    "window": 4,
    "index_heads": 3,
    "index_channels": 6,
    "groups": 2,
    "rope_dim": 2,
}


def _layer(seed: int = 0, **settings) -> Compressed:
    layer = initialise(Compressed(16, 4, Rope(), **{**SETTINGS, **settings}), seed=seed).double()
    for parameter in (
        layer.parameters()
    ):  # larger than at the start of a run, so that choices and weights are decided
        parameter.data *= 8 if parameter.dim() > 1 else 1
    layer.sink.data += torch.arange(4) / 4
    layer.compressor.bias.data += torch.linspace(-1, 1, 3)[:, None]
    return layer


def _span() -> Span:
    pos = torch.cat(
        [torch.arange(17), torch.arange(1), torch.arange(8), torch.zeros(2, dtype=torch.long)]
    )
    doc = torch.cat(
        [torch.zeros(17), torch.ones(1), torch.full((8,), 2.0), torch.full((2,), -1.0)]
    ).long()
    return Span.of(pos[None], doc[None])


def _x(seed: int = 0) -> torch.Tensor:
    return torch.randn(
        1, 28, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def _summary(press, x, start: int, first: bool, position: Rope):
    """The summary of the block that begins at index `start`: an own computation, slot by slot."""
    each, slots = press.channels, []
    for i in range(start if first else start - press.block, start + press.block):
        own = i >= start
        cut = slice(each, None) if own else slice(None, each)
        place = (i - start) % press.block
        slots.append((press.value(x[i])[cut], press.gate(x[i])[cut] + press.bias[place, cut]))
    values, gates = (torch.stack(s) for s in zip(*slots))
    return press.norm((gates.softmax(0) * values).sum(0))


def _turned(vector, pos: int, position: Rope, turned: int = 2):
    span = Span.of(torch.tensor([[pos]]), torch.zeros(1, 1, dtype=torch.long))
    return rotate_last(vector.view(1, 1, 1, -1), span, position, turned).view(-1)


def _loop(layer: Compressed, x: torch.Tensor, span: Span, dense: bool = False):
    """(outputs [T, width], indexer losses [T]) one query and one head at a time."""
    x, pos, doc = x[0], span.pos[0].tolist(), span.doc[0].tolist()
    rope, each, press, index = (
        layer.position,
        layer.compressor.channels,
        layer.compressor,
        layer.indexer,
    )
    out, losses = torch.zeros_like(x), torch.zeros(len(pos), dtype=x.dtype)
    for t in range(len(pos)):
        if doc[t] < 0:
            continue
        opened = t - pos[t]
        squeezed = layer.norm_q(layer.squeeze_q(x[t]))
        q = layer.q(squeezed).view(4, each)
        q = [_turned(h * (h.square().mean() + 1e-6).rsqrt(), pos[t], rope) for h in q]
        window = [
            _turned(layer.norm(layer.kv(x[s])), pos[s], rope)
            for s in range(max(opened, t - 3), t + 1)
        ]
        blocks = range((pos[t] + 1) // 3)
        kept = [
            _turned(_summary(press, x, opened + 3 * b, b == 0, rope), 3 * b, rope) for b in blocks
        ]
        keys = [
            _turned(_summary(index.compressor, x, opened + 3 * b, b == 0, rope), 3 * b, rope)
            for b in blocks
        ]
        weight, iq = index.weight(x[t]) / 3**0.5, index.q(squeezed).view(3, 6)
        iq = [_turned(h, pos[t], rope) for h in iq]
        guess = [sum(w * (h @ k / 6**0.5).clamp_min(0) for w, h in zip(weight, iq)) for k in keys]
        order = sorted(blocks, key=lambda b, g=guess: -g[b].item())
        chosen = list(blocks) if dense else order[:2]
        heads, share = [], torch.zeros(len(chosen), dtype=x.dtype)
        for h in range(4):
            every = window + [kept[b] for b in chosen]
            logits = torch.stack([q[h] @ k / each**0.5 for k in every] + [layer.sink[h]])
            weights = logits.softmax(0)[:-1]
            heads.append(_turned(sum(w * k for w, k in zip(weights, every)), -pos[t], rope))
            share += weights[len(window) :]
        grouped = torch.stack(heads).view(2, -1)
        out[t] = layer.out(torch.einsum("gc,gdc->gd", grouped, layer.group).flatten())
        if chosen:
            target, log_guess = (
                share / share.sum(),
                torch.stack([guess[b] for b in chosen]).log_softmax(0),
            )
            losses[t] = (target.detach() * (target.detach().log() - log_guess)).sum()
    return out, losses


@pytest.mark.parametrize("dense", [False, True])
def test_it_is_what_the_loop_computes(dense):
    layer, span, x = _layer(dense_steps=1), _span(), _x()
    layer.on_step_begin(1 if dense else 2)
    got, loss = layer(x, span)[0], layer.auxiliary["indexer"][0]
    want, want_loss = _loop(layer, x, span, dense)
    valid = span.valid()[0]
    torch.testing.assert_close(got[valid], want[valid], rtol=0, atol=1e-12)
    torch.testing.assert_close(loss[valid], want_loss[valid], rtol=0, atol=1e-12)
    assert loss[valid].max() > 0.01 and not loss[~valid].any()
    names = [name for name, _ in layer.indexer.named_parameters()]
    grads, want_grads = (
        torch.autograd.grad(some.sum(), list(layer.indexer.parameters()))
        for some in (loss[valid], want_loss[valid])
    )
    for name, a, b in zip(names, grads, want_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11, msg=name)


def test_with_as_many_chosen_as_there_are_it_is_dense():
    x, span = _x(), _span()
    dense, sparse = _layer(dense_steps=1), _layer(top=10)
    dense.on_step_begin(1)
    torch.testing.assert_close(sparse(x, span), dense(x, span), rtol=0, atol=1e-13)
    assert (_layer(top=1)(x, span) - dense(x, span)).abs().max() > 1e-3


def test_attention_teaches_the_indexer_and_learns_nothing_from_it():
    layer, span, x = _layer(), _span(), _x().requires_grad_()
    layer(x, span).sum().backward(retain_graph=True)
    assert all(p.grad is None for p in layer.indexer.parameters())
    taught = {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}
    into = x.grad.clone()
    auxiliary_loss(layer)["indexer"].backward()
    assert all(
        p.grad is not None and p.grad.abs().max() > 0
        for p in layer.indexer.parameters()
        if p.dim() > 1
    )
    assert torch.equal(x.grad, into)
    assert all(torch.equal(layer.get_parameter(name).grad, grad) for name, grad in taught.items())


def test_the_indexer_learns_where_attention_looks():
    layer, span = _layer(dense_steps=200), Span.line(4, 48)
    x = torch.randn(4, 48, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    optimiser = torch.optim.Adam(layer.indexer.parameters(), lr=3e-2)
    losses = []
    for step in range(1, 61):
        on_step_begin(layer, step)
        layer(x, span)
        loss = auxiliary_loss(layer)["indexer"] / 192
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_losses_are_taken_once_and_only_where_there_are_gradients():
    layer = _layer()
    with torch.no_grad():
        layer(_x(), _span())
    assert auxiliary_loss(layer) == {}
    layer(_x(), _span())
    assert auxiliary_loss(layer)["indexer"] > 0
    assert auxiliary_loss(layer) == {}


def test_the_loss_survives_activation_checkpointing():
    def gradients(again: bool) -> list:
        layer, span, x = _layer(), _span(), _x()
        out = checkpoint(layer, x, span, use_reentrant=False) if again else layer(x, span)
        (out.square().sum() + auxiliary_loss(layer)["indexer"]).backward()
        return [p.grad for p in layer.parameters()]

    for a, b in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_nothing_later_and_no_other_document_is_seen():
    layer, span, x = _layer(), _span(), _x()
    before = layer(x, span)
    loss = auxiliary_loss(layer)
    for moved in (5, 16, 17, 20):
        y = x.clone()
        y[:, moved] += 3
        after = layer(y, span)
        # Others may be computed together with them: sums round otherwise.
        torch.testing.assert_close(after[:, :moved], before[:, :moved], rtol=0, atol=1e-14)
        others = span.doc[0] != span.doc[0, moved]
        torch.testing.assert_close(after[:, others], before[:, others], rtol=0, atol=1e-14)
    y = x.clone()
    y[:, :17] = torch.nan  # the first document
    after = layer(y, span)
    torch.testing.assert_close(after[:, 17:26], before[:, 17:26], rtol=0, atol=1e-14)
    assert loss


def test_a_block_is_complete_at_its_last_token():
    span = _span()
    assert BlockEnds(3)(span)[0].nonzero()[:, 0].tolist() == [2, 5, 8, 11, 14, 20, 23]


@pytest.mark.parametrize(
    ("position", "settings", "message"),
    [
        (Alibi(), {}, "Alibi shapes scores"),
        (Yarn(4.0, 16), {}, "position.attention_factor=1.0"),
        (Rope(), {"groups": 3}, "groups=3"),
        (Rope(), {"rope_dim": 8}, "rope_dim=8"),
        (Rope(), {"top": 0}, "top must be 1 or more"),
        (Rope(), {"dense_steps": -1}, "dense_steps"),
    ],
)
def test_what_cannot_be_is_refused(position, settings, message):
    with pytest.raises(ValueError, match=message):
        Compressed(16, 4, position, **{**SETTINGS, **settings})

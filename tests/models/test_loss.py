"""The chunked loss is cross-entropy, in value and gradient, whatever the chunk."""

import pytest
import torch
from torch.nn import functional as F

from models import loss
from models.loss import IGNORE, token_losses


def inputs():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (2, 7), generator=generator)
    targets[0, 3] = targets[1, 6] = IGNORE
    return hidden, weight, targets


@pytest.mark.parametrize("held", [1, 33, 10_000])
def test_it_is_cross_entropy(held, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_SCORES", held)
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 1)
    hidden, weight, targets = inputs()
    want = F.cross_entropy(
        (hidden @ weight.T).flatten(0, 1), targets.flatten(), reduction="none", ignore_index=IGNORE
    )
    got = token_losses(hidden, weight, targets)
    torch.testing.assert_close(got.flatten(), want, rtol=0, atol=1e-12)
    wanted = torch.autograd.grad(want.sum() / 12, (hidden, weight))
    for a, b in zip(torch.autograd.grad(got.sum() / 12, (hidden, weight)), wanted):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_a_row_of_padding_has_no_loss_and_no_gradient():
    hidden, weight, targets = inputs()
    got = token_losses(hidden, weight, torch.full_like(targets, IGNORE))
    assert got.sum() == 0
    assert all(g.abs().max() == 0 for g in torch.autograd.grad(got.sum(), (hidden, weight)))


def test_weighing_tokens_apart_is_refused():
    hidden, weight, targets = inputs()
    got = token_losses(hidden, weight, targets)
    with pytest.raises(ValueError, match="one weight for all tokens"):
        (got * torch.arange(14.0).view(2, 7)).sum().backward()


def test_logits_never_exist_whole(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_SCORES", 22)
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 2)
    largest = []
    product = torch.Tensor.logsumexp
    monkeypatch.setattr(
        torch.Tensor,
        "logsumexp",
        lambda self, *a: largest.append(self.numel()) or product(self, *a),
    )
    hidden, weight, targets = inputs()
    token_losses(hidden, weight, targets)
    assert max(largest) <= 22 and len(largest) == 7


def test_a_chunk_has_tokens_enough_for_what_it_reads(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_SCORES", 22)
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 7)
    chunks = []
    product = torch.Tensor.logsumexp
    monkeypatch.setattr(
        torch.Tensor,
        "logsumexp",
        lambda self, *a: chunks.append(len(self)) or product(self, *a),
    )
    hidden, weight, targets = inputs()
    token_losses(hidden, weight, targets)
    assert chunks == [7, 7]

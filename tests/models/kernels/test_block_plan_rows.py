"""Many short rows, computed in one block, come out as fewer of them do, block by block: outputs and
every gradient."""

import pytest
import torch

from models.attention.full import CAUSAL
from models.init import initialise
from models.kernels.block_plan import MANY
from models.primitives.softmax import Softmax
from models.span import Span
from tests.support.parity import packed, relative
from tests.variants import VARIANTS, WIDTH

TOKENS = 51
ATTENDING = [
    name
    for name, make in VARIANTS.items()
    if any(isinstance(module, Softmax) for module in make().modules())
]


def rows() -> Span:
    """One more than it takes, each of other documents, with padding of other lengths, one row with
    nothing else."""
    return packed(
        [[1 + row, 3 + 2 * row, 1, max(1, 20 - 3 * row)] for row in range(MANY)] + [[]], TOKENS
    )


def trained(mixer, span, x, weight):
    """(output, gradient of x, gradients of the parameters) of the rows of `span`."""
    x = x.clone().requires_grad_()
    mixer.zero_grad()
    y = mixer(x, span) * span.valid()[..., None]
    (y * weight).sum().backward()
    assert x.grad is not None
    return (
        y.detach(),
        x.grad,
        {name: p.grad.clone() for name, p in mixer.named_parameters() if p.grad is not None},
    )


@pytest.mark.parametrize("name", ATTENDING)
def test_rows_taken_together_are_fewer_rows_taken_apart(name):
    span, mixer = rows(), VARIANTS[name]().double()
    initialise(mixer, 1)
    torch.manual_seed(2)
    x, weight = (torch.randn(*span.shape, WIDTH, dtype=torch.float64) for _ in range(2))
    y, d_x, d_parameters = trained(mixer, span, x, weight)
    halves = slice(MANY - 1), slice(MANY - 1, None)
    apart = [trained(mixer, span.map(lambda t, r=r: t[r]), x[r], weight[r]) for r in halves]
    assert relative(y, torch.cat([half[0] for half in apart])) < 1e-11
    assert relative(d_x, torch.cat([half[1] for half in apart])) < 1e-11
    for key, grad in d_parameters.items():
        assert (
            relative(grad, torch.stack([half[2][key] for half in apart if key in half[2]]).sum(0))
            < 1e-11
        ), key


def test_what_stands_at_places_that_nobody_sees_does_not_matter():
    """Not even if it is no number, and whether or not other rows see something at the same
    place."""
    span, leaf = rows(), Softmax(CAUSAL)
    torch.manual_seed(3)
    q, k, v = (torch.randn(*span.shape, 2, 4, dtype=torch.float64) for _ in range(3))
    valid = span.valid()[..., None, None]
    poison = torch.where(valid, 0.0, torch.nan)
    clean = leaf((q,), (k, v), span=span) * valid
    assert relative(leaf((q,), (k + poison, v + poison), span=span) * valid, clean) < 1e-12

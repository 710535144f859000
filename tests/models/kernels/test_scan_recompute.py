"""A row gone through in stripes answers as the row at once, in outputs and all gradients, and never
holds it whole."""

import pytest
import torch

from models.kernels import scan_recompute
from models.kernels.scan_chunkwise import affine_chunks
from models.kernels.scan_recompute import recomputed_chunks
from tests.support.parity import relative

B, N, H, C, D, E = 2, 5, 3, 8, 4, 6
SHAPES = {"scalar": (), "vector": (D,)}


def given(kind: str, shared: bool):
    """Chunks of every tensor; heads of queries, keys and decays shared or not."""
    generator = torch.Generator().manual_seed(0)
    heads = 1 if shared else H

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, a = (noise(B, N, heads, C, D) / 2 for _ in range(3))
    decay = -noise(B, N, heads, C, *SHAPES[kind.split()[0]]).square()
    return [q, k, noise(B, N, H, C, E), decay, *((a, -a) if "delta" in kind else ())]


def both(run, tensors, wanted):
    """Outputs and gradients of those wanted."""
    leaves = [x.clone().requires_grad_(want) for x, want in zip(tensors, wanted, strict=True)]
    found = run(leaves[0], tuple(leaves[1:]))
    generator = torch.Generator().manual_seed(1)
    total = torch.stack(
        [(x * torch.randn(x.shape, generator=generator, dtype=x.dtype)).sum() for x in found]
    ).sum()
    return [
        *found,
        *torch.autograd.grad(total, [x for x in leaves if x.requires_grad], allow_unused=True),
    ]


@pytest.mark.parametrize("room", [1, 2 * B * H * C * C, 1 << 30])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", ["scalar", "vector", "scalar delta", "vector delta"])
def test_stripes_are_invisible(kind, shared, before, room):
    tensors = given(kind, shared)
    everything = [True] * len(tensors)
    want = both(lambda q, p: affine_chunks(q, p, before=before), tensors, everything)
    got = both(lambda q, p: recomputed_chunks(q, p, before=before, room=room), tensors, everything)
    assert max(map(relative, got, want)) < 1e-13


def test_what_needs_no_gradient_gets_none_and_the_others_get_theirs():
    tensors, wanted = given("scalar", False), [False, True, True, False]
    want = both(lambda q, p: affine_chunks(q, p, before=False), tensors, wanted)
    got = both(lambda q, p: recomputed_chunks(q, p, before=False, room=1), tensors, wanted)
    assert len(got) == len(want) == 6 and max(map(relative, got, want)) < 1e-13


def test_no_stripe_is_longer_than_there_is_room_for(monkeypatch):
    sizes = []

    def watched(query, payload, *, before):
        sizes.append(query.shape[1])
        return affine_chunks(query, payload, before=before)

    monkeypatch.setattr(scan_recompute, "affine_chunks", watched)
    both(
        lambda q, p: recomputed_chunks(q, p, before=False, room=2 * B * H * C * C),
        given("vector", True),
        [True] * 4,
    )
    assert sizes == [2, 2, 1] * 2, "forward, and once more backward"

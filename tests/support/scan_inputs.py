"""Random inputs of a scan, of each kind, for the tests of its forms."""

import torch
from torch import Tensor
from torch.nn import functional as F

from models.span import Span

KINDS = ["none", "scalar", "vector", "scalar delta", "vector delta"]


def inputs(
    kind: str,
    span: Span,
    *,
    heads: int = 2,
    keys: int = 4,
    values: int = 5,
    dtype=torch.float64,
    strength=1.0,
) -> tuple[tuple[Tensor], tuple[Tensor, ...]]:
    """(query, payload): unit keys, log decays of about -strength, step sizes between 0 and 1."""
    generator = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*span.shape, *shape, generator=generator, dtype=torch.float64)

    q, v = noise(heads, keys), noise(heads, values)
    k, a = (F.normalize(noise(heads, keys), dim=-1) for _ in range(2))
    vector, low = "vector" in kind, "delta" in kind
    decay = -strength * F.softplus(noise(heads, keys) if vector else noise(heads))
    if kind == "none":
        decay = torch.zeros_like(decay)
    rest = (a, -a * noise(heads, 1).sigmoid()) if low else ()
    return (q.to(dtype),), tuple(x.to(dtype) for x in (k, v, decay, *rest))

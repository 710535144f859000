"""A line of the doctor's table, and the rows that the doctor examines a model with."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from models.layer import hook
from models.micro_batch import MicroBatch
from models.span import Span
from parallel.layout import layouts
from parallel.mesh import Mesh
from parallel.sharding import shard_span

TOKENS = 121
BOUND = 1e-11  # of a tensor's largest magnitude, in float64
ROUNDING = 1e-13  # of a model's largest gradient; a smaller one is rounding alone


@dataclass(frozen=True)
class Diagnosis:
    """One line of the table.

    Attributes:
        check: name of the check.
        subject: what is compared or observed.
        figure: relative error; must stay below `bound`, or above it for `reach`.
        bound: of the figure.
        passed: the figure is on the right side.
        note: a remark, or an empty string.
    """

    check: str
    subject: str
    figure: float
    bound: float
    passed: bool
    note: str = ""


# Document lengths of two rows; the rest of each row is padding.
SEPARATE_ROWS = ([37, 1, 52, 23], [5, 90, 19])
# Lengths of the sources of the same documents, of which the last has none.
SOURCE_ROWS = ([11, 30, 1, 9], [40, 2])
SOURCE_TOKENS = 67
# Document lengths of two lanes, for a memory: two rows each, cut inside a document.
LANES = ([37, 1, 52, 60, 1, 80], [5, 90, 147])


def packed_rows(lengths: Sequence[Sequence[int]] = SEPARATE_ROWS, first: int = 0) -> Span:
    """Packs uneven documents, one of them a single token, with some padding.

    Args:
        lengths: of the documents of each lane.
        first: token of each lane at which its row begins.

    Returns:
        Addresses [2, TOKENS].
    """
    pos = torch.zeros(2, first + TOKENS, dtype=torch.long)
    doc = torch.full((2, first + TOKENS), -1)
    for row, lane in enumerate(lengths):
        start = 0
        for number, length in enumerate(lane):
            stop = min(start + length, first + TOKENS)
            pos[row, start:stop] = torch.arange(stop - start)
            doc[row, start:stop] = number
            start = stop
    return Span.of(pos[:, first:], doc[:, first:])


def example_source(model: nn.Module, vocabulary: int, span: Span | None = None) -> Any:
    """Returns a source for rows of documents, a MicroBatch; None where the model reads none.

    Args:
        vocabulary: its tokens are below it.
        span: its addresses; None: sources of the documents of `packed_rows`.
    """
    if not hook(model, "reads_source"):
        return None
    if span is None:
        span = packed_rows(SOURCE_ROWS).map(lambda column: column[:, :SOURCE_TOKENS])
    generator = torch.Generator().manual_seed(4)
    return MicroBatch(torch.randint(vocabulary, span.shape, generator=generator), span)


def local_source(source: Any, policy: str, mesh: Mesh) -> Any:
    """Returns this rank's tokens of a source, by a layout of its own; None of none."""
    if source is None or mesh.context.size == 1:
        return source
    row_layouts = layouts(policy, source.span, mesh.context.size, heads=mesh.ulysses.size)
    span = shard_span(source.span, row_layouts, mesh.context.rank)
    return MicroBatch(span.sharding.shard(source.tokens, 0), span)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Returns the largest difference in units of the largest expected magnitude."""
    # A rank may have no tokens at all.
    if not actual.numel():
        return 0.0
    largest = expected.abs().max().clamp_min(1e-12)
    return ((actual - expected).abs().max() / largest).item()


def worst_gradient(
    actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> tuple[float, str]:
    """Returns the largest relative error of any parameter's gradient, and its name.

    A gradient that is 0 but for rounding has no digits to compare, as that of the keys of an
    attention over a single vector; it is compared in units of the model's largest gradient.

    Args:
        actual, expected: gradients by the name of their parameter, the same names in both.
    """
    worst = 0.0
    worst_name = "no parameter"
    largest = 0.0
    for gradient in expected.values():
        if gradient.numel():
            largest = max(largest, float(gradient.abs().max()))
    for name, gradient in expected.items():
        error = relative_error(actual[name], gradient)
        if error > BOUND and float(gradient.abs().max()) < ROUNDING * largest:
            error = float((actual[name] - gradient).abs().max()) / largest
        # What is not finite compares with nothing, and is worse than everything.
        error = error if math.isfinite(error) else math.inf
        worst, worst_name = max((worst, worst_name), (error, name))
    return worst, worst_name

"""Ranges that a constructor may give its settings: `experts: Annotated[int, Range(1, 4096)]`.

A config is checked against them before anything is built. Where a constructor gives none, a number
may be what its type allows; the constructor itself refuses what would make no layer.
"""

from dataclasses import dataclass
from typing import Annotated


@dataclass(frozen=True)
class Range:
    """From `low` to `high`, both among the values that are allowed; None: no bound on that side.

    above: a bound that is no value itself.
    """

    low: float | None = None
    high: float | None = None
    above: float | None = None

    def breach(self, value: float) -> str | None:
        """Returns the bound that keeps the value out, or None."""
        if self.low is not None and value < self.low:
            return f"it must be at least {self.low}"
        if self.above is not None and value <= self.above:
            return f"it must be more than {self.above}"
        if self.high is not None and value > self.high:
            return f"it must be at most {self.high}"
        return None


Count = Annotated[int, Range(1)]
"""A number of channels, tokens or steps."""

Few = Annotated[int, Range(1, 4096)]
"""Number of things built or visited one after another: rounds, hops, filters of a layer."""

Some = Annotated[int, Range(0, 4096)]
"""Of such things, or none."""

Piece = Annotated[int, Range(1, 2**24)]
"""Tokens of a segment that is laid out whole."""

Many = Annotated[int, Range(1, 2**20)]
"""A number of entries of a table that is written out: words of a task, experts, frequencies."""

Shares = Annotated[float, Range(above=0, high=1e6)]
"""A factor of what there is: a million times as much is a slip of the keyboard."""

Share = Annotated[float, Range(above=0, high=1)]
"""A part of a whole, up to all of it."""

Positive = Annotated[float, Range(above=0)]
"""A factor, a scale or a rate that leaves nothing where it is 0."""

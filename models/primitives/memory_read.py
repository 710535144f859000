"""Attention of a recurrence: one query a row, asked step by step, over a memory that stays.

Letters: B rows, S tokens of the memory, E channels of a value.
"""

import torch
from torch import Tensor

from models.primitive import Primitive


class MemoryRead(Primitive):
    """A weighted mean over the tokens of a memory, for queries that every rank has alike.

    The scores of a step are dense, [B, S]: with a single query there is nothing to tile.
    """

    counts_flops = False
    continues_rows = True  # every call brings the whole memory

    def forward(
        self, scores: Tensor, values: Tensor, seen: Tensor, factor: Tensor | None = None
    ) -> Tensor:
        """Returns the softmax over the tokens seen, times their values, [B, E]; 0 of no token.

        Args:
            scores: [B, S] logits.
            values: [B, S, E].
            seen: [B, S] bool.
            factor: [B, S] of the weights, applied after the softmax; they are not normalised again.
        """
        hidden = scores.masked_fill(~seen, -torch.inf)
        top = self.largest(hidden.detach().amax(1, keepdim=True))
        weights = (hidden - torch.where(top.isfinite(), top, 0)).exp()
        mass = weights.sum(1, keepdim=True)
        if factor is not None:
            weights = weights * factor
        part = torch.einsum("bs,bse->be", weights, values.to(weights.dtype))
        total = self.total(torch.cat([part, mass], 1))
        mass = total[:, -1:]
        return total[:, :-1] / torch.where(mass > 0, mass, 1)

    def largest(self, x: Tensor) -> Tensor:
        """Returns the largest of what the tokens at hand gave, element by element."""
        return x

    def total(self, x: Tensor) -> Tensor:
        """Returns the sum of what the tokens at hand gave, element by element."""
        return x

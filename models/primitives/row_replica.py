"""A row brought together on every rank, for a recurrence that all ranks take alike.

Letters: B rows, T tokens at hand, N tokens of the whole rows.
"""

from torch import Tensor

from models.primitive import Primitive
from models.span import Span


class RowReplica(Primitive):
    """Gives every rank the whole of a row, and each its own part back; on one device nothing moves.

    Every rank computes the same from it. The gradient of a token is the sum of what comes back from
    all ranks, so each rank takes the loss of its own tokens alone.
    """

    counts_flops = False
    continues_rows = True  # what came before in the row is in the state of its owner

    def addresses(self, span: Span) -> Span:
        """Returns the addresses of the whole rows, [B, N], in global order."""
        return span

    def gather(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, ...] -> [B, N, ...], in global order."""
        return x

    def own(self, x: Tensor, span: Span) -> Tensor:
        """[B, N, ...] -> [B, T, ...]: the tokens at hand."""
        return x

    def total(self, x: Tensor) -> Tensor:
        """Returns the sum of what the tokens at hand of every rank gave, element by element."""
        return x

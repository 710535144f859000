"""The argument of a whole model: tokens, addresses, targets, and a second stream.

Letters: m rows, c tokens of a row on this rank.
"""

from typing import Any, NamedTuple

from torch import Tensor

from models.span import Span


class MicroBatch(NamedTuple):
    """Tokens of some rows on this rank, with all that a model needs to know of them.

    Attributes:
        tokens: [m, c] int64; [m, c, 1 + K] of nodes that come with the K nodes they read.
        span: their addresses, [m, c].
        targets: [m, c] int64, IGNORE where there is none; None: logits are wanted, not losses.
        source: a second stream that the model reads beside these tokens, such as the MicroBatch of
            the texts to translate; None where the model has only one.
    """

    tokens: Tensor
    span: Span
    targets: Tensor | None = None
    source: Any = None

    @staticmethod
    def of(batch: "MicroBatch | Tensor") -> "MicroBatch":
        """Makes a batch of bare tokens [m, c], each row one document; a batch stays as it is."""
        if isinstance(batch, MicroBatch):
            return batch
        rows, tokens = batch.shape[:2]
        return MicroBatch(batch, Span.line(rows, tokens, batch.device))

    def with_span(self, span: Span) -> "MicroBatch":
        """The same tokens at other addresses, such as those with a past."""
        return self._replace(span=span)

    def without_targets(self) -> "MicroBatch":
        """The same tokens, asked for logits."""
        return self._replace(targets=None)

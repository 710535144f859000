"""Dispatch: tokens visit the experts that were chosen for them. A driver needs only to bring them
there and back.

A leaf without parameters. Letters: N visits, W width, E experts.
"""

from collections.abc import Callable

from torch import Tensor

from models.primitive import Primitive

Visit = Callable[
    [Tensor, Tensor, Tensor | None], Tensor
]  # (tokens [N, W], counts [E], keys [N] or None) -> [N, W]


class ExpertDispatch(Primitive):
    """Passes tokens to their experts on one device, where every expert is at hand."""

    needs_driver = False  # of a sharded row only; experts over ranks have one of their own
    counts_flops = False  # the experts' weights are counted by their active share

    def exchange(
        self, sent: Tensor, counts: Tensor, visit: Visit, keys: Tensor | None = None
    ) -> Tensor:
        """[N, W]: what the experts make of each token.

        Args:
            sent: [N, W] tokens, those for the first expert first. Past the sum of `counts` they
                visit nobody, and what comes back there is 0.
            counts: [E] int64, tokens for each expert.
            visit: what the experts at hand make of tokens that lie expert by expert.
            keys: [N] int64 that travel with the tokens.
        """
        return visit(sent, counts, keys)

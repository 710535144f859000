"""Expert dispatch: brings tokens to the experts that were chosen for them, and back.

The primitive has no parameters. Letters: N visits, W width, E experts.
"""

from collections.abc import Callable

from torch import Tensor

from models.primitive import Primitive

# (tokens [N, W], counts [E], keys [N] or None) -> [N, W]
Visit = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class ExpertDispatch(Primitive):
    """Passes tokens to their experts on one device, which holds every expert."""

    needs_driver = False  # of a sharded row only; experts over ranks have one of their own
    continues_rows = True  # it reads none
    counts_flops = False  # the experts' weights are counted by their active share

    def exchange(
        self, sent: Tensor, counts: Tensor, visit: Visit, keys: Tensor | None = None
    ) -> Tensor:
        """Returns the output of the experts for each token, [N, W].

        Args:
            sent: [N, W] tokens, those for the first expert first. Rows past the sum of `counts`
                visit no expert, and their output is 0.
            counts: [E] int64, tokens for each expert.
            visit: computes the experts of this device on tokens sorted by expert.
            keys: [N] int64 that travel with the tokens.
        """
        return visit(sent, counts, keys)

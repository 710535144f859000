"""An evaluation of one's own, beside the held-out loss:

python -m trainer evaluation.right._target_=examples.own.evaluation.Accuracy
"""

import torch

from models.loss import IGNORE
from models.ranges import Count
from trainer.evaluation.base import Evaluation, EvaluationContext, Every, Figure, on_device


class Accuracy(Evaluation):
    """Share of the held-out targets that the model finds likeliest.

    Args:
        batches: to read.
        every: as in Evaluation.
    """

    # It reads the run's own rows and their targets, whatever these are.
    needs_next_token = False
    reads_source = True

    def __init__(self, *, batches: Count = 2, every: Every = None):
        super().__init__(every=every)
        self.batches = batches

    @torch.no_grad()
    def run(self, context: EvaluationContext) -> list[Figure]:
        """Every rank reads the same batches and counts in its own part of them."""
        counts = on_device(context, 2)
        cursor = context.stream.start()
        for _ in range(self.batches):
            batch, cursor = context.stream.read(cursor)
            for piece in context.pieces(batch, "a batch of accuracy"):
                assert piece.targets is not None, "held-out rows have targets"
                predicted = context.model(piece.without_targets()).argmax(-1)
                valid = piece.targets != IGNORE
                counts[0] += (predicted == piece.targets)[valid].sum()
                counts[1] += valid.sum()
        right, total = context.total(counts).tolist()
        return [Figure("share", right / max(total, 1), chance=1 / context.vocabulary)]

"""Scores rows by the likelihood that the sharded model gives to their targets.

Letters: N rows, T tokens of the longest row, n tokens of a row, k choices, p targets of a
micro-batch, V vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.loss import IGNORE
from models.span import PADDING
from trainer.data.batch import Batch
from trainer.evaluation.base import EvaluationContext, on_device

TIE = 1e-9  # logits, or log-likelihoods, that differ by less are alike


class ScoredRow(NamedTuple):
    """A row that is one document.

    Attributes:
        tokens: [n] int64, which the model reads.
        targets: [n] int64, the target at each token; IGNORE where nothing is scored.
        choices: [k] int64, tokens that a target is to be told from, itself among them; as many in
            every row of a call, or None in every row.
    """

    tokens: np.ndarray
    targets: np.ndarray
    choices: np.ndarray | None = None


class RowScores(NamedTuple):
    """Sums over the targets of each row, [N] float64 on the CPU, the same on every rank.

    Attributes:
        log_likelihood: of the targets, in nats.
        count: number of targets.
        likeliest: targets that the model finds likeliest of all tokens; of tokens that it finds
            alike, each counts a part.
        chosen: targets that it finds likeliest of the row's choices; 0 without choices.
    """

    log_likelihood: Tensor
    count: Tensor
    likeliest: Tensor
    chosen: Tensor

    @property
    def loss(self) -> float:
        """Mean loss in nats per target."""
        return float(-self.log_likelihood.sum() / self.count.sum())


@torch.no_grad()
def score_rows(context: EvaluationContext, rows: Sequence[ScoredRow], what: str) -> RowScores:
    """Scores every target of some rows. Collective.

    A memory begins empty.

    Args:
        context: holds the model; all ranks give the same rows.
        rows: at least one; shorter ones are padded.
        what: names them in the message about ranks that disagree.

    Raises:
        Interrupted: a signal asked the run to stop.
    """
    sums = on_device(context, 4, len(rows))
    choices = None
    if rows[0].choices is not None:
        table = np.stack([row.choices for row in rows if row.choices is not None])
        choices = torch.from_numpy(table).to(context.mesh.device)
    for micro_batch in context.pieces(rows_batch(rows), what):
        logits = context.model(micro_batch.without_targets())
        all_targets = micro_batch.targets
        assert all_targets is not None, "rows to score come with targets"
        valid = all_targets != IGNORE
        targets = all_targets[valid]
        # One document a row, so after numbering a document's number is that of its row.
        row_index = micro_batch.span.doc[valid]
        picked = logits[valid].to(torch.float64)
        own = picked.gather(1, targets[:, None])
        scores = [
            own[:, 0] - picked.logsumexp(1),
            torch.ones_like(own[:, 0]),
            _share_of_best(own, picked),
        ]
        if choices is not None:
            scores.append(_share_of_best(own, picked.gather(1, choices[row_index])))
        for index, score in enumerate(scores):
            sums[index].index_add_(0, row_index, score)
    return RowScores(*context.total(sums))


def _share_of_best(own: Tensor, others: Tensor) -> Tensor:
    """Returns [p]: 1 where a target is best, 1 / m where m are alike and best, else 0.

    Args:
        own: [p, 1] logits of the targets.
        others: [p, k] logits of all candidates, the target among them.
    """
    best = others.amax(1, keepdim=True)
    ties = (others >= best - TIE).sum(1)
    return (own >= best - TIE)[:, 0].double() / ties


def rows_batch(rows: Sequence[ScoredRow]) -> Batch:
    """Returns the batch of some rows, each one document with targets of its own."""
    longest = max(len(row.tokens) for row in rows)
    # One token more than the model reads, as in every Batch.
    tokens = torch.zeros(len(rows), longest + 1, dtype=torch.long)
    doc = torch.full_like(tokens, PADDING)
    aims = torch.full_like(tokens, IGNORE)
    for index, row in enumerate(rows):
        length = len(row.tokens)
        tokens[index, :length] = torch.from_numpy(np.asarray(row.tokens, np.int64))
        aims[index, :length] = torch.from_numpy(np.asarray(row.targets, np.int64))
        doc[index, :length] = 0
    pos = torch.arange(longest + 1).expand_as(tokens) * (doc != PADDING)
    return Batch(tokens, doc, pos, torch.zeros_like(tokens), aims)


def next_tokens(tokens: np.ndarray, first: int) -> ScoredRow:
    """Returns a row in which each token from index `first` on is to be predicted.

    The last token is only a target.
    """
    targets = np.full(len(tokens) - 1, IGNORE, np.int64)
    targets[first - 1 :] = tokens[first:]
    return ScoredRow(np.asarray(tokens[:-1], np.int64), targets)

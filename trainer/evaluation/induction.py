"""Induction: repeated random tokens, the heads that copy them, and what their loss costs."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Annotated, Any

import numpy as np
from torch import Tensor, nn

from models.analysis.attention_maps import collect, leaves, uncompiled
from models.analysis.heads import HeadScores, head_scores
from models.loss import IGNORE
from models.ranges import Range
from parallel.collectives import Communicator
from trainer.config.finding import Finding
from trainer.evaluation.attention_maps import KINDS, together
from trainer.evaluation.base import Evaluation, EvaluationContext, Every, Figure, RunFacts, mean
from trainer.evaluation.recall import check_vocabulary, text_tokens
from trainer.evaluation.scoring import RowScores, ScoredRow, rows_batch, score_rows

Head = tuple[str, int]  # name of a softmax, number of a head


class Induction(Evaluation):
    """Scores every head on random tokens that are repeated, and takes the found heads away.

    Figures: `score`, the largest prefix-matching score of any head (weight on the token after the
    earlier occurrence of the query's own); `previous_token`, likewise; `accuracy` on the second
    half; `ablated`, the same while the found heads give 0; and of each found head `copying`, in
    nats: by how much the log-likelihood of the repeated tokens falls when that head alone gives 0.
    A model without softmax attention has `accuracy` alone, since it has no map of weights.

    Args:
        length: random tokens, which are then repeated once.
        examples: rows.
        threshold: of both scores from which on a head is found.
        most: heads whose copying is measured, each by a pass of its own.
        every: as in Evaluation.

    Source: Olsson et al. 2022 (arXiv:2209.11895). Their copying score is the share of a head's own
    output that raises the attended token; ours is what the whole model loses without the head, so
    it means the same for every architecture and includes later layers.
    """

    def __init__(
        self,
        *,
        length: Annotated[int, Range(3, 2**12)] = 25,
        examples: Annotated[int, Range(1, 256)] = 4,
        threshold: Annotated[float, Range(above=0.0, high=1.0)] = 0.4,
        most: Annotated[int, Range(0, 256)] = 4,
        every: Every = None,
    ):
        super().__init__(every=every)
        self.length = length
        self.examples = examples
        self.threshold = threshold
        self.most = most

    def check(self, facts: RunFacts) -> Iterator[Finding]:
        yield from facts.check_length("length", self.length, 2 * self.length)
        yield from check_vocabulary(facts, "length", self.length, self.length)

    def run(self, context: EvaluationContext) -> list[Figure]:
        tokens = text_tokens(context)
        rows = []
        for number in range(self.examples):
            rng = np.random.default_rng([self.length, number])
            rows.append(self.row(rng.choice(tokens, self.length, replace=False)))
        whole = score_rows(context, rows, "repeated random tokens")
        scores = self._head_scores(context, rows)
        accuracy = Figure("accuracy", _accuracy(whole), 1 / context.vocabulary)
        if not scores:
            return [accuracy]
        found = self._found(scores)
        ablated = whole
        if found:
            ablated = self._without(context, rows, found)
        cells = self._cells(context, rows, scores, whole)
        # Of uniform attention: a query at index t sees t + 1 keys.
        queries = range(self.length, 2 * self.length)
        chance = mean([1 / (index + 1) for index in queries])
        best = max(score.induction for score in scores)
        previous = max(score.previous_token for score in scores)
        # Every query but the first has a token before it.
        chance_previous = mean([1 / (index + 1) for index in range(1, 2 * self.length)])
        return [
            Figure("score", best, chance, cells),
            Figure("previous_token", previous, chance_previous),
            accuracy,
            Figure("ablated", _accuracy(ablated), 1 / context.vocabulary),
        ]

    def row(self, tokens: np.ndarray) -> ScoredRow:
        """Returns tokens and the same again; in the second half the next token is the target."""
        repeated = np.concatenate([tokens, tokens])
        targets = np.full(len(repeated), IGNORE, np.int64)
        targets[len(tokens) : -1] = repeated[len(tokens) + 1 :]
        return ScoredRow(repeated, targets)

    def _head_scores(
        self, context: EvaluationContext, rows: Sequence[ScoredRow]
    ) -> list[HeadScores]:
        """Returns the scores of all heads, means over the rows, the same on every rank."""
        softmaxes = leaves(context.model, KINDS)
        if not softmaxes:
            return []
        gather = None
        if context.mesh.context.size > 1:
            gather = together(Communicator(context.mesh.context.group))
        by_head: dict[Head, list[HeadScores]] = {}
        for row in rows:
            micro_batch = context.share.piece(rows_batch([row]))
            maps = collect(
                context.model, softmaxes, micro_batch.tokens, micro_batch.span, whole=gather
            )
            for attention in maps:
                for score in head_scores(attention, row.tokens.tolist()):
                    by_head.setdefault((score.layer, score.head), []).append(score)
        return [_mean_scores(scores) for scores in by_head.values()]

    def _found(self, scores: Sequence[HeadScores]) -> list[Head]:
        """Returns the heads of induction and those of previous tokens that serve them."""
        found = []
        for score in scores:
            if max(score.induction, score.previous_token) >= self.threshold:
                found.append((score.layer, score.head))
        return found

    def _cells(
        self,
        context: EvaluationContext,
        rows: Sequence[ScoredRow],
        scores: Sequence[HeadScores],
        whole: RowScores,
    ) -> list[dict[str, Any]]:
        """Returns a cell for each head; the best ones for induction also have `copying`."""
        ranked = sorted(scores, key=lambda score: -score.induction)
        measured = {}
        for score in ranked[: self.most]:
            if score.induction >= self.threshold:
                head = (score.layer, score.head)
                without = self._without(context, rows, [head])
                measured[head] = without.loss - whole.loss
        cells = []
        for score in scores:
            cell: dict[str, Any] = {
                "layer": score.layer,
                "head": score.head,
                "induction": score.induction,
                "previous_token": score.previous_token,
                "duplicate": score.duplicate,
                "sink": score.sink,
                "entropy": score.entropy,
                "pattern": score.pattern,
            }
            copying = measured.get((score.layer, score.head))
            if copying is not None:
                cell["copying"] = copying
            cells.append(cell)
        return cells

    def _without(
        self, context: EvaluationContext, rows: Sequence[ScoredRow], heads: Sequence[Head]
    ) -> RowScores:
        """Scores the rows while some heads give 0."""
        with ExitStack() as stack:
            stack.enter_context(uncompiled())
            softmaxes = leaves(context.model, KINDS)
            for name, module in softmaxes.items():
                # A softmax that is called again in a pass has a number behind its name.
                silent = [head for layer, head in heads if layer.partition(" ")[0] == name]
                if silent:
                    handle = module.register_forward_hook(_silence(silent))
                    stack.callback(handle.remove)
            return score_rows(context, rows, "repeated random tokens without some heads")


def _silence(heads: list[int]) -> Any:
    """Returns a hook that lets heads [B, T, H, E] give 0."""

    def hook(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        silenced = output.clone()
        silenced[:, :, heads] = 0
        return silenced

    return hook


def _accuracy(scores: RowScores) -> float:
    return float(scores.likeliest.sum() / scores.count.sum())


def _mean_scores(scores: Sequence[HeadScores]) -> HeadScores:
    """Returns the means of one head's scores over rows, named after the first row's pattern."""
    means = {}
    for name in ("previous_token", "duplicate", "induction", "sink", "entropy"):
        means[name] = mean([getattr(score, name) for score in scores])
    return scores[0]._replace(**means)

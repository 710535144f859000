"""An evaluation as a user writes one, outside the tree, and models that know how well they do."""

import math
import os
import re
import signal
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from models.loss import IGNORE
from models.micro_batch import MicroBatch
from parallel.mesh import Mesh
from trainer.config.schema import Config
from trainer.data.batch_sharding import BatchSharder
from trainer.data.streams.base import Stream
from trainer.evaluation.base import Evaluation, EvaluationContext, Every, Figure, on_device
from trainer.evaluation.scoring import ScoredRow


class TokenCount(Evaluation):
    """Counts the tokens of the first held-out batch that are below `below`.

    Args:
        below: a number of a token.
        signal_once: a file; where it does not exist yet, a signal comes while this is at work.
    """

    def __init__(self, *, below: int = 100, signal_once: str | None = None, every: Every = None):
        super().__init__(every=every)
        self.below = below
        self.signal_once = signal_once

    def run(self, context: EvaluationContext) -> list[Figure]:
        batch, _ = context.stream.read(context.stream.start())
        if self.signal_once is not None and not os.path.exists(self.signal_once):
            # Every rank has seen that there is no file before one of them makes it.
            context.total(on_device(context, 1))
            if context.mesh.world.rank == 0:
                open(self.signal_once, "w").close()
            os.kill(os.getpid(), signal.SIGTERM)
        counts = on_device(context, 2)
        for micro_batch in context.pieces(batch, "the first batch"):
            valid = micro_batch.span.valid()
            counts += torch.stack([(valid & (micro_batch.tokens < self.below)).sum(), valid.sum()])
        few, all_tokens = context.total(counts).tolist()
        return [Figure("share", few / all_tokens, 0.5, [{"below": self.below, "count": few}])]


class Uniform(nn.Module):
    """Rates every token alike."""

    def __init__(self, vocabulary: int = 257):
        super().__init__()
        self.vocabulary = vocabulary

    def decodes(self) -> str:
        return "it looks at whole rows"

    def forward(self, batch: MicroBatch) -> Tensor:
        tokens, _, targets, _ = batch
        if targets is not None:
            return torch.where(targets != IGNORE, math.log(self.vocabulary), 0.0).double()
        return torch.zeros(*tokens.shape, self.vocabulary, dtype=torch.float64)


class Reader(Uniform):
    """Reads a row of bytes, finds the answers in its text, and writes them.

    Args:
        solve: text of a prompt -> its answers, each with the blank before it.
        ending: pattern of the end of every prompt; the last place where it matches counts.
    """

    def __init__(self, solve: Callable[[str], list[str]], ending: str):
        super().__init__()
        self.solve = solve
        self.ending = re.compile(ending)

    def forward(self, batch: MicroBatch) -> Tensor:
        logits = super().forward(batch.without_targets())
        tokens, span, *_ = batch
        for row_index, row in enumerate(tokens.tolist()):
            length = int(span.valid()[row_index].sum())
            # One character a byte, so that places in the text are places in the row.
            text = bytes(token % 256 for token in row[:length]).decode("latin-1")
            ends = [match.end() for match in self.ending.finditer(text)]
            if not ends:
                continue
            begin = ends[-1]
            for answer in self.solve(text[:begin]):
                for place in range(begin, min(length, begin + len(answer) - 1) + 1):
                    written = text[begin:place]
                    if answer.startswith(written):
                        logits[row_index, place - 1, ord(answer[len(written)])] = 50.0
        return logits


class Teachable(Uniform):
    """Writes what it was taught: the next token after a beginning of a row."""

    def __init__(self, vocabulary: int = 257):
        super().__init__(vocabulary)
        self.known: dict[tuple[int, ...], int] = {}

    def learn(self, rows: Sequence[ScoredRow]) -> None:
        for row in rows:
            tokens = row.tokens.tolist()
            for place, target in enumerate(row.targets.tolist()):
                if target != IGNORE:
                    self.known[tuple(tokens[: place + 1])] = target

    def forward(self, batch: MicroBatch) -> Tensor:
        logits = super().forward(batch.without_targets())
        for row_index, row in enumerate(batch.tokens.tolist()):
            for place in range(len(row)):
                target = self.known.get(tuple(row[: place + 1]))
                if target is not None:
                    logits[row_index, place, target] = 50.0
        return logits


def context_of(
    model: nn.Module, mesh: Mesh, stream: Stream, config: Config, time: int = 1
) -> EvaluationContext:
    """Returns the context of a model on some ranks, at step 1, that no signal stops; rows are cut
    into `time` pieces."""
    share = BatchSharder(
        mesh,
        rows=stream.rows,
        context_length=config.context_length,
        micro_batch="auto",
        policy="zigzag",
        time=time,
    )
    return EvaluationContext(
        config=config,
        model=model,
        share=share,
        stream=stream,
        lanes=lambda share: None,
        step=1,
        stopped=lambda *_: False,
    )

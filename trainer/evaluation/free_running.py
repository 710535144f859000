"""Answers that a model of two streams writes from held-out sources, and how many are right."""

from collections.abc import Iterator
from typing import Annotated, Any

import torch
from torch import nn

from models.ranges import Few, Range
from trainer.config.finding import Finding
from trainer.config.node_checks import as_node, node_errors
from trainer.data.batch import Batch
from trainer.data.batch_sharding import BatchSharder
from trainer.data.open import open_stream
from trainer.data.sources.base import build_source
from trainer.data.streams.base import Stream
from trainer.decoding.two_streams import BeamSearch, translate
from trainer.evaluation.base import Evaluation, EvaluationContext, Every, Figure, RunFacts, mean

ROWS = 32  # sources that answers are written for at once
Reference = tuple[list[int], list[int]]  # tokens of a source, and of its row with start and end


class FreeRunning(Evaluation):
    """Shares of right tokens and of right answers where the model reads what it wrote itself.

    A token is right where the reference has the same token in the same place; what is missing is
    wrong, and what is too much counts for nothing. Every rank writes every answer.

    Args:
        beams: hypotheses in the search; 1 = greedy.
        length_penalty: see BeamSearch.
        answers: references for each value.
        vary: name of a setting of the run's data, such as min_length; None = none. `also` names a
            second one that gets the same values, such as max_length.
        also: see vary.
        values: of these settings.
        every: as in Evaluation.
    """

    needs_next_token = False
    reads_source = True

    def __init__(
        self,
        *,
        beams: Few = 1,
        length_penalty: Annotated[float, Range(0.0, 10.0)] = 0.0,
        answers: Annotated[int, Range(1, 65536)] = 64,
        vary: str | None = None,
        also: str | None = None,
        values: list[Any] = [],  # noqa: B006 - never written to
        every: Every = None,
    ):
        super().__init__(every=every)
        if (vary is None) != (not values):
            raise ValueError("vary and values belong together; give both, or none")
        if also is not None and vary is None:
            raise ValueError("also names a second setting beside vary; give vary, or also=null")
        self.beams = beams
        self.length_penalty = length_penalty
        self.answers = answers
        self.vary = vary
        self.also = also
        self.values = values

    def check(self, facts: RunFacts) -> Iterator[Finding]:
        """See Evaluation.check."""
        if not facts.reads_source:
            yield Finding(
                "evaluation",
                facts.name,
                "it writes from sources, and the model reads none",
                "leave it out, or use model=encoder_decoder or model=seq2seq",
            )
            return
        if self.beams > facts.vocabulary:
            yield Finding(
                facts.key("beams"),
                self.beams,
                f"there are {facts.vocabulary} tokens to begin with",
                f"use {facts.vocabulary} or fewer",
            )
        for value in self.values:
            node = self._node(facts.config, value)
            for sentence in node_errors(node, {}, facts.key("values")):
                yield Finding(sentence=sentence)
                return
            try:
                build_source(node)
            except ValueError as error:
                yield Finding(sentence=f"evaluation.{facts.name}: {error}")
                return
            longest = getattr(build_source(node), "longest", 0)
            yield from facts.check_length("values", self.values, longest)

    def run(self, context: EvaluationContext) -> list[Figure]:
        """See Evaluation.run."""
        cells: list[dict[str, Any]] = []
        for value in self.values or [None]:
            stream = context.stream if value is None else self._stream(context, value)
            references = references_of(stream, self.answers)
            place: dict[str, Any] = {}
            if value is not None and self.vary is not None:
                place[self.vary] = value
            for start in range(0, len(references), ROWS):
                sources = [source for source, _ in references[start : start + ROWS]]
                context.check_signal(batch_of(sources), f"answers from {start + 1} on")
            share = context.sharder(1, context.config.context_length)
            shares = grade_answers(
                context.model, share, references, self.beams, self.length_penalty
            )
            cells.append({**place, **shares, "answers": len(references)})
        tokens = mean([cell["token_accuracy"] for cell in cells])
        exact = mean([cell["exact"] for cell in cells])
        return [Figure("token_accuracy", tokens, None, cells), Figure("exact", exact)]

    def _stream(self, context: EvaluationContext, value: Any) -> Stream:
        """Opens held-out rows of the run's data with one value of the settings that vary."""
        node = self._node(context.config, value)
        source = build_source(node)
        return open_stream(
            node,
            # A row longer than the training's where one example needs it.
            context_length=max(context.config.context_length, getattr(source, "longest", 0)),
            rows=context.config.rows,
            seed=0,
            split="held_out",
        )

    def _node(self, config: Any, value: Any) -> dict[str, Any]:
        """Returns the node of the data with one value of the settings that vary."""
        names = [name for name in (self.vary, self.also) if name is not None]
        return as_node(config.data) | dict.fromkeys(names, value)


def grade_answers(
    model: nn.Module,
    share: BatchSharder,
    references: list[Reference],
    beams: int = 1,
    length_penalty: float = 0.0,
) -> dict[str, float]:
    """Returns the shares of right tokens and of right answers, the same on every rank. Collective.

    Args:
        model: in evaluation mode.
        share: cuts rows for this rank.
        references: from `references_of`.
        beams, length_penalty: see BeamSearch.
    """
    written = written_answers(model, share, references, beams, length_penalty)
    return graded(written, references)


def graded(written: list[list[int]], references: list[Reference]) -> dict[str, float]:
    """Returns the shares of right tokens and of right answers among those written."""
    right = 0
    total = 0
    exact = 0
    for (_, row), answer in zip(references, written, strict=True):
        wanted = row[1:-1]
        right += sum(a == b for a, b in zip(wanted, answer, strict=False))
        total += len(wanted)
        exact += int(wanted == answer)
    return {"token_accuracy": right / max(total, 1), "exact": exact / max(len(references), 1)}


def written_answers(
    model: nn.Module,
    share: BatchSharder,
    references: list[Reference],
    beams: int = 1,
    length_penalty: float = 0.0,
) -> list[list[int]]:
    """Returns the tokens of the answer to each source, the same on every rank. Collective.

    Args:
        model, share, references, beams, length_penalty: see `grade_answers`.
    """
    written: list[list[int]] = []
    for first in range(0, len(references), ROWS):
        part = references[first : first + ROWS]
        search = BeamSearch(
            start=part[0][1][0],
            end=part[0][1][-1],
            # Its end is a token too.
            most=max(len(row) for _, row in part),
            beams=beams,
            length_penalty=length_penalty,
        )
        targets = translate(model, share, [source for source, _ in part], search)
        written += [target.tokens for target in targets]
    return written


def references_of(stream: Stream, most: int) -> list[Reference]:
    """Returns the first pairs of a stream as (tokens of the source, tokens of the row)."""
    references: list[Reference] = []
    cursor = stream.start()
    batches = 0
    while len(references) < most and (stream.batches is None or batches < stream.batches):
        batch, cursor = stream.read(cursor)
        batches += 1
        assert batch.source is not None, "check requires sources"
        for row in range(len(batch.tokens)):
            for number in range(int(batch.doc[row].max()) + 1):
                references.append((_tokens(batch.source, row, number), _tokens(batch, row, number)))
    return references[:most]


def _tokens(batch: Batch, row: int, number: int) -> list[int]:
    return batch.tokens[row][batch.doc[row] == number].tolist()


def batch_of(rows: list[list[int]]) -> Batch:
    """Returns the tokens of rows, for the mark that ranks compare."""
    flat = torch.tensor([token for row in rows for token in row])[None]
    return Batch(flat, flat * 0, flat * 0, flat * 0)

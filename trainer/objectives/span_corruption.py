"""objective=span_corruption: sentinels replace spans of a text, which are said after the text.

Letters: n tokens of a text, k spans of it, R rows, T context length.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from models.loss import IGNORE
from models.span import PADDING, PREFIX, TEXT
from trainer.data.batch import Batch
from trainer.objectives.base import Objective, Symbols, draw, share_between, text_only


class Plan(NamedTuple):
    """Lengths of the k stretches of a text that are kept, and of the k spans, one after each."""

    kept: list[int]
    spans: list[int]


class SpanCorruption(Objective):
    """Span corruption of T5 (Raffel et al. 2019, arXiv:1910.10683, 3.1.4) for a single decoder.

    A text of n tokens with k spans becomes a document of n + 2 k + 1 tokens:

        text     Thank you for inviting me to your party last week .
        input    Thank you <0> me to your party <1> week .              role PREFIX, no targets of
        its own answer   <0> for inviting <1> last <2> (end of text)            predicted token by
        token

    The input's last token predicts the first of the answer. With causal layers the input is read
    from left to right; with prefix attention (model=prefix with length=0) it is seen from both
    sides, which is T5's encoder and decoder in one stack ("prefix LM", section 3.2). Layers that
    see ahead without being told of a prefix would see the answer.

    The number of a document's end stands behind the answer, where the text has it. A text is what a
    row holds of a document; rows read fewer tokens of text than they have places (see `reads`), so
    that nothing is cut off. Where a row of many short texts runs out of room, the last ones have
    fewer spans or none; so has a text of one token.

    Args:
        noise_density: share of the tokens that lie in spans.
        mean_length: of spans, in tokens.
        sentinels: special tokens <0>, <1>, ...; null = as many as the spans of a row may need.
    """

    name = "span_corruption"
    predicts_next = True  # of the answer
    rewrites = True
    carries = False

    def __init__(
        self, noise_density: float = 0.15, mean_length: float = 3.0, sentinels: int | None = None
    ):
        self.noise_density = share_between("noise_density", noise_density, 0, 1, 0.15)
        if not 0 < self.noise_density < 1:
            raise ValueError(
                f"objective.noise_density={noise_density}: some tokens must lie in spans, and "
                "not all; for example 0.15"
            )
        if (
            isinstance(mean_length, bool)
            or not isinstance(mean_length, int | float)
            or not 1 <= mean_length < 1e6
        ):
            raise ValueError(
                f"objective.mean_length={mean_length}: a number of tokens, 1 or more; for example 3"
            )
        self.mean_length = float(mean_length)
        if sentinels is not None and (
            isinstance(sentinels, bool) or not isinstance(sentinels, int) or sentinels < 2
        ):
            raise ValueError(
                f"objective.sentinels={sentinels}: a number of tokens, 2 or more; or null, as "
                "many as needed"
            )
        self.sentinels = sentinels

    def counts(self, tokens: int) -> tuple[int, int]:
        """(tokens in spans, spans) of a text of so many tokens; (0, 0) where it is too short."""
        if tokens < 2:
            return 0, 0
        noise = min(max(round(tokens * self.noise_density), 1), tokens - 1)
        spans = max(round(noise / self.mean_length), 1)
        return noise, min(spans, noise, tokens - noise)

    def reads(self, context_length: int) -> int:
        """See Objective: the longest text that still fits after it has been corrupted."""
        low = 0
        high = context_length
        while low < high:
            middle = (low + high + 1) // 2
            # A document's end, which is moved behind the answer, takes no further place.
            if middle + 2 * self.counts(middle)[1] + 1 <= context_length:
                low = middle
            else:
                high = middle - 1
        if low < 2:
            raise ValueError(
                f"context_length={context_length} has no room for a text and its answer; "
                "use context_length=64 or more with objective=span_corruption"
            )
        return low

    def words(self, context_length: int) -> list[tuple[str, ...]]:
        """See Objective."""
        most = self.counts(self.reads(context_length))[1] + 1
        if self.sentinels is not None and self.sentinels < most:
            raise ValueError(
                f"objective.sentinels={self.sentinels}, but a row of "
                f"context_length={context_length} may have {most - 1} "
                f"spans and needs one more; use objective.sentinels={most} or null, or a "
                "longer objective.mean_length"
            )
        return [(f"<extra_id_{number}>",) for number in range(self.sentinels or most)]

    def apply(
        self, batch: Batch, rows: Tensor, seed: int, symbols: Symbols, context_length: int
    ) -> Batch:
        """See Objective."""
        span = text_only(batch)
        lots = draw("spans", seed, rows, span, 2)
        size = len(batch.tokens), context_length + 1
        aims = torch.full(size, IGNORE)
        new = Batch(
            torch.zeros(size, dtype=torch.long),
            torch.full(size, PADDING),
            torch.zeros(size, dtype=torch.long),
            torch.full(size, TEXT),
            aims,
        )
        for row, tokens in enumerate(batch.tokens[:, :-1]):
            here = 0
            doc = span.doc[row]
            for number, there, answer in self._documents(tokens, doc, lots[row], symbols, size[1]):
                middle = here + len(there)
                stop = middle + len(answer)
                new.tokens[row, here:stop] = torch.tensor([*there, *answer])
                new.doc[row, here:stop] = number
                new.pos[row, here:stop] = torch.arange(stop - here)
                new.role[row, here:middle] = PREFIX
                if answer:
                    aims[row, middle - 1 : stop - 1] = torch.tensor(answer)
                here = stop
        return new

    def _documents(
        self, tokens: Tensor, doc: Tensor, lots: Tensor, symbols: Symbols, places: int
    ) -> Iterator[tuple[int, list[int], list[int]]]:
        """(number, what is read, what is to be said after it) of each document of a row.

        Args:
            tokens, doc: [reads] of the row; lots [reads, 2].
            places: of the row as the model reads it, with the one that is read by nobody.
        """
        free = places - 1 - int((doc != PADDING).sum())
        for first, stop in _stretches(doc):
            text = tokens[first:stop]
            ends = len(text) > 1 and int(text[-1]) == symbols.end_of_text
            body = text[:-1] if ends else text
            plan = self.plan(lots[first : first + len(body)], (free - 1) // 2)
            there, answer = corrupted(body, plan, symbols.special)
            if ends:
                (answer if answer else there).append(symbols.end_of_text)
            free -= len(there) + len(answer) - len(text)
            yield int(doc[first]), there, answer

    def plan(self, lots: Tensor, most: int) -> Plan:
        """Stretches and spans of a text; where there are only `most` spans they hide fewer tokens.

        Args:
            lots: [n, 2] float64, for each token two numbers drawn by its address.
        """
        noise, spans = self.counts(len(lots))
        if min(spans, most) < 1:
            return Plan([len(lots)], [])
        if spans > most:
            spans = most
            noise = min(noise, max(spans, round(spans * self.mean_length)))
        return Plan(
            _divided(lots[:, 0], len(lots) - noise, spans), _divided(lots[:, 1], noise, spans)
        )

    def describe(self, symbols: Symbols, context_length: int) -> str:
        """See Objective."""
        where = (
            f"added, vocabulary {symbols.vocabulary}" if symbols.added else "the tokenizer's own"
        )
        return (
            f"span corruption: {self.noise_density:.3g} of the text lies in spans of "
            f"{self.mean_length:.3g} tokens, said after "
            f"it; a row of {context_length} holds {self.reads(context_length)} tokens of "
            f"text; {len(symbols.special)} "
            f"sentinels ({where})"
        )


def corrupted(text: Tensor, plan: Plan, sentinels: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """(what is read of a text, what is to be said after it: nothing where there are no spans)."""
    words = text.tolist()
    if not plan.spans:
        return words, []
    there: list[int] = []
    answer: list[int] = []
    place = 0
    for number, (kept, hidden) in enumerate(zip(plan.kept, plan.spans, strict=True)):
        there += [*words[place : place + kept], sentinels[number]]
        place += kept
        answer += [sentinels[number], *words[place : place + hidden]]
        place += hidden
    return there, [*answer, sentinels[len(plan.spans)]]


def _divided(lots: Tensor, total: int, parts: int) -> list[int]:
    """`total` as the sum of `parts` numbers from 1 on, drawn evenly by the first total - 1 lots."""
    cuts = lots[: total - 1].argsort(stable=True)[: parts - 1].sort().values.tolist()
    edges = [0, *(cut + 1 for cut in cuts), total]
    return [stop - start for start, stop in zip(edges, edges[1:])]


def _stretches(doc: Tensor) -> list[tuple[int, int]]:
    """(first, stop) of each document of a row."""
    numbers = doc.tolist()
    edges = [0, *(i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1]), len(numbers)]
    return [(a, b) for a, b in zip(edges, edges[1:]) if numbers[a] != PADDING]

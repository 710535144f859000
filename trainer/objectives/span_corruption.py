"""objective=span_corruption: sentinels replace spans of a text, and the spans follow the text.

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
    """Lengths of the k stretches of a text that stay, and of the k spans, one after each."""

    unmasked: list[int]
    spans: list[int]


class SpanCorruption(Objective):
    """Span corruption of T5 (Raffel et al. 2019, arXiv:1910.10683, 3.1.4) for a single decoder.

    A text of n tokens with k spans becomes a document of n + 2 k + 1 tokens:

        text     Thank you for inviting me to your party last week .
        input    Thank you <0> me to your party <1> week .          role PREFIX, never targets
        answer   <0> for inviting <1> last <2> (end of text)        predicted token by token

    The input's last token predicts the first of the answer. With causal layers the input is read
    from left to right; with prefix attention (model=prefix with length=0) it is seen from both
    sides, which is T5's encoder and decoder in one stack ("prefix LM", section 3.2). Layers that
    see ahead without regard to the role PREFIX would see the answer.

    If the text has the token that ends a document, it moves behind the answer. A text is the part
    of a document that a row holds; rows read fewer tokens of text than they have positions (see
    `reads`), so that nothing is cut off. Where a row of many short texts runs out of room, the last
    ones have fewer spans or none, as has a text of one token.

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
        """Returns (tokens in spans, spans) of a text; (0, 0) where it is too short."""
        if tokens < 2:
            return 0, 0
        # Each span holds a token, and so does each stretch between them.
        noise = min(max(round(tokens * self.noise_density), 1), tokens - 1)
        spans = max(round(noise / self.mean_length), 1)
        return noise, min(spans, noise, tokens - noise)

    def reads(self, context_length: int) -> int:
        """See Objective: the longest text that still fits after it has been corrupted."""
        # The corrupted length grows with the text, so a binary search finds the longest.
        low = 0
        high = context_length
        while low < high:
            middle = (low + high + 1) // 2
            # The token that ends a document only moves, so it takes no further position.
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
        # One more than spans: the last sentinel ends the answer.
        needed = self.counts(self.reads(context_length))[1] + 1
        if self.sentinels is not None and self.sentinels < needed:
            raise ValueError(
                f"objective.sentinels={self.sentinels}, but a row of "
                f"context_length={context_length} may have {needed - 1} "
                f"spans and needs one more; use objective.sentinels={needed} or null, or a "
                "longer objective.mean_length"
            )
        return [(f"<extra_id_{number}>",) for number in range(self.sentinels or needed)]

    def apply(
        self, batch: Batch, rows: Tensor, seed: int, symbols: Symbols, context_length: int
    ) -> Batch:
        """See Objective."""
        span = text_only(batch)
        draws = draw("spans", seed, rows, span, 2)
        shape = (len(batch.tokens), context_length + 1)
        aims = torch.full(shape, IGNORE)
        corrupted_batch = Batch(
            tokens=torch.zeros(shape, dtype=torch.long),
            doc=torch.full(shape, PADDING),
            pos=torch.zeros(shape, dtype=torch.long),
            role=torch.full(shape, TEXT),
            aims=aims,
        )
        for row, tokens in enumerate(batch.tokens[:, :-1]):
            start = 0
            documents = self._documents(tokens, span.doc[row], draws[row], symbols, shape[1])
            for number, text, answer in documents:
                middle = start + len(text)
                stop = middle + len(answer)
                corrupted_batch.tokens[row, start:stop] = torch.tensor([*text, *answer])
                corrupted_batch.doc[row, start:stop] = number
                corrupted_batch.pos[row, start:stop] = torch.arange(stop - start)
                corrupted_batch.role[row, start:middle] = PREFIX
                # Each target stands at the token before it, the first at the end of the input.
                if answer:
                    aims[row, middle - 1 : stop - 1] = torch.tensor(answer)
                start = stop
        return corrupted_batch

    def _documents(
        self, tokens: Tensor, doc: Tensor, draws: Tensor, symbols: Symbols, positions: int
    ) -> Iterator[tuple[int, list[int], list[int]]]:
        """Yields (number, corrupted text, answer) of each document of a row.

        Args:
            tokens: [reads] of the row.
            doc: [reads] documents of the tokens.
            draws: [reads, 2] numbers drawn by address.
            symbols: the vocabulary.
            positions: of the row as the model reads it, with the last, which is only a target.
        """
        free = positions - 1 - int((doc != PADDING).sum())
        for first, stop in _document_ranges(doc):
            text = tokens[first:stop]
            has_end = len(text) > 1 and int(text[-1]) == symbols.end_of_text
            body = text[:-1] if has_end else text
            # A span costs two sentinels, and the answer ends with one more.
            plan = self.plan(draws[first : first + len(body)], (free - 1) // 2)
            corrupted_text, answer = corrupted(body, plan, symbols.special)
            if has_end:
                last_part = answer if answer else corrupted_text
                last_part.append(symbols.end_of_text)
            free -= len(corrupted_text) + len(answer) - len(text)
            yield int(doc[first]), corrupted_text, answer

    def plan(self, lots: Tensor, most: int) -> Plan:
        """Draws the stretches and spans of a text.

        Args:
            lots: [n, 2] float64, for each token two numbers drawn by its address.
            most: number of spans at most; fewer spans then hide fewer tokens.
        """
        noise, spans = self.counts(len(lots))
        if min(spans, most) < 1:
            return Plan([len(lots)], [])
        # Fewer spans must not become longer ones: the model would learn other lengths.
        if spans > most:
            spans = most
            noise = min(noise, max(spans, round(spans * self.mean_length)))
        unmasked_lengths = _divided(lots[:, 0], len(lots) - noise, spans)
        span_lengths = _divided(lots[:, 1], noise, spans)
        return Plan(unmasked_lengths, span_lengths)

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
    """Replaces the spans of a text by sentinels.

    Returns:
        (text with sentinels, answer); the answer is empty where the plan has no spans.
    """
    words = text.tolist()
    if not plan.spans:
        return words, []
    corrupted_text: list[int] = []
    answer: list[int] = []
    start = 0
    for number, unmasked_length in enumerate(plan.unmasked):
        span_start = start + unmasked_length
        span_stop = span_start + plan.spans[number]
        corrupted_text += [*words[start:span_start], sentinels[number]]
        answer += [sentinels[number], *words[span_start:span_stop]]
        start = span_stop
    return corrupted_text, [*answer, sentinels[len(plan.spans)]]


def _divided(lots: Tensor, total: int, parts: int) -> list[int]:
    """Divides `total` into `parts` numbers of at least 1, evenly drawn by its first lots."""
    # The places between total items that have the smallest lots become the cuts.
    cuts = lots[: total - 1].argsort(stable=True)[: parts - 1].sort().values.tolist()
    edges = [0, *(cut + 1 for cut in cuts), total]
    return [stop - start for start, stop in zip(edges, edges[1:])]


def _document_ranges(doc: Tensor) -> list[tuple[int, int]]:
    """Lists (first, stop) of each document of a row, without padding."""
    numbers = doc.tolist()
    edges = [0]
    for position in range(1, len(numbers)):
        if numbers[position] != numbers[position - 1]:
            edges.append(position)
    edges.append(len(numbers))
    ranges = []
    for first, stop in zip(edges, edges[1:]):
        if numbers[first] != PADDING:
            ranges.append((first, stop))
    return ranges

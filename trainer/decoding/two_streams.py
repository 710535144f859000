"""Greedy and beam decoding of models that read a source.

Letters: N sources, K hypotheses of a source, R = N K rows, V vocabulary.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from models.cache.contiguous import Contiguous
from models.cache.decoding_state import DecodingState
from models.micro_batch import MicroBatch
from models.span import PADDING, Span
from parallel.collectives import Communicator
from parallel.decoding_state import ShardedDecodingState
from trainer.data.batch import Batch
from trainer.data.batch_sharding import BatchSharder

NEVER = -torch.inf


class BeamSearch(NamedTuple):
    """Settings of the search for a target.

    Attributes:
        start, end: tokens before and behind every target.
        most: tokens of a target at most.
        beams: K; 1 = greedy, the likeliest token each time.
        length_penalty: alpha; a finished target is rated by log p / ((5 + n) / 6)^alpha.

    Source: Wu et al. 2016 (arXiv:1609.08144), equation 14, without the coverage penalty.
    """

    start: int
    end: int
    most: int
    beams: int = 1
    length_penalty: float = 0.0

    def rated(self, log_probability: float, tokens: int) -> float:
        """Returns the rating of a target of so many tokens, its end among them."""
        return log_probability / ((5 + tokens) / 6) ** self.length_penalty


class Target(NamedTuple):
    """A target: its tokens without start and end, and its rating."""

    tokens: list[int]
    rating: float


# (last token of every row, which row each of them goes on from) -> log-probabilities [R, V]
NextTokens = Callable[[Tensor, Tensor], Tensor]


@torch.no_grad()
def decode(next_tokens: NextTokens, sources: int, search: BeamSearch) -> list[Target]:
    """Returns the best target of each source.

    Args:
        next_tokens: rates the tokens that may come next in every row. Rows are K for each source,
            one after the other; the first call asks with the start.
    """
    beams = search.beams
    rows = torch.arange(sources).repeat_interleave(beams)
    last = torch.full((sources * beams,), search.start)
    logs = torch.full((sources, beams), NEVER, dtype=torch.float64)
    # Equal rows would fill the beam with one hypothesis.
    logs[:, 0] = 0.0
    said: list[list[int]] = [[] for _ in range(sources * beams)]
    finished: list[list[Target]] = [[] for _ in range(sources)]
    for length in range(1, search.most + 1):
        rates = logs.view(-1, 1) + next_tokens(last, rows).double().cpu()
        vocabulary = rates.shape[1]
        best, places = rates.view(sources, -1).topk(min(2 * beams, beams * vocabulary), 1)
        parents: list[int] = []
        tokens: list[int] = []
        for source in range(sources):
            kept: list[tuple[float, int, int]] = []
            for rank, (log, place) in enumerate(
                zip(best[source].tolist(), places[source].tolist(), strict=True)
            ):
                parent = source * beams + place // vocabulary
                token = place % vocabulary
                if token == search.end:
                    # What ends below the beam would not have been a hypothesis.
                    if rank < beams and log > NEVER:
                        finished[source].append(Target(said[parent], search.rated(log, length)))
                elif len(kept) < beams:
                    kept.append((log, parent, token))
            logs[source] = torch.tensor([log for log, _, _ in kept], dtype=torch.float64)
            parents += [parent for _, parent, _ in kept]
            tokens += [token for _, _, token in kept]
        said = [[*said[parent], token] for parent, token in zip(parents, tokens, strict=True)]
        rows = torch.tensor(parents)
        last = torch.tensor(tokens)
        if all(_decided(finished[n], logs[n], length, search) for n in range(sources)):
            break
    return [_best(finished[n], said[n * beams], logs[n], search) for n in range(sources)]


def _decided(found: list[Target], logs: Tensor, length: int, search: BeamSearch) -> bool:
    """Tells whether no hypothesis of a source can become better than what has ended."""
    if not found:
        return False
    best = max(target.rating for target in found)
    log = float(logs.max())
    # Its probability only falls; a longer one may divide it by more.
    return best >= max(search.rated(log, length + 1), search.rated(log, search.most))


def _best(found: list[Target], going_on: list[int], logs: Tensor, search: BeamSearch) -> Target:
    """Returns the best target that has ended; of none the best hypothesis."""
    if found:
        return max(found, key=lambda target: target.rating)
    return Target(going_on, search.rated(float(logs[0]), search.most))


class Continued:
    """Rates next tokens from a decoding state: a token costs one token, and sources are read once.

    Where ranks share rows, each keeps its part of the sources and of the keys of targets, all take
    the same steps, and partial results travel.

    Args:
        model: in evaluation mode.
        source: a document of each row, number 0; where ranks share rows, this rank's tokens of it.
        beams: K.
        state: a blank one, of one device or of the ranks that share rows.
    """

    def __init__(self, model: nn.Module, source: MicroBatch, beams: int, state: DecodingState):
        self.model = model
        self.source: MicroBatch | None = source
        self.device = source.tokens.device
        self.state = state
        self.beams = beams
        self.position = 0

    def __call__(self, last: Tensor, rows: Tensor) -> Tensor:
        """See NextTokens."""
        first = self.source is not None
        if first:
            # All hypotheses begin alike, so the first pass has a row for each source.
            last = last[:: self.beams]
        else:
            self.state.select(rows.to(self.device))
        tokens = last[:, None].to(self.device)
        pos = torch.full_like(tokens, self.position)
        span = Span.of(pos, torch.zeros_like(pos))
        attached = self.state.attach(span, tokens)
        logits = self.model(MicroBatch(tokens, attached, None, self.source))
        self.state.advance()
        self.source = None
        self.position += 1
        if first:
            logits = logits.repeat_interleave(self.beams, 0)
            order = torch.arange(len(last), device=self.device)
            self.state.select(order.repeat_interleave(self.beams))
        return logits[:, 0].double().log_softmax(-1)


def documents(rows: Sequence[Sequence[int]]) -> Batch:
    """Returns rows of one document each, with padding behind them, and a token that is not read."""
    length = max(len(tokens) for tokens in rows) + 1
    tokens = torch.zeros(len(rows), length, dtype=torch.long)
    doc = torch.full_like(tokens, PADDING)
    pos = torch.zeros_like(tokens)
    for row, written in enumerate(rows):
        tokens[row, : len(written)] = torch.tensor(written, dtype=torch.long)
        doc[row, : len(written)] = 0
        pos[row, : len(written)] = torch.arange(len(written))
    return Batch(tokens, doc, pos, torch.zeros_like(tokens))


def translate(
    model: nn.Module, share: BatchSharder, sources: Sequence[Sequence[int]], search: BeamSearch
) -> list[Target]:
    """Returns the best target of each source, the same on every rank. Collective.

    Args:
        model: in evaluation mode.
        share: cuts rows for this rank.
        sources: tokens of each, its end among them where the model was trained on it.
    """
    piece = share.piece(documents(sources))
    state = DecodingState(Contiguous())
    if share.mesh.context.size > 1:
        state = ShardedDecodingState(Contiguous(), Communicator(share.mesh.context.group))
    # Every row numbers its document by itself: the row of a target has only this source.
    source = MicroBatch(piece.tokens, piece.span)
    return decode(Continued(model, source, search.beams, state), len(sources), search)

"""Compressive scan: a memory of fixed size, written segment by segment.

Within a segment, the memory is read as it was before that segment:

    closed += pending, pending = 0               at the first token of a segment
    o_t = q_t closed
    pending += k_t (v_t - w_t (k_t closed))      w_t is 0 under the linear rule

All of it is affine in (closed, pending), so a run of tokens has a summary of fixed size, wherever
segments lie in it. A document that opens starts from an empty memory; padding leaves it alone.

The primitive has no parameters. Letters: B rows, T tokens, H query heads, G key heads, D key width,
E value width, R runs, N chunks, C slots, P pieces.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from models.carried_state import SHARDED, StatefulModule
from models.kernels.scan_chunks import Runs
from models.kernels.segment_chunks import SegmentChunks, segment_chunks
from models.primitive import Primitive
from models.primitives.scan import RunSummary
from models.scores import Tensors
from models.span import Span, to_device


class CompressiveScan(Primitive, StatefulModule):
    """A segmented memory on one device, which holds all tokens.

    Args:
        segment: tokens in a segment, counted from the first token of the document; None: a row is
            one segment, and reads the memory that earlier rows left.

    Every call takes query (q [B, T, H, D],) and payload (k [B, T, G, D], v [B, T, G, E]) or (k, v,
    w [B, T, G]); query head h reads memory h // (H / G). The memory is float32, or float64 where
    the inputs are. A state is (closed, pending), as a matrix [2, D E] without w and [2 D, E] with
    it.

    Source: the algebra of Infini-attention (Munkhdalai et al. 2024, arXiv:2404.07143). Theirs goes
    through segments one by one; ours sums up all of them at once and then passes memories along.
    """

    continues_rows = True
    counts_flops = False  # the count has always left segment memories out; so their MFU is a floor

    def __init__(self, segment: int | None = None):
        super().__init__()
        self.segment = segment

    def forward(
        self, query: Tensors, payload: Tensors, params: Tensors = (), *, span: Span
    ) -> Tensor:
        """Returns the answers of the memory, [B, T, H, E]; 0 at padding."""
        work = self.open(query, payload, span=span)
        states = work.blank()
        if span.past is not None:
            carried = span.past.state(self.place)
            if carried is not None:
                states = carried.to(states.dtype).view_as(states)
        output = work.read(states)
        if span.past is not None:
            final = work.final_states(states)
            # A piece of a row does not close the segment that the row is.
            next_row = self.carried(final) if span.past.closes_row else final
            span.past.store(self.place, next_row.flatten(0, 2), SHARDED)
        return output

    def open(
        self, query: Tensors, payload: Tensors, *, span: Span, runs: Runs | None = None
    ) -> "CompressiveWork":
        """Computes everything that does not depend on the states that come into the runs.

        Args:
            runs: tokens of each run of each row, in their order in the row; one run by default.
        """
        plan = segment_chunks(span, self.segment, runs)
        wide = torch.promote_types(query[0].dtype, torch.float32)
        q, *rest = [plan.deal(tensor).to(wide) for tensor in (*query, *payload)]
        return CompressiveWork(q, rest, plan, span.shape[0], query[0].dtype)

    def carried(self, state: Tensor) -> Tensor:
        """Returns the state that the next row starts from.

        Where a row is a segment, the segment closes with the row.
        """
        if self.segment is not None:
            return state
        closed, pending = state.chunk(2, -2)
        return torch.cat([closed + pending, torch.zeros_like(pending)], -2)


class CompressiveWork:
    """The part of a compressive scan that does not depend on the incoming states.

    Attributes:
        gain: [P, G, D, E]; a piece adds gain - take @ closed to the pending memory.
        take: [P, G, D, D], or None under the linear rule.
    """

    def __init__(
        self, q: Tensor, payload: Tensors, plan: SegmentChunks, rows: int, dtype: torch.dtype
    ):
        k, v, *weight = payload
        self.q = q
        self.plan = plan
        self.rows = rows
        self.dtype = dtype
        self.gain = plan.sums(k.mT @ v)
        self.take = None
        if weight:
            self.take = plan.sums((k * weight[0][..., None]).mT @ k)

    @property
    def _shape(self) -> tuple[int, ...]:
        """(B, R, G, rows and columns of a state)."""
        _, heads, width, values = self.gain.shape
        if self.take is None:
            # The linear rule treats all entries of a memory alike: a keep is [2, 2].
            matrix = (2, width * values)
        else:
            matrix = (2 * width, values)
        return (*self.plan.last.shape, heads, *matrix)

    def blank(self) -> Tensor:
        """Returns empty incoming states, [B, R, G, ...]."""
        return self.gain.new_zeros(self._shape)

    def summarise(self) -> RunSummary:
        """Returns the effect of every run on a state: keep [B, R, 1 or G, 2 (D), 2 (D)], gain."""
        opened = self.plan.opened
        zero = self.gain[:0].sum()  # a rank without tokens builds the same graph as the others
        if self.take is None:
            stays = to_device(STAYS, opened.device, self.gain.dtype)
            closes = to_device(CLOSES, opened.device, self.gain.dtype)
            keep = torch.where(self.plan.began[..., None, None], closes, stays)
            keep = keep.masked_fill(opened[..., None, None], 0)[:, :, None]
            return RunSummary(keep, self.final_states(self.blank()) + zero, opened)
        # The keep of a run is carried along as further columns that start from the identity.
        _, heads, width, values = self.gain.shape
        identity = torch.eye(2 * width, dtype=self.gain.dtype, device=opened.device)
        states = F.pad(identity, (values, 0))
        states = states.expand(*opened.shape, heads, 2 * width, values + 2 * width)
        _, final = self._pass(states, F.pad(self.gain, (0, 2 * width)))
        gain, keep = final.split([values, 2 * width], -1)
        return RunSummary(keep, gain + zero, opened)

    def read(self, states: Tensor) -> Tensor:
        """Returns the answers [B, T, H, E], 0 at padding, given the states before each run."""
        closed, _ = self._pass(states, self.gain)
        closed = closed[self.plan.piece]  # [N, G, D, E]
        q = self.q.unflatten(1, (closed.shape[1], -1))
        answers = (q.flatten(2, 3) @ closed).view(*q.shape[:-1], closed.shape[-1])
        return self.plan.collect(answers.flatten(1, 2), self.rows).to(self.dtype)

    def final_states(self, states: Tensor) -> Tensor:
        """Returns the states just after each run, given those just before."""
        _, final = self._pass(states, self.gain)
        return final

    def _pass(self, states: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (closed [P, G, D, E] as every piece reads it, the states after each run)."""
        plan = self.plan
        shape = states.shape
        flat = states.reshape(-1, shape[2], 2, gain.shape[2], gain.shape[3])
        # A chain that starts from nothing names the appended state of zeros as its source.
        sources = F.pad(flat, [0, 0] * 4 + [0, 1])[plan.source]
        closed, pending = sources.unbind(2)
        begins = plan.begins[:, None, None, None]
        read = []
        ended = []
        for first, stop in plan.steps():
            closed, pending = _continuing(closed, pending, stop - first, ended)
            segment_begins = begins[first:stop]
            closed = torch.where(segment_begins, closed + pending, closed)
            pending = torch.where(segment_begins, 0, pending)
            read.append(closed)
            pending = pending + gain[first:stop]
            if self.take is not None:
                pending = pending - self.take[first:stop] @ closed
        _continuing(closed, pending, 0, ended)
        # Chains end from the shortest, which come last, to the longest.
        after = torch.cat(ended[::-1])[plan.last]  # [B, R, G, 2, D, E]
        return torch.cat([*read, closed[:0]]), after.flatten(-3).view(shape)


# keep of a run in which no segment begins, and of one in which at least one does
STAYS = ((1.0, 0.0), (0.0, 1.0))
CLOSES = ((1.0, 1.0), (0.0, 0.0))


def _continuing(
    closed: Tensor, pending: Tensor, count: int, ended: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """Returns the states of the first `count` chains; appends those of the others to `ended`."""
    ended.append(torch.stack([closed[count:], pending[count:]], 2))
    return closed[:count], pending[:count]

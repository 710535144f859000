"""Compress: a memory of fixed size that is written segment by segment, and read as it was before
the segment at hand.

    closed += pending, pending = 0               at the first token of a segment
    o_t = q_t closed
    pending += k_t (v_t - w_t (k_t closed))      w_t is 0 under the linear rule

All of it is affine in (closed, pending), so a run of tokens has a summary of fixed size, wherever
segments lie in it. A document that opens starts from nothing; padding leaves the memory alone.

A leaf without parameters. Letters: B rows, T tokens, H query heads, G key heads, D key width, E
value width, R runs, N chunks, C slots, P pieces.
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
from models.span import Span


class CompressiveScan(Primitive, StatefulModule):
    """One device: all tokens are at hand.

    Args:
        segment: tokens of a document to a segment, counted from its first token; None: a row is one
            segment, and reads what the rows before it left.

    Every call takes query (q [B, T, H, D],) and payload (k [B, T, G, D], v [B, T, G, E]) or (k, v,
    w [B, T, G]); query head h reads memory h // (H / G). The memory is float32, or float64 where
    the inputs are. A state is (closed, pending), as a matrix [2, D E] without w and [2 D, E] with
    it.

    Source: the algebra of Infini-attention (Munkhdalai et al. 2024, arXiv:2404.07143). Theirs goes
    through segments one by one; ours sums all of them up at once and then passes memories along.
    """

    counts_flops = False  # the count has always left segment memories out; so their MFU is a floor

    def __init__(self, segment: int | None = None):
        super().__init__()
        self.segment = segment

    def forward(
        self, query: Tensors, payload: Tensors, params: Tensors = (), *, span: Span
    ) -> Tensor:
        """[B, T, H, E]: what the memory answers; 0 at padding."""
        work = self.open(query, payload, span=span)
        states = work.blank()
        if span.past is not None:
            found = span.past.state(self.place)
            states = states if found is None else found.to(states.dtype).view_as(states)
        out = work.read(states)
        if span.past is not None:
            span.past.store(
                self.place, self.carried(work.final_states(states)).flatten(0, 2), SHARDED
            )
        return out

    def open(
        self, query: Tensors, payload: Tensors, *, span: Span, runs: Runs | None = None
    ) -> "CompressiveWork":
        """What can be done before the states are known that come into the runs; see Work.

        Args:
            runs: tokens of each run of each row, in the order in which they lie; one run by
                default.
        """
        plan = segment_chunks(span, self.segment, runs)
        wide = torch.promote_types(query[0].dtype, torch.float32)
        q, *rest = (plan.deal(x).to(wide) for x in (*query, *payload))
        return CompressiveWork(q, rest, plan, span.shape[0], query[0].dtype)

    def carried(self, state: Tensor) -> Tensor:
        """A state as the next row takes it: where a row is a segment, it closes with the row."""
        if self.segment is not None:
            return state
        closed, pending = state.chunk(2, -2)
        return torch.cat([closed + pending, torch.zeros_like(pending)], -2)


class CompressiveWork:
    """The part that does not depend on the states that come into runs.

    Attributes: gain: [P, G, D, E] and take: [P, G, D, D] or None: a piece adds gain - take closed
        to what is pending.
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
        self.take = plan.sums((k * weight[0][..., None]).mT @ k) if weight else None

    @property
    def _shape(self) -> tuple[int, ...]:
        """(B, R, G, rows and columns of a state)."""
        _, heads, width, values = self.gain.shape
        matrix = (2, width * values) if self.take is None else (2 * width, values)
        return (*self.plan.last.shape, heads, *matrix)

    def blank(self) -> Tensor:
        """[B, R, G, ...]: nothing comes into any run."""
        return self.gain.new_zeros(self._shape)

    def summarise(self) -> RunSummary:
        """What every run does to a state: keep [B, R, 1 or G, 2 (D), 2 (D)] times it, and gain."""
        opened = self.plan.opened
        tie = self.gain[:0].sum()  # 0: a rank without tokens builds the same graph as the others
        if self.take is None:
            stays, closes = (
                torch.tensor(x, dtype=self.gain.dtype, device=opened.device)
                for x in (STAYS, CLOSES)
            )
            keep = torch.where(self.plan.began[..., None, None], closes, stays)
            keep = keep.masked_fill(opened[..., None, None], 0)[:, :, None]
            return RunSummary(keep, self.final_states(self.blank()) + tie, opened)
        _, heads, width, values = self.gain.shape
        one = torch.eye(2 * width, dtype=self.gain.dtype, device=opened.device)
        states = F.pad(one, (values, 0)).expand(*opened.shape, heads, 2 * width, values + 2 * width)
        gain, keep = self._pass(states, F.pad(self.gain, (0, 2 * width)))[1].split(
            [values, 2 * width], -1
        )
        return RunSummary(keep, gain + tie, opened)

    def read(self, states: Tensor) -> Tensor:
        """[B, T, H, E], given the state just before each run; 0 at padding."""
        closed = self._pass(states, self.gain)[0][self.plan.piece]  # [N, G, D, E]
        q = self.q.unflatten(1, (closed.shape[1], -1))
        out = (q.flatten(2, 3) @ closed).view(*q.shape[:-1], closed.shape[-1]).flatten(1, 2)
        return self.plan.collect(out, self.rows).to(self.dtype)

    def final_states(self, states: Tensor) -> Tensor:
        """The state just after each run, given the one just before each."""
        return self._pass(states, self.gain)[1]

    def _pass(self, states: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
        """(closed [P, G, D, E] as every piece reads it, the states after each run)."""
        plan = self.plan
        shape = states.shape
        flat = states.reshape(-1, shape[2], 2, gain.shape[2], gain.shape[3])
        closed, pending = F.pad(flat, [0, 0] * 4 + [0, 1])[plan.source].unbind(2)
        begins = plan.begins[:, None, None, None]
        read = []
        ended = []
        for first, stop in plan.steps():
            closed, pending = _until(closed, pending, stop - first, ended)
            shut = begins[first:stop]
            closed = torch.where(shut, closed + pending, closed)
            pending = torch.where(shut, 0, pending)
            read.append(closed)
            pending = pending + gain[first:stop]
            if self.take is not None:
                pending = pending - self.take[first:stop] @ closed
        _until(closed, pending, 0, ended)
        after = torch.cat(ended[::-1])[plan.last]  # [B, R, G, 2, D, E]
        return torch.cat([*read, closed[:0]]), after.flatten(-3).view(shape)


# what a run in which no segment begins, or some, keeps
STAYS = ((1.0, 0.0), (0.0, 1.0))
CLOSES = ((1.0, 1.0), (0.0, 0.0))


def _until(
    closed: Tensor, pending: Tensor, count: int, ended: list[Tensor]
) -> tuple[Tensor, Tensor]:
    """The first `count` chains; the others have ended, and are put aside."""
    ended.append(torch.stack([closed[count:], pending[count:]], 2))
    return closed[:count], pending[:count]

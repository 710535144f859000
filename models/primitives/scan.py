"""Scan: a state carried from left to right, affine in the state.

    S_t = diag(w_t) S_{t-1} + b_t (a_t S_{t-1}) + k_t v_t        o_t = q_t S_t   (or q_t S_{t-1})

The effect of a run of tokens on the state has a summary of fixed size. Three forms compute the
same: `forward` (in chunks, for training), `recur` (token by token, for decoding: only the state is
kept), and `open`, which gives the summaries of runs and the output from any state (for drivers). A
document that opens starts from an empty state; padding leaves the state alone, wherever it lies.
Where rows continue earlier ones (Span.past), so does the state; a gradient flows through it only
where one row came in pieces.

The primitive has no parameters. Letters: B rows, T tokens, H heads, D key width, E value width, R
runs; "h" is H or 1.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from models.carried_state import SHARDED, StatefulModule
from models.kernels import scan_chunkwise, scan_fla
from models.kernels.scan_chunks import ChunkLayout, Runs, chunk_layout
from models.kernels.scan_recompute import (
    recomputed_chunks,
    recomputed_reads,
    recomputed_summary,
)
from models.kernels.varlen import varlen_layout
from models.primitive import Primitive
from models.scores import Tensors
from models.span import Span

FEW = 4  # tokens of a row up to which a decoding scan goes token by token
CHUNK = 64  # tokens to a chunk, a power of two; shorter where every document is


class RunSummary(NamedTuple):
    """The effect of each run on a state: S becomes keep S + gain.

    Attributes:
        keep: [B, R, h, 1 or D] (diagonal) or [B, R, H, D, D].
        gain: [B, R, H, D, E].
        opened: [B, R] bool; keep is 0 where it is True.
    """

    keep: Tensor
    gain: Tensor
    opened: Tensor


class Scan(Primitive, StatefulModule):
    """A linear recurrence over the tokens of one device.

    Args:
        before: whether a token reads the state before its own update (RWKV-6), not after.
        chunk: largest number of tokens in a chunk, a power of two.

    Every call takes query (q,) and payload (k, v, decay) or (k, v, decay, a, b): q, k, a, b [B, T,
    h, D], v [B, T, H, E], decay in nats per token, at most 0 (minus infinity forgets all): [B, T,
    h], or [B, T, h, D] for a decay per channel. The state is float32, or float64 where the inputs
    are.

    Source: the algebra of gated linear attention (arXiv:2312.06635) and of the delta rule
    (arXiv:2412.06464).
    """

    continues_rows = True

    def __init__(self, *, before: bool = False, chunk: int = CHUNK):
        super().__init__()
        if chunk < 1 or chunk & (chunk - 1):
            raise ValueError(
                f"chunk={chunk}: must be a power of two, because a chunk is halved again and again;"
                " choose 16, 32 or 64"
            )
        self.before = before
        self.chunk = chunk

    def forward(
        self, query: Tensors, payload: Tensors, params: Tensors = (), *, span: Span
    ) -> Tensor:
        """Returns the outputs [B, T, H, E], 0 at padding.

        The state begins empty, or as the rows before left it.
        """
        if span.past is not None and span.past.continues_rows and span.shape[1] <= FEW:
            return self._step(query, payload, span)
        work = self.open(query, payload, span=span)
        states = work.blank()
        if span.past is not None:
            carried = span.past.state(self.place)
            if carried is not None:
                states = carried.view_as(states).to(states.dtype)
            graph = span.past.carries_gradient and torch.is_grad_enabled()
            with torch.set_grad_enabled(graph):
                span.past.store(self.place, work.final_states(states).flatten(0, 2), SHARDED)
        return work.read(states)

    def _step(self, query: Tensors, payload: Tensors, span: Span) -> Tensor:
        """Continues rows by a few tokens: chunks would cost more than they save."""
        rows = span.shape[0]
        state = span.past.state(self.place)
        if state is not None:
            state = state.unflatten(0, (rows, -1))
        output, state = self.recur(query, payload, span=span, state=state)
        span.past.store(self.place, state.flatten(0, 1), SHARDED)
        return output

    def open(
        self,
        query: Tensors,
        payload: Tensors,
        *,
        span: Span,
        runs: Runs | None = None,
        shares: int = 0,
    ) -> "ScanWork | scan_fla.FlaScan":
        """Computes what does not depend on the states that come into the runs.

        Args:
            runs: tokens of each run of each row, in their order in the row; one run by default.
            shares: what the summaries do not need is computed later, in about so many shares
                (`read_ahead`), where a kernel can part the two; 0: everything now, which takes less
                memory in backward.
        """
        kernel = scan_fla.select_kernel(query, payload, before=self.before)
        if kernel is not None:
            return scan_fla.FlaScan(*kernel, query[0], payload, varlen_layout(span, runs))
        plan = chunk_layout(span, _size(self.chunk, span.shape[1]), runs)
        wide = torch.promote_types(query[0].dtype, torch.float32)
        q, *rest = [plan.deal(tensor).to(wide) for tensor in (*query, *payload)]
        if shares and len(rest) == 3:
            summary = recomputed_summary(tuple(rest))
            later = self._shares(q, rest, shares)
            return ScanWork(*summary, plan, query[0].dtype, later)
        own, reader, keep, gain = recomputed_chunks(q, tuple(rest), before=self.before)
        return ScanWork(keep, gain, plan, query[0].dtype, [lambda: (own, reader)])

    def _shares(self, query: Tensor, payload: Sequence[Tensor], count: int) -> list["Reads"]:
        """Returns what computes the reads of one stretch of chunks after the other."""
        size = max(1, -(-query.shape[1] // count))
        # A split, whose gradients are joined once; a slice would fill each up with zeros.
        pieces = zip(*(tensor.split(size, 1) for tensor in (query, *payload)), strict=True)
        return [
            partial(recomputed_reads, piece[0], piece[1:], before=self.before) for piece in pieces
        ]

    def recur(
        self, query: Tensors, payload: Tensors, *, span: Span, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Computes the recurrence token by token.

        Returns:
            (outputs [B, T, H, E], the state [B, H, D, E] after the last token).
        """
        wide = torch.promote_types(query[0].dtype, torch.float32)
        q, k, v, decay, *low_rank = [tensor.to(wide) for tensor in (*query, *payload)]
        log_decay = decay if decay.dim() == 4 else decay[..., None]
        if state is None:
            state = v.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3])
        opens = span.opens()[..., None, None, None].unbind(1)
        valid = span.valid()[..., None, None, None].unbind(1)
        outputs = []
        for t in range(span.shape[1]):
            previous = torch.where(opens[t], 0, state)
            update = k[:, t, :, :, None] * v[:, t, :, None]
            current = log_decay[:, t, ..., None].exp() * previous + update
            if low_rank:
                a, b = low_rank
                current = current + b[:, t, ..., None] * (a[:, t, :, None] @ previous)
            readable = previous if self.before else current
            output = (q[:, t, :, None] @ readable)[:, :, 0]
            outputs.append(torch.where(valid[t][..., 0], output, 0))
            state = torch.where(valid[t], current, state)
        return torch.stack(outputs, 1).to(query[0].dtype), state


def _size(chunk: int, tokens: int) -> int:
    """Returns the chunk size for rows of `tokens` tokens: a power of two, at most `chunk`."""
    next_power = 1 << max(0, tokens - 1).bit_length()
    return min(chunk, next_power)


# Computes (own, reader) of AffineChunks for a stretch of chunks.
Reads = Callable[[], tuple[Tensor, Tensor]]


class ScanWork:
    """The part of a scan that does not depend on the incoming states.

    It is computed once; a driver reads it twice, for the summary and for the output.

    Args:
        keep, gain: as in AffineChunks.
        later: what computes own and reader, stretch by stretch.
    """

    def __init__(
        self,
        keep: Tensor,
        gain: Tensor,
        plan: ChunkLayout,
        dtype: torch.dtype,
        later: Sequence[Reads],
    ):
        self.keep = keep
        self.gain = gain
        self.plan = plan
        self.dtype = dtype
        self.later = list(later)
        self.reads: list[tuple[Tensor, Tensor]] = []

    def blank(self) -> Tensor:
        """Returns empty incoming states, [B, R, H, D, E]."""
        gain = self.gain
        return gain.new_zeros(gain.shape[0], self.plan.ends.shape[1], *gain.shape[2:])

    def read_ahead(self) -> None:
        """Computes a share of what `read` needs beside the states, while those travel."""
        if self.later:
            self.reads.append(self.later.pop(0)())

    def summarise(self) -> RunSummary:
        """Returns the effect of every run on a state that passes through it."""
        keep = self.keep
        gain = self.gain
        opened = self.plan.opened
        blank = self.blank()
        if keep.dim() == gain.dim():
            # A dense keep of a run is the product of those of its chunks. It is carried along as
            # further columns of the state, which start from the identity and gain nothing.
            width = keep.shape[-1]
            identity = torch.eye(width, dtype=keep.dtype, device=keep.device)
            identity = identity.expand(*blank.shape[:-1], width)
            wide_gain = torch.cat([gain, torch.zeros_like(keep)], -1)
            final = self._final(torch.cat([blank, identity], -1), wide_gain)
            run_gain, run_keep = final.split([gain.shape[-1], width], -1)
        else:
            run_gain = self._final(blank, gain)
            run_keep = self._diagonal_keep(keep)
        reset = opened.view(*opened.shape, *[1] * (run_keep.dim() - 2))
        return RunSummary(torch.where(reset, 0, run_keep), run_gain, opened)

    def read(self, states: Tensor) -> Tensor:
        """Returns the outputs [B, T, H, E], 0 at padding.

        Args:
            states: [B, R, H, D, E] just before each run.
        """
        while self.later:
            self.read_ahead()
        before = self._chunk_states(states, self.gain)
        sizes = [own.shape[1] for own, _ in self.reads]
        outputs = []
        for (own, reader), stretch in zip(self.reads, before.split(sizes, 1)):
            outputs.append(own + reader @ stretch)
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        return self.plan.collect(output).to(self.dtype)

    def final_states(self, states: Tensor) -> Tensor:
        """Returns the states just after each run, given those before, [B, R, H, D, E]."""
        return self._final(states, self.gain)

    def _chunk_states(self, states: Tensor, gain: Tensor) -> Tensor:
        """Returns the state before every chunk, [B, N, H, D, E]."""
        empty = torch.zeros_like(states[:, :1])  # number 0 among the starts: BLANK
        starts = torch.cat([empty, states], 1)
        return scan_chunkwise.carry_states(self.keep, gain, starts, self.plan.origins)

    def _final(self, states: Tensor, gain: Tensor) -> Tensor:
        rows = torch.arange(len(gain), device=gain.device)[:, None]
        ends = self.plan.ends
        before = self._chunk_states(states, gain)[rows, ends]
        return scan_chunkwise.apply_keep(self.keep[rows, ends], before) + gain[rows, ends]

    def _diagonal_keep(self, keep: Tensor) -> Tensor:
        """Returns the product of the diagonal keeps over each run, [B, R, h, 1 or D].

        1 for a run in which a document opens.
        """
        ends = self.plan.ends
        begins = torch.cat([torch.zeros_like(ends[:, :1]), ends[:, :-1] + 1], 1)
        number = torch.arange(self.plan.count, device=ends.device)
        inside = (number >= begins[..., None]) & (number <= ends[..., None])
        # Masked before the product: its gradient would connect documents.
        inside &= ~self.plan.opened[..., None]
        return torch.where(inside[..., None, None], keep[:, None], 1).prod(2)

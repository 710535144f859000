"""Scan: a state carried left to right, affine in the state. What a run of tokens does to it has a
summary of fixed size.

    S_t = diag(w_t) S_{t-1} + b_t (a_t S_{t-1}) + k_t v_t        o_t = q_t S_t   (or q_t S_{t-1})

Three forms that are one thing: `forward` (in chunks, for training), `recur` (token by token, for
decoding: the state is all that is kept of the past), and `open`, whose work gives summaries and
runs from any state (what parallel/ drives). A document that opens starts from nothing; padding
leaves the state alone, wherever it lies. Where rows go on from those before (Span.past), the state
does too, and nothing is learned through it.

A leaf without parameters. Letters: B rows, T tokens, H heads, D key width, E value width, R runs;
"h" is H or 1.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from models.carried_state import SHARDED, StatefulModule
from models.kernels import scan_chunkwise, scan_fla
from models.kernels.scan_chunks import ChunkLayout, Runs, chunk_layout
from models.kernels.scan_recompute import recomputed_chunks
from models.kernels.varlen import varlen_layout
from models.primitive import Primitive
from models.scores import Tensors
from models.span import Span

CHUNK = 64  # tokens to a chunk, a power of two; shorter where every document is


class RunSummary(NamedTuple):
    """What each run does to a state: S becomes keep S + gain, or gain alone where a document opens.

    Attributes:
        keep: [B, R, h, 1 or D] (diagonal) or [B, R, H, D, D].
        gain: [B, R, H, D, E].
        opened: [B, R] bool; keep is 0 where it is True.
    """

    keep: Tensor
    gain: Tensor
    opened: Tensor


class Scan(Primitive, StatefulModule):
    """A linear recurrence over the tokens at hand.

    Args:
        before: read the state as it was before the token's own update (RWKV-6), not after.
        chunk: most tokens to a chunk, a power of two.

    Every call takes query (q,) and payload (k, v, decay) or (k, v, decay, a, b): q, k, a, b [B, T,
    h, D], v [B, T, H, E], decay in nats per token, at most 0 (minus infinity forgets all): [B, T,
    h], or [B, T, h, D] for a decay per channel. The state is float32, or float64 where the inputs
    are.

    Source: the algebra of gated linear attention (arXiv:2312.06635) and of the delta rule
    (arXiv:2412.06464).
    """

    def __init__(self, *, before: bool = False, chunk: int = CHUNK):
        super().__init__()
        if chunk < 1 or chunk & (chunk - 1):
            raise ValueError(
                f"chunk={chunk} is no power of two; a chunk is halved again and again, choose 16,"
                " 32 or 64"
            )
        self.before = before
        self.chunk = chunk

    def forward(
        self, query: Tensors, payload: Tensors, params: Tensors = (), *, span: Span
    ) -> Tensor:
        """[B, T, H, E]: the recurrence from an empty state, or from what the rows before left; 0 at
        padding."""
        work = self.open(query, payload, span=span)
        states = work.blank()
        if span.past is not None:
            found = span.past.state(self.place)
            states = states if found is None else found.view_as(states).to(states.dtype)
            with torch.no_grad():
                span.past.store(self.place, work.final_states(states).flatten(0, 2), SHARDED)
        return work.read(states)

    def open(
        self, query: Tensors, payload: Tensors, *, span: Span, runs: Runs | None = None
    ) -> "ScanWork | scan_fla.FlaScan":
        """What can be done before the states are known that come into the runs; see Work.

        Args:
            runs: tokens of each run of each row, in the order in which they lie; one run by
                default.
        """
        found = scan_fla.select_kernel(query, payload, before=self.before)
        if found is not None:
            return scan_fla.FlaScan(*found, query[0], payload, varlen_layout(span, runs))
        plan = chunk_layout(span, _size(self.chunk, span.shape[1]), runs)
        wide = torch.promote_types(query[0].dtype, torch.float32)
        q, *rest = (plan.deal(x).to(wide) for x in (*query, *payload))
        return ScanWork(recomputed_chunks(q, tuple(rest), before=self.before), plan, query[0].dtype)

    def recur(
        self, query: Tensors, payload: Tensors, *, span: Span, state: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Token by token from a state: ([B, T, H, E], the state [B, H, D, E] after the last
        token)."""
        wide = torch.promote_types(query[0].dtype, torch.float32)
        q, k, v, decay, *low = (x.to(wide) for x in (*query, *payload))
        log = decay if decay.dim() == 4 else decay[..., None]
        if state is None:
            state = v.new_zeros(v.shape[0], v.shape[2], k.shape[3], v.shape[3])
        opens, valid = (x[..., None, None, None].unbind(1) for x in (span.opens(), span.valid()))
        out = []
        for t, (q_t, k_t, v_t, log_t, *low_t) in enumerate(
            zip(*(x.unbind(1) for x in (q, k, v, log, *low)))
        ):
            held = torch.where(opens[t], 0, state)
            then = log_t[..., None].exp() * held + k_t[..., None] * v_t[:, :, None]
            if low_t:
                then = then + low_t[1][..., None] * (low_t[0][:, :, None] @ held)
            seen = held if self.before else then
            out.append(torch.where(valid[t][..., 0], (q_t[:, :, None] @ seen)[:, :, 0], 0))
            state = torch.where(valid[t], then, state)
        return torch.stack(out, 1).to(query[0].dtype), state


def _size(chunk: int, tokens: int) -> int:
    """A chunk no longer than need be: the next power of two from `tokens`, at most `chunk`."""
    return min(chunk, 1 << max(0, tokens - 1).bit_length())


class ScanWork:
    """The part of a scan that does not depend on the states that come in: done once, read twice by
    a driver."""

    def __init__(self, affine: scan_chunkwise.AffineChunks, plan: ChunkLayout, dtype: torch.dtype):
        self.affine = affine
        self.plan = plan
        self.dtype = dtype

    def blank(self) -> Tensor:
        """[B, R, H, D, E]: nothing comes into any run."""
        gain = self.affine.gain
        return gain.new_zeros(gain.shape[0], self.plan.ends.shape[1], *gain.shape[2:])

    def summarise(self) -> RunSummary:
        """What every run does to a state that passes through it."""
        keep = self.affine.keep
        gain = self.affine.gain
        opened = self.plan.opened
        blank = self.blank()
        if keep.dim() == gain.dim():  # carried along as further columns, starting from the identity
            width = keep.shape[-1]
            one = torch.eye(width, dtype=keep.dtype, device=keep.device).expand(
                *blank.shape[:-1], width
            )
            wide = torch.cat([gain, torch.zeros_like(keep)], -1)
            added, kept = self._leave(torch.cat([blank, one], -1), wide).split(
                [gain.shape[-1], width], -1
            )
        else:
            added = self._leave(blank, gain)
            kept = self._kept(keep)
        shut = opened.view(*opened.shape, *[1] * (kept.dim() - 2))
        return RunSummary(torch.where(shut, 0, kept), added, opened)

    def read(self, states: Tensor) -> Tensor:
        """[B, T, H, E], given the state [B, R, H, D, E] just before each run; 0 at padding."""
        before = self._states(states, self.affine.gain)
        out = self.affine.own + self.affine.reader @ before
        return self.plan.collect(out).to(self.dtype)

    def final_states(self, states: Tensor) -> Tensor:
        """[B, R, H, D, E]: the state just after each run, given the one just before each."""
        return self._leave(states, self.affine.gain)

    def _states(self, states: Tensor, gain: Tensor) -> Tensor:
        starts = torch.cat([torch.zeros_like(states[:, :1]), states], 1)
        return scan_chunkwise.carry_states(self.affine.keep, gain, starts, self.plan.origins)

    def _leave(self, states: Tensor, gain: Tensor) -> Tensor:
        rows = torch.arange(len(gain), device=gain.device)[:, None]
        ends = self.plan.ends
        before = self._states(states, gain)[rows, ends]
        return scan_chunkwise.apply_keep(self.affine.keep[rows, ends], before) + gain[rows, ends]

    def _kept(self, keep: Tensor) -> Tensor:
        """[B, R, h, 1 or D]: the product of the diagonal keeps over each run in which no document
        opens, else 1."""
        ends = self.plan.ends
        begins = torch.cat([torch.zeros_like(ends[:, :1]), ends[:, :-1] + 1], 1)
        number = torch.arange(self.plan.count, device=ends.device)
        inside = (number >= begins[..., None]) & (number <= ends[..., None])
        inside &= ~self.plan.opened[
            ..., None
        ]  # masked before the product, whose gradient would bring documents together
        return torch.where(inside[..., None, None], keep[:, None], 1).prod(2)

"""Chunkwise form of a scan, in torch: a chunk is affine in the state, and states pass along chunks.

    S_t = diag(w_t) S_{t-1} + b_t (a_t S_{t-1}) + k_t v_t        o_t = q_t S_t   (or q_t S_{t-1})

Within a chunk, the decay between two tokens is exp of a sum of the log decays that lie between
them, never a quotient of products and never a difference of long sums: nothing overflows and
nothing cancels, however strong the decay.

Letters: B rows, N chunks, C slots, H heads, D key width, E value width. "h" is H, or 1 where all
heads share.
Sources: Yang et al. 2023 (arXiv:2312.06635) for gates in chunks, Yang et al. 2024
(arXiv:2406.06484) for the delta rule. Ours halves a chunk down to single tokens in place of one
secondary level with a reference gate, and solves one triangular system for keys and values
together.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from models.kernels.scan_chunks import CONTINUE
from models.span import to_device


class AffineChunks(NamedTuple):
    """The effect of every chunk: out = own + reader @ S, and S becomes keep S + gain.

    Attributes:
        own: [B, N, H, C, E].
        reader: [B, N, H, C, D].
        keep: [B, N, h, 1 or D] (diagonal) or [B, N, H, D, D].
        gain: [B, N, H, D, E].
    """

    own: Tensor
    reader: Tensor
    keep: Tensor
    gain: Tensor


# (tensor [..., C, D], whether it reads the state before the token's own update)
TileRows = list[tuple[Tensor, bool]]


def affine_chunks(query: Tensor, payload: tuple[Tensor, ...], *, before: bool) -> AffineChunks:
    """Computes all chunks at once.

    Args:
        query: [B, N, h, C, D].
        payload: keys [B, N, h, C, D], values [B, N, H, C, E], log decays [B, N, h, C] or [B, N, h,
            C, D] (at most 0), and for the low-rank term a and b [B, N, h, C, D].
        before: whether a token reads the state before its own update.
    """
    k, v, decay, *low_rank = payload
    if not low_rank:
        return AffineChunks(
            *chunk_reads(query, payload, before=before),
            *chunk_summary(payload),
        )
    a, b = low_rank
    log_decay = _per_channel(payload)
    through, past = _decay_sums(log_decay)
    fade = _fade(log_decay)
    near = _near([(query, before), (a, True)], [k, b], decay, log_decay)
    reader = query * (past if before else through).exp()
    keep = through[..., -1, :].exp()
    gain = (k * fade).mT @ v
    # With the low-rank term, the reads u_t = a_t S_{t-1} depend on earlier ones of the same chunk:
    # u = a_b u + a_k v + (reads of the incoming state), a triangular system.
    (q_k, q_b), (a_k, a_b) = near
    state_reads = a * past.exp()
    shape = torch.broadcast_shapes(v.shape[:-1], state_reads.shape[:-1], a_b.shape[:-1])
    known = torch.cat([(a_k @ v).expand(*shape, -1), state_reads.expand(*shape, -1)], -1)
    solved = torch.linalg.solve_triangular(
        -a_b.expand(*shape, -1), known, upper=False, unitriangular=True
    )
    of_values, of_state = solved.split([v.shape[-1], state_reads.shape[-1]], -1)
    b_fade = (b * fade).mT
    diagonal = torch.diag_embed(keep.expand(*keep.shape[:-1], k.shape[-1]))
    return AffineChunks(
        own=q_k @ v + q_b @ of_values,
        reader=reader + q_b @ of_state,
        keep=diagonal + b_fade @ of_state,
        gain=gain + b_fade @ of_values,
    )


def chunk_summary(payload: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Computes (keep, gain) of `affine_chunks` alone, without a low-rank term."""
    k, v, _ = payload
    log_decay = _per_channel(payload)
    return log_decay.sum(-2).exp(), (k * _fade(log_decay)).mT @ v


def chunk_reads(
    query: Tensor, payload: tuple[Tensor, ...], *, before: bool
) -> tuple[Tensor, Tensor]:
    """Computes (own, reader) of `affine_chunks` alone, without a low-rank term."""
    k, v, decay = payload
    log_decay = _per_channel(payload)
    through, past = _decay_sums(log_decay)
    near = _near([(query, before)], [k], decay, log_decay)
    return near[0][0] @ v, query * (past if before else through).exp()


def _per_channel(payload: tuple[Tensor, ...]) -> Tensor:
    """Returns the log decays as [B, N, h, C, 1 or D]."""
    k, _, decay, *_ = payload
    return decay if decay.dim() == k.dim() else decay[..., None]


def _decay_sums(log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the log decays of a chunk up to and with a token, and up to and without it."""
    through = log_decay.cumsum(-2)
    return through, F.pad(through[..., :-1, :], (0, 0, 1, 0))


def _fade(log_decay: Tensor) -> Tensor:
    """Returns how much of a token is left at the end of its chunk."""
    # From the end backwards: the difference of two long sums would cancel.
    after = log_decay.flip(-2).cumsum(-2)[..., :-1, :]
    return F.pad(after, (0, 0, 1, 0)).flip(-2).exp()


def _near(
    rows: TileRows, columns: list[Tensor], decay: Tensor, log_decay: Tensor
) -> list[list[Tensor]]:
    if decay.dim() == columns[0].dim():
        return _by_halves(rows, columns, log_decay)
    return _by_sums(rows, columns, decay)


def _by_sums(rows: TileRows, columns: list[Tensor], decay: Tensor) -> list[list[Tensor]]:
    """Returns [..., C, C] for each of rows and columns, with one decay per head.

    Entry (i, j) is row_i column_j exp(sum of the log decays between j and i).
    """
    size = decay.shape[-1]
    ones = torch.ones(size, size, dtype=torch.bool, device=decay.device)
    strictly_below = ones.tril(-1)
    sums = decay[..., None].expand(*decay.shape, size).masked_fill(~strictly_below, 0).cumsum(-2)
    fades = {False: sums.masked_fill(~ones.tril(), -torch.inf).exp()}
    if any(before for _, before in rows):
        shifted = F.pad(sums[..., :-1, :], (0, 0, 1, 0))
        fades[True] = shifted.masked_fill(~strictly_below, -torch.inf).exp()
    near = []
    for row, before in rows:
        near.append([(row @ column.mT) * fades[before] for column in columns])
    return near


def _by_halves(rows: TileRows, columns: list[Tensor], log: Tensor) -> list[list[Tensor]]:
    """As `_by_sums` with a decay for each channel.

    A product of matrices cannot weigh every channel of every pair, but the decay between two halves
    factors at their border. So the later half meets the earlier half, and so on within halves.
    """
    size = log.shape[-2]
    near = []
    for row, before in rows:
        products = [(row * column).sum(-1)[..., None, None] for column in columns]
        near.append([torch.zeros_like(x) if before else x for x in products])
    side = 1
    while side < size:
        early, late = log.unflatten(-2, (size // side // 2, 2, side)).unbind(-3)
        to_border = F.pad(early.flip(-2).cumsum(-2)[..., :-1, :], (0, 0, 1, 0)).flip(-2).exp()
        through = late.cumsum(-2)
        since_border = {
            False: through.exp(),
            True: F.pad(through[..., :-1, :], (0, 0, 1, 0)).exp(),
        }
        faded = [(_half(column, side, 0) * to_border).mT for column in columns]
        for blocks, (row, before) in zip(near, rows, strict=True):
            later = _half(row, side, 1) * since_border[before]
            for number, column in enumerate(faded):
                blocks[number] = _join(blocks[number], later @ column)
        side *= 2
    results = []
    for blocks in near:
        results.append([block.squeeze(-3) for block in blocks])
    return results


def _half(x: Tensor, side: int, which: int) -> Tensor:
    """[..., C, D] -> [..., C / (2 side), side, D]: every other stretch of `side` tokens."""
    return x.unflatten(-2, (x.shape[-2] // side // 2, 2, side)).select(-3, which)


def _join(blocks: Tensor, cross: Tensor) -> Tensor:
    """Joins diagonal blocks [..., n, s, s] and those below each pair [..., n / 2, s, s].

    Returns [..., n / 2, 2s, 2s].
    """
    first, second = blocks.unflatten(-3, (blocks.shape[-3] // 2, 2)).unbind(-3)
    upper = F.pad(first, (0, first.shape[-1]))
    lower = torch.cat([cross, second], -1)
    return torch.cat([upper, lower], -2)


def apply_keep(keep: Tensor, state: Tensor) -> Tensor:
    """Applies a keep, diagonal [..., 1 or D] or dense [..., D, D], to states [..., D, E]."""
    if keep.dim() == state.dim():
        return keep @ state
    return keep[..., None] * state


def carry_states(keep: Tensor, gain: Tensor, starts: Tensor, origins: list[list[int]]) -> Tensor:
    """Returns the state before every chunk, [B, N, H, D, E]; chunk n makes keep_n S + gain_n of S.

    Args:
        keep, gain: as in AffineChunks.
        starts: [B, K, H, D, E] states to start from.
        origins: [N][B], the number among `starts` of the state before this chunk; CONTINUE: the one
            that the chunk before left (0 before the first).
    """
    return _Carry.apply(keep, gain, starts, origins)


class _Carry(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, keep: Tensor, gain: Tensor, starts: Tensor, origins: list[list[int]]
    ) -> Tensor:
        states = torch.empty_like(gain)
        state = torch.zeros_like(gain[:, 0])
        for chunk, origin in enumerate(origins):
            restart = _restart(origin, gain.device)
            if restart is not None:
                rows, start, mask = restart
                state = torch.where(mask, starts[rows, start], state)
            states[:, chunk] = state
            state = apply_keep(keep[:, chunk], state) + gain[:, chunk]
        ctx.save_for_backward(keep, states)
        ctx.origins = origins
        ctx.starts_shape = starts.shape
        return states

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        keep, states = ctx.saved_tensors
        d_gain = torch.empty_like(states)  # also the gradient of the state that each chunk leaves
        d_starts = states.new_zeros(ctx.starts_shape)
        d_state = torch.zeros_like(states[:, 0])
        dense = keep.dim() == states.dim()
        adjoint = keep.mT if dense else keep
        for chunk in range(len(ctx.origins) - 1, -1, -1):
            d_gain[:, chunk] = d_state
            d_state = apply_keep(adjoint[:, chunk], d_state) + grads[0][:, chunk]
            restart = _restart(ctx.origins[chunk], d_state.device)
            if restart is not None:
                rows, start, mask = restart
                d_row = torch.where(mask, d_state, 0)
                d_starts.index_put_((rows, start), d_row, accumulate=True)
                d_state = torch.where(mask, 0, d_state)
        if dense:
            d_keep = d_gain @ states.mT
        else:
            d_keep = (d_gain * states).sum(-1).sum_to_size(keep.shape)
        return d_keep, d_gain, d_starts, None


def _restart(origin: list[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor] | None:
    """Returns (row numbers, numbers of the starts, mask [B, 1, 1, 1]) of rows that take a start.

    None where no row does, which saves most chunks of a long document the indexing.
    """
    if all(number == CONTINUE for number in origin):
        return None
    start = to_device(origin, device)
    rows = torch.arange(len(origin), device=device)
    return rows, start.clamp_min(0), (start != CONTINUE)[:, None, None, None]

"""The chunkwise form of a scan, in torch: what a chunk does to a state is affine, and states pass
from chunk to chunk.

    S_t = diag(w_t) S_{t-1} + b_t (a_t S_{t-1}) + k_t v_t        o_t = q_t S_t   (or q_t S_{t-1})

Within a chunk, decays between two tokens are exp of sums of log decays that lie between these two,
never quotients of products and never differences of long sums: nothing overflows and nothing
cancels, however strong the decay.

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


class AffineChunks(NamedTuple):
    """What every chunk does: out = own + reader @ S, and S becomes keep S + gain.

    own [B, N, H, C, E]; reader [B, N, H, C, D]; keep [B, N, h, 1 or D] (diagonal) or [B, N, H, D,
    D]; gain [B, N, H, D, E].
    """

    own: Tensor
    reader: Tensor
    keep: Tensor
    gain: Tensor


def affine_chunks(query: Tensor, payload: tuple[Tensor, ...], *, before: bool) -> AffineChunks:
    """Work out all chunks at once.

    Args:
        query: [B, N, h, C, D].
        payload: keys [B, N, h, C, D], values [B, N, H, C, E], log decays [B, N, h, C] or [B, N, h,
            C, D] (at most 0), and for the low-rank term a and b [B, N, h, C, D].
        before: read the state as it was before the token's own update.
    """
    k, v, decay, *low = payload
    vector = decay.dim() == k.dim()
    log = decay if vector else decay[..., None]  # [B, N, h, C, 1 or D]
    upto = log.cumsum(-2)
    past = F.pad(upto[..., :-1, :], (0, 0, 1, 0))
    after = F.pad(log.flip(-2).cumsum(-2)[..., :-1, :], (0, 0, 1, 0)).flip(
        -2
    )  # to the end of the chunk, not oneself
    rows = [(query, before)]
    columns = [k]
    if low:
        rows = [*rows, (low[0], True)]
        columns = [k, low[1]]
    near = _by_halves(rows, columns, log) if vector else _by_sums(rows, columns, decay)
    reader = query * (past if before else upto).exp()
    fade = after.exp()
    keep = upto[..., -1, :].exp()
    gain = (k * fade).mT @ v
    if not low:
        return AffineChunks(near[0][0] @ v, reader, keep, gain)
    (by_k, by_b), (a_k, a_b) = near
    read = low[0] * past.exp()  # how a reads the state before the chunk
    wide = torch.broadcast_shapes(v.shape[:-1], read.shape[:-1], a_b.shape[:-1])
    known = torch.cat([(a_k @ v).expand(*wide, -1), read.expand(*wide, -1)], -1)
    solved = torch.linalg.solve_triangular(
        -a_b.expand(*wide, -1), known, upper=False, unitriangular=True
    )
    of_values, of_state = solved.split([v.shape[-1], read.shape[-1]], -1)
    b_fade = (low[1] * fade).mT
    dense = torch.diag_embed(keep.expand(*keep.shape[:-1], k.shape[-1])) + b_fade @ of_state
    return AffineChunks(
        by_k @ v + by_b @ of_values, reader + by_b @ of_state, dense, gain + b_fade @ of_values
    )


Rows = list[tuple[Tensor, bool]]


def _by_sums(rows: Rows, columns: list[Tensor], decay: Tensor) -> list[list[Tensor]]:
    """[..., C, C] for each of rows and columns: rows_i columns_j exp(sum of the log decays between
    j and i)."""
    size = decay.shape[-1]
    there = torch.ones(size, size, dtype=torch.bool, device=decay.device)
    sums = decay[..., None].expand(*decay.shape, size).masked_fill(~there.tril(-1), 0).cumsum(-2)
    fades = {False: sums.masked_fill(~there.tril(), -torch.inf).exp()}
    if any(before for _, before in rows):
        shifted = F.pad(sums[..., :-1, :], (0, 0, 1, 0))
        fades[True] = shifted.masked_fill(~there.tril(-1), -torch.inf).exp()
    return [[(row @ column.mT) * fades[before] for column in columns] for row, before in rows]


def _by_halves(rows: Rows, columns: list[Tensor], log: Tensor) -> list[list[Tensor]]:
    """As `_by_sums` with a decay for each channel: the later half against the earlier half, and so
    on within halves."""
    size = log.shape[-2]
    near = []
    for row, before in rows:
        products = [(row * column).sum(-1)[..., None, None] for column in columns]
        near.append([torch.zeros_like(x) if before else x for x in products])
    side = 1
    while side < size:
        early, late = (
            x.squeeze(-3) for x in log.unflatten(-2, (size // side // 2, 2, side)).split(1, -3)
        )
        to_border = F.pad(early.flip(-2).cumsum(-2)[..., :-1, :], (0, 0, 1, 0)).flip(-2).exp()
        upto = late.cumsum(-2)
        since = {False: upto.exp(), True: F.pad(upto[..., :-1, :], (0, 0, 1, 0)).exp()}
        faded = [(_half(column, side, 0) * to_border).mT for column in columns]
        for found, (row, before) in zip(near, rows, strict=True):
            later = _half(row, side, 1) * since[before]
            for i, column in enumerate(faded):
                found[i] = _join(found[i], later @ column)
        side *= 2
    return [[x.squeeze(-3) for x in found] for found in near]


def _half(x: Tensor, side: int, which: int) -> Tensor:
    """[..., C, D] -> [..., C / (2 side), side, D]: every other stretch of `side` tokens."""
    return x.unflatten(-2, (x.shape[-2] // side // 2, 2, side)).select(-3, which)


def _join(blocks: Tensor, cross: Tensor) -> Tensor:
    """Blocks [..., n, s, s] along a diagonal and what lies below each pair [..., n / 2, s, s], as
    [..., n / 2, 2s, 2s]."""
    pairs = blocks.unflatten(-3, (blocks.shape[-3] // 2, 2))
    first, second = pairs.unbind(-3)
    return torch.cat([F.pad(first, (0, first.shape[-1])), torch.cat([cross, second], -1)], -2)


def apply_keep(keep: Tensor, state: Tensor) -> Tensor:
    """A keep, diagonal [..., 1 or D] or dense [..., D, D], applied to states [..., D, E]."""
    return keep @ state if keep.dim() == state.dim() else keep[..., None] * state


def carry_states(keep: Tensor, gain: Tensor, starts: Tensor, origins: list[list[int]]) -> Tensor:
    """[B, N, H, D, E]: the state before every chunk, when chunk n turns S into keep_n S + gain_n.

    Args:
        keep, gain: as in Affine.
        starts: [B, K, H, D, E] states to start from.
        origins: [N][B], the number among `starts` of the state before this chunk; CONTINUE: what
            the chunk before left (0 before the first).
    """
    return _Carry.apply(keep, gain, starts, origins)


class _Carry(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, keep: Tensor, gain: Tensor, starts: Tensor, origins: list[list[int]]
    ) -> Tensor:
        states = torch.empty_like(gain)
        state = torch.zeros_like(gain[:, 0])
        for n, origin in enumerate(origins):
            fresh = _fresh(origin, gain.device)
            if fresh is not None:
                rows, which, mask = fresh
                state = torch.where(mask, starts[rows, which], state)
            states[:, n] = state
            state = apply_keep(keep[:, n], state) + gain[:, n]
        ctx.save_for_backward(keep, states)
        ctx.origins = origins
        ctx.starts = starts.shape
        return states

    @staticmethod
    def backward(ctx: Any, *grads: Tensor):
        keep, states = ctx.saved_tensors
        d_gain = torch.empty_like(states)  # the gradient of what each chunk leaves behind
        d_starts = states.new_zeros(ctx.starts)
        left = torch.zeros_like(states[:, 0])
        dense = keep.dim() == states.dim()
        for n in range(len(ctx.origins) - 1, -1, -1):
            d_gain[:, n] = left
            left = apply_keep(keep[:, n].mT if dense else keep[:, n], left) + grads[0][:, n]
            fresh = _fresh(ctx.origins[n], left.device)
            if fresh is not None:
                rows, which, mask = fresh
                d_starts.index_put_((rows, which), torch.where(mask, left, 0), accumulate=True)
                left = torch.where(mask, 0, left)
        if dense:
            d_keep = d_gain @ states.mT
        else:
            d_keep = (d_gain * states).sum(-1).sum_to_size(keep.shape)
        return d_keep, d_gain, d_starts, None


def _fresh(origin: list[int], device: torch.device) -> tuple[Tensor, Tensor, Tensor] | None:
    """(row numbers, number of the start, mask [B, 1, 1, 1]) where some row takes a start."""
    if all(each == CONTINUE for each in origin):
        return None
    which = torch.tensor(origin, device=device)
    return (
        torch.arange(len(origin), device=device),
        which.clamp_min(0),
        (which != CONTINUE)[:, None, None, None],
    )

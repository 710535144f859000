"""State maps: the equivalent of attention maps for scans, which keep, write and read a state.

A scan holds no weights, but its output is a sum over the values of earlier tokens all the same. The
factors of that sum are exact here, whatever the layer: linear attention, retention, gated linear
attention, RWKV, the delta rules and Mamba-2 are all scans (models/primitives/scan.py).

Letters: B rows, H heads, T tokens, D key width, h is H or 1.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.analysis.attention_maps import AttentionMap, GatherWhole, hooked, places, uncompiled
from models.micro_batch import MicroBatch
from models.primitives.scan import Scan
from models.scores import Tensors
from models.span import Span


class StateMap(NamedTuple):
    """The parts of which one scan made its state, in one pass over a row.

    Attributes:
        name: of the scan in the model.
        heads: how many there are, shown or not.
        kept: [H, T] the share of the state that is left before a token writes, of 1, the mean over
            its channels.
        written: [H, T] the norm of what a token writes: of its key times that of its value.
        corrected: [H, T] the norm of what it takes away along a direction, for a state of norm 1;
            None where the rule has no such correction.
        reads: [H, T, T] the factor of each token's value (across) in each token's output (down),
            which may be negative. It counts decays and corrections in between.
        span: [1, T] addresses of the tokens, without padding.
    """

    name: str
    heads: int
    kept: Tensor
    written: Tensor
    corrected: Tensor | None
    reads: Tensor
    span: Span

    def shares(self) -> AttentionMap:
        """Returns the sizes of the reads as shares of 1 in each row, as an attention map.

        A token that reads nothing has a row of zeros.
        """
        sizes = self.reads.abs()
        shares = sizes / sizes.sum(-1, keepdim=True).clamp_min(1e-30)
        return AttentionMap(self.name, shares, self.heads, self.span, self.span)


@torch.no_grad()
def collect_states(
    model: nn.Module,
    watched: Mapping[str, nn.Module],
    tokens: Tensor,
    span: Span,
    *,
    whole: GatherWhole | None = None,
    heads: int | None = None,
    source: Any = None,
) -> list[StateMap]:
    """The states of one row, in the order in which the scans are called.

    Args:
        model: called with (tokens, span). Best in evaluation mode; it is left as it was.
        watched: scans, or what stands in for them, by name.
        tokens: [1, T] int64, or where the row is cut, the part of it at hand.
        whole: brings together what lies on several ranks, as for `attention_maps.collect`.
        heads: keep the first so many of each scan; None: all.
        source: a MicroBatch that the model reads beside the row; None: it reads none.

    The reads follow Ali et al. 2024, "The hidden attention of Mamba models" (arXiv:2403.01590),
    who leave corrections out; here the scan itself is run on one value for each token.
    """
    found: list[StateMap] = []

    def note(name: str, query: Tensors, payload: Tensors, *_: Any, **rest: Any) -> None:
        inner_span = rest["span"]
        if whole is not None:
            query, payload, inner_span, _kv = whole(query, payload, inner_span, inner_span)
        here = places(inner_span, inner_span)
        made = _state_map(name, _scan(watched[name]), query, payload, inner_span, heads)
        found.append(
            made._replace(
                kept=made.kept[:, here].cpu(),
                written=made.written[:, here].cpu(),
                corrected=None if made.corrected is None else made.corrected[:, here].cpu(),
                reads=made.reads[:, here][:, :, here].cpu(),
                span=inner_span.map(lambda column: column[:, here].cpu()),
            )
        )

    with hooked(watched, note), uncompiled():
        model(MicroBatch(tokens, span, None, source))
    return found


def _state_map(
    name: str, scan: Scan, query: Tensors, payload: Tensors, span: Span, most: int | None
) -> StateMap:
    """Returns the map of the first row, padding included."""
    wide = torch.promote_types(query[0].dtype, torch.float32)
    key, value, decay, *correction = [tensor[:1].to(wide) for tensor in payload]
    first = span.map(lambda column: column[:1])
    count = value.shape[2]
    log_decay = decay if decay.dim() == 4 else decay[..., None]
    reads = read_factors(scan, (query[0][:1].to(wide),), (key, value, decay, *correction), first)
    corrected = None
    if correction:
        look, change = correction
        corrected = _by_head(look.norm(dim=-1) * change.norm(dim=-1), count, most)
    return StateMap(
        name,
        count,
        _by_head(log_decay.exp().mean(-1), count, most),
        _by_head(key.norm(dim=-1) * value.norm(dim=-1), count, most),
        corrected,
        reads[0].permute(1, 0, 2)[:most],
        first,
    )


def read_factors(scan: Scan, query: Tensors, payload: Tensors, span: Span) -> Tensor:
    """[B, T, H, T]: the factor of each token's value (last) in each token's output.

    The output is linear in the values, so it is computed for values that are 1 at one token each.
    """
    key, value, *rest = payload
    rows, tokens, heads = value.shape[:3]
    ones = torch.eye(tokens, dtype=value.dtype, device=value.device)
    ones = ones[None, :, None].expand(rows, tokens, heads, tokens)
    factors, _ = scan.recur(query, (key, ones, *rest), span=span)
    return factors


def _by_head(figure: Tensor, heads: int, most: int | None) -> Tensor:
    """[1, T, h] -> [H, T] of the first heads."""
    return figure[0].expand(-1, heads).T[:most]


def _scan(module: nn.Module) -> Scan:
    """The scan that a module is, or stands in for."""
    return next(inner for inner in module.modules() if isinstance(inner, Scan))

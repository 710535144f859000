"""A block of a decoder for single tokens, with the operations of its modules and nothing between.

While a model decodes, a small operation costs its call, not its numbers: of a step of a small model
most is Python between the operations. This is the same arithmetic as `Block.forward` of a grouped
query attention and a SwiGLU, written out in one function. Everything else runs as it is.

Letters: B rows, W width, H heads, G key heads, D head width.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention.full import Attention, MultiHead, MultiQuery
from models.attention.sliding import Sliding
from models.feedforward import SwiGLU
from models.norms import WIDE, RMSNorm, few_rms_norm
from models.primitives.softmax import Softmax
from models.span import DerivedCache, Span

ATTENTIONS = frozenset({Attention, MultiHead, MultiQuery, Sliding})
JOINED = 1 << 20  # bytes of weights that are joined: larger ones cost their reading, not a call
PROJECTIONS = "q", "k", "v", "out"
MATRICES = "gate", "up", "down"


def step(block: nn.Module, x: Tensor, span: Span) -> Tensor | None:
    """Returns what the block makes of one token a row, [B, 1, W]; None where it runs as it is."""
    if torch.is_grad_enabled() or x.dtype not in WIDE or torch.compiler.is_compiling():
        return None
    if not span.past.continues_rows or span.past.carries_gradient:
        return None
    modules = _known(block)
    if modules is None:
        return None
    mixer_norm, mixer, feedforward_norm, feedforward = modules
    heads = mixer.q.out_features // mixer.head_width
    keys = mixer.k.out_features // mixer.head_width
    rows, _, width = x.shape
    residual = x.reshape(rows, width)
    hidden = few_rms_norm(residual, mixer_norm.weight, mixer_norm.eps)
    projected = _side_by_side(hidden, mixer, ("q", "k", "v"), span.past.joined)
    projected = projected.view(rows, 1, -1, mixer.head_width)
    rotated = mixer.position.rotate(projected[:, :, : heads + keys], span)
    query = rotated[:, :, :heads]
    key = rotated[:, :, heads:]
    value = projected[:, :, heads + keys :]
    params = () if mixer.tables is None else mixer.tables()
    mixed = span.past.attend(
        mixer.mix, (query,), (key, value), params, span=span, kv_span=span, heads=None
    )
    residual = residual + _linear(mixed.reshape(rows, -1), mixer.out)
    hidden = few_rms_norm(residual, feedforward_norm.weight, feedforward_norm.eps)
    both = _side_by_side(hidden, feedforward, ("gate", "up"), span.past.joined)
    gate, up = both.chunk(2, -1)
    gated = feedforward.activation(gate) * up
    return (residual + _linear(gated, feedforward.down)).view(x.shape)


def _side_by_side(
    x: Tensor, owner: nn.Module, names: tuple[str, ...], joined: DerivedCache
) -> Tensor:
    """Returns what several linear layers of an owner make of x, one after the other.

    Small weights are joined once for all steps of a state: then it is one operation.
    """
    layers = [owner._modules[name] for name in names]
    weight = joined.get("weights", lambda: _joined(layers), owner)
    if weight is not None:
        return F.linear(x, weight)
    return torch.cat([_linear(x, layer) for layer in layers], -1)


def _joined(layers: list[Any]) -> Tensor | None:
    """Returns the weights below one another; None where they are large or there are biases."""
    if any(layer.bias is not None for layer in layers):
        return None
    size = sum(layer.weight.numel() * layer.weight.element_size() for layer in layers)
    return torch.cat([layer.weight for layer in layers]) if size <= JOINED else None


def _linear(x: Tensor, linear: Any) -> Tensor:
    parameters = linear._parameters
    return F.linear(x, parameters["weight"], parameters["bias"])


def _known(block: nn.Module) -> tuple[Any, Any, Any, Any] | None:
    """Returns (norm, attention, norm, feed-forward layer) of a block whose parts are all known."""
    own: dict[str, Any] = block._modules
    if own["mixer_post_norm"] is not None or own["feedforward_post_norm"] is not None:
        return None
    mixer_norm = own["mixer_norm"]
    mixer = own["mixer"]
    feedforward_norm = own["feedforward_norm"]
    feedforward = own["feedforward"]
    if type(mixer) not in ATTENTIONS or type(feedforward) is not SwiGLU:
        return None
    inner = mixer._modules
    if inner["recall"] is not None or inner["beside"] is not None:
        return None
    plain = [mixer, feedforward]
    if not _all_plain(plain, None) or not _all_plain([inner["mix"]], Softmax):
        return None
    if not _all_plain([mixer_norm, feedforward_norm], RMSNorm):
        return None
    linear = [inner[name] for name in PROJECTIONS]
    linear += [feedforward._modules[name] for name in MATRICES]
    if not _all_plain(linear, nn.Linear):
        return None
    return mixer_norm, mixer, feedforward_norm, feedforward


def _all_plain(modules: list[Any], kind: type | None) -> bool:
    """Tells whether all are of this very class, and nothing watches or changes their calls."""
    for module in modules:
        if kind is not None and type(module) is not kind:
            return False
        if module._forward_hooks or module._forward_pre_hooks:
            return False
    return True

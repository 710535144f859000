"""A block of a decoder for single tokens, with the operations of its modules and nothing between.

While a model decodes, a small operation costs its call, not its numbers: of a step of a small model
most is Python between the operations. This is the same arithmetic as `Block.forward` of a grouped
query attention and a SwiGLU, written out in one function. Everything else runs as it is.

Letters: B rows, W width, H heads, G key heads, D head width.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention.full import Attention, MultiHead, MultiQuery
from models.attention.sliding import Sliding
from models.feedforward import SwiGLU
from models.norms import FEW_TOKENS, WIDE, RMSNorm, few_rms_norm
from models.primitives.softmax import Softmax
from models.span import DerivedCache, Span

ATTENTIONS = frozenset({Attention, MultiHead, MultiQuery, Sliding})
# Bytes of weights up to which they are joined: larger ones cost their reading, not a call. A few
# rows are given to larger ones as columns: with 8 rows 1,706 x 640 took 1,087 us for 1,451 and
# 640 x 640 402 for 461, but 128 x 640 85 for 64 (MKL, one thread).
LARGE = 1 << 20
PROJECTIONS = "q", "k", "v", "out"
MATRICES = "gate", "up", "down"


class _Parts(NamedTuple):
    """The modules of a block."""

    mixer_norm: Any
    mixer: Any
    feedforward_norm: Any
    feedforward: Any


def step(block: nn.Module, x: Tensor, span: Span) -> Tensor | None:
    """Returns what the block makes of one token a row, [B, 1, W]; None where it runs as it is."""
    if torch.is_grad_enabled() or x.dtype not in WIDE or torch.compiler.is_compiling():
        return None
    if not span.past.continues_rows or span.past.carries_gradient:
        return None
    parts = span.past.joined.get("parts", lambda: _known(block), block)
    if parts is None:
        return None
    mixer_norm, mixer, feedforward_norm, feedforward = parts
    head_width = mixer.head_width
    heads = mixer.q.out_features // head_width
    turned = heads + mixer.k.out_features // head_width
    rows, _, width = x.shape
    residual = x.reshape(rows, width)
    hidden = few_rms_norm(residual, mixer_norm.weight, mixer_norm.eps)
    joined = _joined(mixer, ("q", "k", "v"), span.past.joined)
    if joined is None:
        separate = [_linear(hidden, mixer._modules[name]) for name in ("q", "k", "v")]
        projected = torch.cat(separate, -1)
    else:
        projected = _product(hidden, joined)
    projected = projected.view(rows, 1, -1, head_width)
    rotated = mixer.position.rotate(projected.narrow(2, 0, turned), span)
    query = rotated.narrow(2, 0, heads)
    key = rotated.narrow(2, heads, turned - heads)
    value = projected.narrow(2, turned, turned - heads)
    params = () if mixer.tables is None else mixer.tables()
    mixed = span.past.attend(
        mixer.mix, (query,), (key, value), params, span=span, kv_span=span, heads=None
    )
    residual = residual + _linear(mixed.reshape(rows, -1), mixer.out)
    hidden = few_rms_norm(residual, feedforward_norm.weight, feedforward_norm.eps)
    joined = _joined(feedforward, ("gate", "up"), span.past.joined)
    if joined is None:
        gate = _linear(hidden, feedforward.gate)
        up = _linear(hidden, feedforward.up)
    else:
        gate, up = _product(hidden, joined).chunk(2, -1)
    gated = feedforward.activation(gate) * up
    return (residual + _linear(gated, feedforward.down)).view(x.shape)


def _joined(owner: nn.Module, names: tuple[str, ...], joined: DerivedCache) -> Tensor | None:
    """Returns the weights of several linear layers below one another, made once for all steps of a
    state; None where they are large or there are biases."""

    def build() -> Tensor | None:
        layers: list[Any] = [owner.get_submodule(name) for name in names]
        if any(layer.bias is not None for layer in layers):
            return None
        weights = [layer.weight for layer in layers]
        return torch.cat(weights) if sum(map(_bytes, weights)) <= LARGE else None

    return joined.get("weights", build, owner)


def _linear(x: Tensor, linear: Any) -> Tensor:
    parameters = linear._parameters
    if parameters["bias"] is not None:
        return F.linear(x, parameters["weight"], parameters["bias"])
    return _product(x, parameters["weight"])


def _product(x: Tensor, weight: Tensor) -> Tensor:
    """Returns what a linear layer with this weight makes of x, [B, I] -> [B, O]."""
    if 1 < x.shape[0] <= FEW_TOKENS and x.is_cpu and _bytes(weight) > LARGE:
        return weight.mm(x.t()).t()
    return x.mm(weight.t())


def _bytes(weight: Tensor) -> int:
    return weight.numel() * weight.element_size()


def _known(block: nn.Module) -> _Parts | None:
    """Returns the modules of a block whose parts are all known; None of any other block."""
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
    return _Parts(mixer_norm, mixer, feedforward_norm, feedforward)


def _all_plain(modules: list[Any], kind: type | None) -> bool:
    """Tells whether all are of this very class, and nothing watches or changes their calls."""
    for module in modules:
        if kind is not None and type(module) is not kind:
            return False
        if module._forward_hooks or module._forward_pre_hooks:
            return False
    return True

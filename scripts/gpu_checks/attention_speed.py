"""TFLOP/s of attention, forward and backward, by our dispatch and by the best of PyTorch.

Ours is the primitive with its autograd, which may cut a mask into blocks. PyTorch's is, for one
causal document, scaled_dot_product_attention by each of its kernels, and for packed documents and
windows its flash kernel for documents of their own lengths, and FlexAttention compiled. Where a
version of flash-attn is installed, ours by each of them, and by none, are rivals too. Counted are
visible pairs: 2 (D + E) FLOPs a pair and head forward, 2.5 times that backward.
"""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from models.attention.full import CAUSAL
from models.kernels import sdpa_cuda
from models.kernels.flash_attention import releases
from models.masks.basic import SlidingWindow
from models.primitives.softmax import Softmax
from models.span import Span
from scripts.gpu_checks.card import HEAD_WIDTH, HEADS, KEY_HEADS, card, milliseconds

varlen = torch.ops.aten._flash_attention_forward.default
varlen_backward = torch.ops.aten._flash_attention_backward.default

K = 1024
BACKWARD = 2.5  # of the FLOPs of a forward pass
FLEX_COST_S = 25.0  # to compile FlexAttention for a shape, forward and backward


class RowShape(NamedTuple):
    """One row: `documents` of uneven lengths, and at most `window` keys for a query (0: all)."""

    tokens: int
    documents: int = 1
    window: int = 0


SHAPES = (
    RowShape(32 * K),
    RowShape(32 * K, documents=8),
    RowShape(32 * K, window=4096),
    RowShape(128 * K),
    RowShape(32 * K, documents=32),
    RowShape(32 * K, window=1024),
    RowShape(8 * K),
    RowShape(128 * K, window=4096),
    RowShape(128 * K, documents=32),
    RowShape(8 * K, documents=8),
    RowShape(8 * K, window=1024),
    RowShape(128 * K, window=1024),
    RowShape(8 * K, documents=32),
    RowShape(128 * K, documents=8),
    RowShape(8 * K, window=4096),
)
TINY = (RowShape(64), RowShape(64, documents=4), RowShape(64, window=8))


class SpeedCheck(NamedTuple):
    """The device, the shapes, and heads, key heads and width of a head."""

    device: torch.device
    shapes: tuple[RowShape, ...]
    heads: int
    key_heads: int
    width: int


def prepare(dry: bool) -> SpeedCheck:
    """Returns what is timed, and has the card's context made."""
    device = card(dry)
    torch.zeros(1, device=device)
    if dry:
        return SpeedCheck(device, TINY, 4, 2, 16)
    return SpeedCheck(device, SHAPES, HEADS, KEY_HEADS, HEAD_WIDTH)


def check(prepared: SpeedCheck, seconds: float) -> Iterator[dict[str, Any]]:
    """Yields a row for each shape, while time remains; FlexAttention for some at the end."""
    began = time.monotonic()
    for shape in prepared.shapes:
        if time.monotonic() - began > seconds - 2:
            return
        yield _row(prepared, shape, _rivals(prepared, shape))
    for shape in prepared.shapes[1:]:
        if shape.tokens > 32 * K or time.monotonic() - began > seconds - FLEX_COST_S:
            continue
        yield _row(prepared, shape, {"flex": partial(_flex, shape)})


Rival = Callable[[SpeedCheck], Callable[[], Tensor]]


def _row(prepared: SpeedCheck, shape: RowShape, rivals: dict[str, Rival]) -> dict[str, Any]:
    """Times ours and its rivals in turn; a rival that refuses is named with its reason."""
    row: dict[str, Any] = {"tokens": shape.tokens, "documents": shape.documents}
    row["window"] = shape.window
    flops = _pairs(shape) * prepared.heads * 4 * prepared.width * (1 + BACKWARD)
    ours = flops / milliseconds(_ours(prepared, shape), prepared.device) / 1e9
    row["ours TFLOP/s"] = round(ours, 4)
    best = 0.0
    row["best"] = "none"
    others = []
    for name, build in rivals.items():
        try:
            rate = flops / milliseconds(build(prepared), prepared.device) / 1e9
        except Exception as error:
            others.append(f"{name}: {type(error).__name__} {str(error)[:60]}")
            continue
        others.append(f"{name} {rate:.4g}")
        if rate > best:
            best = rate
            row["best"] = name
    row["best TFLOP/s"] = round(best, 4)
    row["ours / best"] = round(ours / best, 3) if best else 0.0
    row["all"] = ", ".join(others)
    return row


def lengths(shape: RowShape) -> list[int]:
    """Returns the uneven lengths of the documents of a row, in a fixed disorder."""
    count = shape.documents
    weights = [1 + (7 * number) % count for number in range(count)]
    total = sum(weights)
    sizes = [shape.tokens * weight // total for weight in weights]
    sizes[-1] += shape.tokens - sum(sizes)
    return sizes


def _pairs(shape: RowShape) -> int:
    """Returns the visible pairs of queries and keys."""
    pairs = 0
    for size in lengths(shape):
        far = min(shape.window or size, size)
        pairs += far * (far + 1) // 2 + (size - far) * far
    return pairs


def _tensors(prepared: SpeedCheck, tokens: int) -> list[Tensor]:
    """Returns q, k, v [1, T, H or G, D] that get gradients, and the gradient of the output."""
    generator = torch.Generator(prepared.device).manual_seed(0)
    made = []
    for heads in (prepared.heads, prepared.key_heads, prepared.key_heads, prepared.heads):
        noise = torch.randn(
            1, tokens, heads, prepared.width, generator=generator, device=prepared.device
        )
        made.append(noise.to(torch.bfloat16).requires_grad_(len(made) < 3))
    return made


def _step(call: Callable[..., Tensor], tensors: list[Tensor]) -> Callable[[], Any]:
    """Returns forward and backward of a call."""
    *leaves, d_out = tensors
    return lambda: torch.autograd.grad(call(*leaves), leaves, d_out)


def _ours(prepared: SpeedCheck, shape: RowShape) -> Callable[[], Any]:
    sizes = torch.tensor(lengths(shape))
    document = torch.arange(len(sizes)).repeat_interleave(sizes)
    start = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
    position = torch.arange(shape.tokens) - start
    span = Span.of(position[None], document[None]).map(lambda x: x.to(prepared.device))
    mask = CAUSAL & SlidingWindow(shape.window) if shape.window else CAUSAL
    leaf = Softmax(mask)
    return _step(lambda q, k, v: leaf((q,), (k, v), span=span), _tensors(prepared, shape.tokens))


def _rivals(prepared: SpeedCheck, shape: RowShape) -> dict[str, Rival]:
    return {**_versions(prepared, shape), **_pytorch(shape)}


def _versions(prepared: SpeedCheck, shape: RowShape) -> dict[str, Rival]:
    """Ours by each version of flash-attn that serves this card, and by none of them."""
    order = sdpa_cuda.ORDER.get(sdpa_cuda.capability(prepared.device)[0], ())
    served = [name for name in releases.available() if name in order]
    rivals = {name: partial(_ours_by, shape, (name,)) for name in served}
    if served:
        others = tuple(kernel for kernel in order if kernel not in releases.RELEASES)
        rivals["no flash-attn"] = partial(_ours_by, shape, others)
    return rivals


def _ours_by(shape: RowShape, kernels: tuple[str, ...], prepared: SpeedCheck) -> Callable[[], Any]:
    """Ours with these kernels before PyTorch's flash."""
    step = _ours(prepared, shape)
    order = dict.fromkeys(sdpa_cuda.ORDER, kernels)

    def call() -> Any:
        with patch.dict(sdpa_cuda.ORDER, order):
            return step()

    return call


def _pytorch(shape: RowShape) -> dict[str, Rival]:
    if shape.documents == 1 and not shape.window:
        return {
            "cudnn": partial(_sdpa, shape, SDPBackend.CUDNN_ATTENTION),
            "flash": partial(_sdpa, shape, SDPBackend.FLASH_ATTENTION),
        }
    return {"varlen flash": partial(_varlen, shape)}


def _sdpa(shape: RowShape, kernel: SDPBackend, prepared: SpeedCheck) -> Callable[[], Any]:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with sdpa_kernel(kernel):
            out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2)

    return _step(call, _tensors(prepared, shape.tokens))


def _varlen(shape: RowShape, prepared: SpeedCheck) -> Callable[[], Any]:
    sizes = torch.tensor([0, *lengths(shape)])
    ends = sizes.cumsum(0).to(prepared.device, torch.int32)
    longest = int(sizes.max())
    window: dict[str, int] = {}
    if shape.window:
        window = {"window_size_left": shape.window - 1, "window_size_right": 0}
    settings = ends, ends, longest, longest, 0.0, True
    q, k, v, d_out = (x[0].detach() for x in _tensors(prepared, shape.tokens))

    def step() -> Any:
        out, lse, seed, offset, _ = varlen(q, k, v, *settings, False, **window)
        return varlen_backward(d_out, q, k, v, out, lse, *settings, seed, offset, **window)

    return step


def _flex(shape: RowShape, prepared: SpeedCheck) -> Callable[[], Any]:
    sizes = torch.tensor(lengths(shape), device=prepared.device)
    document = torch.arange(len(sizes), device=prepared.device).repeat_interleave(sizes)
    far = shape.window or shape.tokens

    def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        near = (key <= query) & (query - key < far)
        return near & (document[query] == document[key])

    length = shape.tokens
    blocks = create_block_mask(seen, None, None, length, length, device=str(prepared.device))
    compiled = torch.compile(flex_attention, dynamic=False)

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=blocks, enable_gqa=True).transpose(1, 2)

    return _step(call, _tensors(prepared, shape.tokens))

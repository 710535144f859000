"""Layers with a scan beside one of softmax attention, forward and backward of one long row."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import nn

from models.attention.full import Attention
from models.init import initialise
from models.kernels import scan_fla
from models.positions.rope import Rope
from models.recurrent.delta import GatedDeltaNet
from models.recurrent.gated_linear import GatedLinear
from models.recurrent.mamba2 import Mamba2
from models.recurrent.retention import Retention
from models.recurrent.rwkv7 import Rwkv7
from models.span import Span
from scripts.gpu_checks.card import card, milliseconds

SOFTMAX = "softmax"
LAYERS: dict[str, Callable[[int, int], nn.Module]] = {
    SOFTMAX: lambda width, heads: Attention(width, heads, heads, Rope()),
    "gated_delta": GatedDeltaNet,
    "mamba2": Mamba2,
    "retention": Retention,
    "gated_linear": GatedLinear,
    "rwkv7": lambda width, heads: Rwkv7(width, heads, layer=0, layers=2),
}


class ScanCheck(NamedTuple):
    """The device, tokens of the row, width and heads of a layer, and fla's part if it is here."""

    device: torch.device
    tokens: int
    width: int
    heads: int
    kernels: str


def prepare(dry: bool) -> ScanCheck:
    """Returns the sizes, after every layer was called once: Triton compiles its kernels."""
    device = card(dry)
    if dry:
        return ScanCheck(device, 64, 32, 2, scan_fla.report())
    prepared = ScanCheck(device, 32_768, 2048, 16, scan_fla.report())
    for name in ("gated_delta", "mamba2", "retention"):
        _call(name, prepared)()
    return prepared


def check(prepared: ScanCheck, seconds: float) -> Iterator[dict[str, Any]]:
    """Yields a row for each layer: its scan by fla's kernel where that serves, and by our own."""
    began = time.monotonic()
    softmax = milliseconds(_call(SOFTMAX, prepared), prepared.device)
    yield {
        "layer": SOFTMAX,
        "tokens": prepared.tokens,
        "width": prepared.width,
        "ms": round(softmax, 3),
        "scan by": prepared.kernels,
        "times softmax": 1.0,
    }
    for name in LAYERS:
        if name == SOFTMAX or time.monotonic() - began > seconds - 3:
            continue
        for ours in (False, True):
            with _kernels(ours=ours) as used:
                taken = milliseconds(_call(name, prepared), prepared.device)
            if not ours and not used:
                continue
            yield {
                "layer": name,
                "tokens": prepared.tokens,
                "width": prepared.width,
                "ms": round(taken, 3),
                "scan by": used[0] if used else "chunks in torch",
                "times softmax": round(taken / softmax, 3),
            }


def _call(name: str, prepared: ScanCheck) -> Callable[[], object]:
    """Returns forward and backward of a layer."""
    layer = initialise(LAYERS[name](prepared.width, prepared.heads), seed=0)
    layer = layer.to(prepared.device, torch.bfloat16)
    shape = 1, prepared.tokens, prepared.width
    generator = torch.Generator(prepared.device).manual_seed(0)
    noise = torch.randn(shape, generator=generator, device=prepared.device)
    x = noise.to(torch.bfloat16).requires_grad_()
    span = Span.line(1, prepared.tokens, device=prepared.device)
    leaves = [x, *layer.parameters()]
    return lambda: torch.autograd.grad(layer(x, span).sum(), leaves, allow_unused=True)


@contextmanager
def _kernels(*, ours: bool) -> Iterator[list[str]]:
    """Notes the kernels of fla that serve; with `ours` none does."""
    plain = scan_fla.select_kernel
    used: list[str] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        found = None if ours else plain(*args, **kwargs)
        if found is not None:
            used.append(f"fla, {found[0]}")
        return found

    scan_fla.select_kernel = watched
    try:
        yield used
    finally:
        scan_fla.select_kernel = plain

"""Scans on an NVIDIA GPU by the chunk kernels of flash-linear-attention, where it is installed.

The table says which kernel serves which scan; what is not in it (float64, wider keys, a low-rank
term read before its own update) has the chunks of models/kernels/scan_chunkwise.py. float32 is
served only where torch was told to take products in TF32, as the kernels do; half precision stays
half inside a chunk, decays and states are float32. All kernels here are of the kind [B, T, H, D]
with log decays in nats, a scale that we set to 1, states [S, H, D, E] in and out, and `cu_seqlens`
for documents. Decays are handed over no stronger than e^-100 a token, which is 0 in float32: the
kernels subtract sums of them within a chunk, and infinity minus infinity would be NaN.

A kernel answers outputs and last states, but neither what a run adds to a state nor what it keeps
of one. The first is the last state from nothing. The second is a product of decays, or with a
low-rank term the last state of further columns that start from the identity and have values 0. So a
driver over ranks runs the kernel twice.

Written for version 0.5.2 (Yang & Zhang 2024, github.com/fla-org/flash-linear-attention). The calls
are held to our own scan by those very kernels in Triton's interpreter, and on a GPU by
scripts/gpu_check.sh. Left out: its kernels for the delta rule with a decay per head, which want
keys and rates apart where our payload has them multiplied, and FlashQLA 0.1.3 (Zhang et al. 2026,
github.com/QwenLM/FlashQLA), which wants that too and takes half precision alone: the delta rule is
computed in float32, for its state is corrected at every token.

Letters: B rows, T tokens, N valid tokens, S stretches, R runs, H heads, D key width, E value width;
"h" is H or 1.
"""

import importlib
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from models.kernels.varlen import VarlenLayout

PACKAGE = "fla"
WIDEST = 256  # key width of the kernels
STRONGEST = -100.0  # nats
HALF = torch.float16, torch.bfloat16

PLAIN = "decay per head"
CHANNEL = "decay per channel"
BEFORE = "read before its update"
LOW_RANK = "low rank"
TABLE = {
    PLAIN: ("fla.ops.simple_gla.chunk", "chunk_simple_gla"),
    CHANNEL: ("fla.ops.gla.chunk", "chunk_gla"),
    BEFORE: ("fla.ops.rwkv6.chunk", "chunk_rwkv6"),
    LOW_RANK: ("fla.ops.generalized_delta_rule.dplr.chunk", "chunk_dplr_delta_rule"),
}

Kernel = Callable[..., tuple[Tensor, Tensor]]


class FlaSummary(NamedTuple):
    """As models.primitives.scan.RunSummary."""

    keep: Tensor
    gain: Tensor
    opened: Tensor


def select_kernel(
    query: Sequence[Tensor], payload: Sequence[Tensor], *, before: bool
) -> tuple[str, Kernel] | None:
    """(kind, kernel) for these tensors as a Scan gets them; None: the chunks in torch serve."""
    q = query[0]
    kind = scan_kind(payload, before)
    if (
        kind is None
        or q.device.type != "cuda"
        or torch.version.hip is not None
        or q.shape[-1] > WIDEST
    ):
        return None
    if q.dtype not in HALF and not (
        q.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    ):
        return None
    kernel = load_kernel(kind)
    return None if kernel is None else (kind, kernel)


def scan_kind(payload: Sequence[Tensor], before: bool) -> str | None:
    """Returns the key of TABLE that serves this payload, or None."""
    channel = payload[2].dim() == 4
    low = len(payload) > 3
    if low:
        return None if before else LOW_RANK
    if before:
        return BEFORE if channel else None
    return CHANNEL if channel else PLAIN


@lru_cache
def load_kernel(kind: str) -> Kernel | None:
    """Returns the kernel of a kind; None where the package is missing or fails to import.

    A failed import is warned of once.
    """
    module, name = TABLE[kind]
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if error.name == PACKAGE:
            return None
        problem = error
    except Exception as error:
        # A package built for another version of torch or triton may fail in any way.
        problem = error
    warnings.warn(
        f"no kernel {module}.{name} ({type(problem).__name__}: {problem}); torch serves in its"
        " place",
        stacklevel=2,
    )
    return None


def report() -> str:
    """Describes for a log the kernels that scans have on this machine."""
    if not torch.cuda.is_available():
        return "scans: torch, no GPU"
    kinds = [kind for kind in TABLE if load_kernel(kind)]
    if not kinds:
        return "scans: torch, no flash-linear-attention"
    return f"scans: flash-linear-attention for {', '.join(kinds)}"


def call_kernel(
    kind: str, kernel: Kernel, tensors: Sequence[Tensor], state: Tensor, ends: Tensor
) -> tuple[Tensor, Tensor]:
    """([1, N, H, E], last states [S, H, D, E]) of stretches end to end.

    Args:
        tensors: q, k [1, N, H, D], v [1, N, H, E], log decay [1, N, H, 1 or D], and with a low-rank
            term a, b [1, N, H, D].
        state: [S, H, D, E] before each stretch.
        ends: [S + 1] int64, 0 and where each stretch ends.
    """
    q, k, v, log, *low = tensors
    rest: dict[str, Any] = {
        "scale": 1.0,
        "initial_state": state,
        "output_final_state": True,
        "cu_seqlens": ends,
    }
    if kind == PLAIN:
        return kernel(q, k, v, g=log[..., 0].contiguous(), **rest)
    if kind == CHANNEL:
        return kernel(q, k, v, g=log, **rest)
    if kind == BEFORE:
        return kernel(q, k, v, w=log, u=torch.zeros_like(log[0, 0]), **rest)
    return kernel(q, k, v, *low, log.expand_as(k).contiguous(), **rest)


class FlaScan:
    """As models.primitives.scan.ScanWork, by a kernel that takes whole stretches.

    Nothing is computed before a result is asked for.
    """

    def __init__(
        self,
        kind: str,
        kernel: Kernel,
        query: Tensor,
        payload: Sequence[Tensor],
        plan: VarlenLayout,
    ):
        self.kind = kind
        self.kernel = kernel
        self.plan = plan
        self.dtype = query.dtype
        self.decay = payload[2]
        heads = payload[1].shape[2]
        wide = torch.promote_types(query.dtype, torch.float32)
        log = self.decay if self.decay.dim() == 4 else self.decay[..., None]
        parts = [query, payload[0], payload[1], log.to(wide).clamp_min(STRONGEST), *payload[3:]]
        picked = [plan.pick(x.to(wide if i == 3 else query.dtype)) for i, x in enumerate(parts)]
        self.tensors = [x.expand(*x.shape[:2], heads, x.shape[3]).contiguous() for x in picked]
        self.wide = wide
        self.log = picked[3]

    def blank(self) -> Tensor:
        """Returns empty incoming states, [B, R, H, D, E]."""
        _, k, v, *_ = self.tensors
        return v.new_zeros(
            *self.plan.opened.shape, k.shape[2], k.shape[3], v.shape[3], dtype=self.wide
        )

    def read_ahead(self) -> None:
        """Computes nothing: the kernel goes through a stretch as a whole."""

    def summarise(self) -> FlaSummary:
        """Returns the effect of every run on a state that passes through it."""
        opened = self.plan.opened
        blank = self.blank()
        if self.kind != LOW_RANK:
            sums = self.log.new_zeros(opened.numel(), *self.log.shape[2:]).index_add(
                0, self.plan.run, self.log[0]
            )
            kept = sums.exp().unflatten(0, opened.shape)
            gain = self.final_states(blank)
        else:
            width = blank.shape[-2]
            one = torch.eye(width, dtype=blank.dtype, device=blank.device).expand(
                *blank.shape[:-1], width
            )
            value = self.tensors[2]
            further = value.new_zeros(*value.shape[:-1], width)
            _, left = self._go(torch.cat([value, further], -1), torch.cat([blank, one], -1))
            gain, kept = left.split([blank.shape[-1], width], -1)
        shut = opened.view(*opened.shape, *[1] * (kept.dim() - 2))
        return FlaSummary(torch.where(shut, 0, kept), gain, opened)

    def read(self, states: Tensor) -> Tensor:
        """Returns [B, T, H, E], given the states [B, R, H, D, E] before each run; 0 at padding."""
        return self.plan.spread(self._go(self.tensors[2], states)[0]).to(self.dtype)

    def final_states(self, states: Tensor) -> Tensor:
        """Returns the states just after each run, given those before, [B, R, H, D, E]."""
        return self._go(self.tensors[2], states)[1]

    def _go(self, value: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
        flat = states.flatten(0, 1)
        plan = self.plan
        tensors = [*self.tensors[:2], value, *self.tensors[3:]]
        if not len(plan.origin):
            # Padding only: the graph must still reach every input, as it does on other ranks.
            return value + sum(x.flatten()[:0].sum() for x in (*tensors, states)), states
        # An origin of -1 takes the last entry, the appended empty state.
        start = torch.cat([flat, torch.zeros_like(flat[:1])])[plan.origin]
        out, last = call_kernel(self.kind, self.kernel, tensors, start.contiguous(), plan.ends)
        left = torch.cat([last.to(flat.dtype), flat])[
            torch.where(plan.last < 0, plan.through, plan.last)
        ]
        return out, left.unflatten(0, states.shape[:2])

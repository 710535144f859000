"""Calls flash-attn for rows of their own, or for packed stretches under one pair of bounds.

An lse over ALL keys may come from outside in backward, so a block of a ring is a call. Bounds count
from the last query and the last key, as in models/kernels/band_plan.py.

Letters: B rows, T queries, S keys, H query heads, G key heads, D key width, E value width; N, M
queries and keys of packed stretches.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from models.kernels.band_plan import EVERY, BandCall
from models.kernels.flash_attention.releases import RELEASES, Functions, Release, attempt
from models.kernels.kernel_inputs import KernelChoice, loadable, lse_by_head
from models.kernels.reference import Partial, accumulation_dtype


def forward(
    use: KernelChoice,
    tensors: Sequence[Tensor],
    scale: float,
    bounds: tuple[int, int],
    call: BandCall | None = None,
    *,
    cap: float = 0.0,
) -> Partial | None:
    """Attends every row to its own keys, or every stretch of `call`.

    Args:
        use: a version that is available.
        tensors: q [B, T, H, D], k [B, S, G, D], v [B, S, G, E], or packed: [N, H, D], [M, G, D],
            [M, G, E]. Every query sees a key.
        bounds: left and right, as of band_plan.BandStretch.
        cap: bound of the logits; 0: none.

    Returns:
        mean [B, T, H, E] and lse [B, T, H], or [N, H, E] and [N, H], wide. None where the version
        has failed: it is given up.
    """
    release = RELEASES[use.kernel]
    arguments = _arguments(release, release.causal[0], scale, bounds, call) | release.forward
    arguments["softcap"] = cap
    q, k, v = _ready(tensors, use)

    def run(functions: Functions) -> tuple[Tensor, Tensor]:
        function = functions[0 if call is None else 2]
        return function(q=q, k=k, v=v, **arguments)[:2]

    answer = attempt(use.kernel, run)
    if answer is None:
        return None
    wide = accumulation_dtype(tensors[0].dtype)
    mean, lse = answer
    return mean[..., : tensors[2].shape[-1]].to(wide), lse.transpose(-1, -2).to(wide)


def backward(
    use: KernelChoice,
    tensors: Sequence[Tensor],
    scale: float,
    bounds: tuple[int, int],
    call: BandCall | None = None,
    *,
    d_out: Tensor,
    mean: Tensor,
    lse: Tensor,
    cap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Returns the gradients of q, k and v, half, given mean and lse over ALL keys.

    Args:
        use, tensors, scale, bounds, call, cap: as in `forward`.
        d_out, mean, lse: as `forward` returns them.

    Returns:
        None as `forward`.
    """
    release = RELEASES[use.kernel]
    arguments = _arguments(release, release.causal[1], scale, bounds, call) | release.backward
    arguments["softcap"] = cap
    arguments["deterministic"] = torch.are_deterministic_algorithms_enabled()
    arguments[release.lse] = lse_by_head(lse)
    for name, x in (("dout", d_out), ("out", mean)):
        arguments[name] = loadable(x, use.dtype, use.value, gapless=True)
    q, k, v = _ready(tensors, use)

    def run(functions: Functions) -> list[Tensor]:
        gradients = [x.new_empty(x.shape) for x in (q, k, v)]
        into = dict(zip(("dq", "dk", "dv"), gradients, strict=True))
        functions[1 if call is None else 3](q=q, k=k, v=v, **into, **arguments)
        return gradients

    answer = attempt(use.kernel, run)
    if answer is None:
        return None
    d_q, d_k, d_v = (grad[..., : x.shape[-1]] for grad, x in zip(answer, tensors, strict=True))
    return d_q, d_k, d_v


def _ready(tensors: Sequence[Tensor], use: KernelChoice) -> list[Tensor]:
    widths = use.key, use.key, use.value
    return [loadable(x, use.dtype, width) for x, width in zip(tensors, widths, strict=True)]


def _arguments(
    release: Release, causal: str, scale: float, bounds: tuple[int, int], call: BandCall | None
) -> dict[str, Any]:
    """Returns the arguments that forward and backward share."""
    left, right = (release.unbounded if bound == EVERY else bound for bound in bounds)
    arguments = {
        "softmax_scale": scale,
        causal: bounds[1] == 0,
        "window_size_left": left,
        "window_size_right": right,
    }
    if call is not None:
        arguments["cu_seqlens_q"] = call.query_ends
        arguments["cu_seqlens_k"] = call.key_ends
        arguments["max_seqlen_q"] = call.longest_query
        arguments["max_seqlen_k"] = call.longest_key
    return arguments

"""Attention rollout: how the tokens of a row flow through all layers.

Letters: L layers, H heads, T tokens.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from models.analysis.attention_maps import AttentionMap


def rollout(maps: Sequence[AttentionMap], residual: float = 0.5) -> list[Tensor]:
    """Multiplies the maps of the layers, each averaged over heads and mixed with the residual.

    Args:
        maps: of one row, in the order of the layers; keys that stand for no single token of the
            row are left out, and the rest is scaled to 1 again.
        residual: share of a token that stays at its own place in every layer.

    Returns:
        [T, T] float64 for each map: the share of each token of the row (across) in each token after
        that layer (down). Rows sum to 1.

    Raises:
        ValueError: maps of different rows.

    Source: Abnar & Zuidema 2020 (arXiv:2005.00928). Feed-forward layers and norms are not counted,
    so the result says where information can come from, not what is used of it.
    """
    flows = []
    total: Tensor | None = None
    for attention in maps:
        tokens = attention.weight.shape[1]
        if total is not None and len(total) != tokens:
            raise ValueError(f"a map of {tokens} tokens follows one of {len(total)}")
        weight = attention.weight[:, :, :tokens].double().mean(0)
        identity = torch.eye(tokens, dtype=torch.float64)
        mass = weight.sum(-1, keepdim=True)
        # A token that sees nothing keeps only what it is.
        scaled = torch.where(mass > 0, weight / mass.clamp_min(1e-300), identity)
        layer = residual * identity + (1 - residual) * scaled
        total = layer if total is None else layer @ total
        flows.append(total)
    return flows


def weighted_by_values(attention: AttentionMap) -> Tensor:
    """[H, T, S] float64: weights times the norms of what they weigh, each row scaled to 1.

    Source: Kobayashi et al. 2020 (arXiv:2004.10102).

    Raises:
        ValueError: the map was collected without norms.
    """
    if attention.value_norm is None:
        raise ValueError("the map holds no norms of values; collect it with norms=True")
    product = attention.weight.double() * attention.value_norm.double()[:, None, :]
    return product / product.sum(-1, keepdim=True).clamp_min(1e-300)

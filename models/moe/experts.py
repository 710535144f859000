"""The experts of a layer: feed-forward layers in one module, their weights stacked by expert.

Letters: E experts, N visits, W width, H hidden width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.init import Rule, ScaledNormal
from models.kernels.grouped_mm import grouped_mm
from models.layer import Layer

ACTIVATIONS = ("swiglu", "relu")


class Experts(Layer):
    """E feed-forward layers: down(silu(gate(x)) * up(x)), or with `relu` down(relu(up(x))).

    Args:
        count: E.
        width: W.
        hidden: H.
        activation: swiglu (Shazeer 2020, arXiv:2002.05202) or relu (as Fedus et al. 2021,
            arXiv:2101.03961).
        dropout: share of hidden channels that a visit loses where `keep` is False.
        visited: experts that a token visits, for the counts of parameters and FLOPs.
        layers: number of layers of the model; the more of them add to the residual stream, the
            smaller `down` starts.

    Parameters are [E, ...]. Ranks may divide them by expert, and then forward sees the stacks of
    the experts at hand.
    """

    sharded_over_experts = True
    weight_decay = "up", "gate", "down"
    gate: Tensor | None

    def __init__(
        self,
        count: int,
        width: int,
        hidden: int,
        *,
        activation: str = "swiglu",
        dropout: float = 0.0,
        visited: int = 1,
        layers: int = 1,
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"unknown activation={activation}; choose one of {', '.join(ACTIVATIONS)}"
            )
        self.dropout = dropout
        self.layers = layers
        self.hidden = hidden
        self.active_share = visited / count
        self.up = nn.Parameter(torch.empty(count, hidden, width))
        gate = nn.Parameter(torch.empty(count, hidden, width)) if activation == "swiglu" else None
        self.register_parameter("gate", gate)
        self.down = nn.Parameter(torch.empty(count, width, hidden))
        # All experts': the FLOP count multiplies it by `active_share`.
        self.multiply_adds = sum(stack.numel() for stack in self.parameters())

    def init_rules(self) -> dict[str, Rule]:
        """Starts `down` as that of the dense layer (models/architectures/decoder.py)."""
        rules: dict[str, Rule] = {name: ScaledNormal() for name, _ in self.named_parameters()}
        rules["down"] = ScaledNormal((2 * self.layers) ** -0.5)
        return rules

    def forward(self, tokens: Tensor, counts: Tensor, keep: Tensor | None = None) -> Tensor:
        """Applies each expert to its own tokens, [N, W] -> [N, W].

        Args:
            tokens: [N, W], sorted by expert.
            counts: int64, tokens of each expert at hand; the output is 0 past their sum.
            keep: [N, H] bool, hidden channels that are not dropped.
        """
        inner = grouped_mm(tokens, self.up, counts)
        if self.gate is None:
            inner = F.relu(inner)
        else:
            inner = F.silu(grouped_mm(tokens, self.gate, counts)) * inner
        if keep is not None:
            inner = torch.where(keep, inner / (1 - self.dropout), 0)
        return grouped_mm(inner, self.down, counts)

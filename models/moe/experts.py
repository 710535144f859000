"""The experts of a layer: as many feed-forward layers in one module, their weights stacked expert
by expert.

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
        count: E. width: W. hidden: H.
        activation: swiglu (Shazeer 2020, arXiv:2002.05202) or relu (as Fedus et al. 2021,
            arXiv:2101.03961).
        dropout: share of hidden channels that a visit loses where `keep` says so.
        visited: experts that a token visits, for counts of what a token costs.
        layers: of the model; what adds to the residual stream starts smaller the more layers add to
            it.

    Parameters are [E, ...]; `sharded_over_experts` says that ranks may divide them by expert, and
    then forward sees the stacks of the experts at hand.
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
                f"activation={activation} is none that experts have; choose one of"
                f" {', '.join(ACTIVATIONS)}"
            )
        self.dropout = dropout
        self.layers = layers
        self.hidden = hidden
        self.active_share = visited / count  # of its parameters, see models/cost/flops.py
        self.up = nn.Parameter(torch.empty(count, hidden, width))
        gate = nn.Parameter(torch.empty(count, hidden, width)) if activation == "swiglu" else None
        self.register_parameter("gate", gate)
        self.down = nn.Parameter(torch.empty(count, width, hidden))
        self.multiply_adds = sum(
            stack.numel() for stack in self.parameters()
        )  # for counts of FLOPs, of which a token has its share

    def init_rules(self) -> dict[str, Rule]:
        """As the dense layer's `down` (models/architectures/decoder.py)."""
        small = ScaledNormal((2 * self.layers) ** -0.5)
        return {
            name: small if name == "down" else ScaledNormal() for name, _ in self.named_parameters()
        }

    def forward(self, tokens: Tensor, counts: Tensor, keep: Tensor | None = None) -> Tensor:
        """[N, W].

        Args:
            tokens: [N, W], those of the first expert at hand first.
            counts: int64, tokens of each expert at hand; tokens past their sum give 0.
            keep: [N, H] bool, hidden channels that are not dropped.
        """
        inner = grouped_mm(tokens, self.up, counts)
        inner = (
            F.relu(inner)
            if self.gate is None
            else F.silu(grouped_mm(tokens, self.gate, counts)) * inner
        )
        if keep is not None:
            inner = torch.where(keep, inner / (1 - self.dropout), 0)
        return grouped_mm(inner, self.down, counts)

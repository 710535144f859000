"""The experts of a layer: feed-forward layers in one module, their weights stacked by expert.

Letters: E experts, N visits, W width, H hidden width.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.init import Rule, ScaledNormal, constant
from models.kernels.grouped_mm import grouped_mm
from models.layer import Layer

ACTIVATIONS = ("swiglu", "relu", "clamped_swiglu")


class Experts(Layer):
    """E feed-forward layers: down(silu(gate(x)) * up(x)), or with `relu` down(relu(up(x))).

    clamped_swiglu is down(g sigmoid(alpha g) * (u + 1)), where g is gate(x), at most `limit`, and u
    is up(x), within [-limit, limit].

    Args:
        count: E.
        width: W.
        hidden: H.
        activation: swiglu (Shazeer 2020, arXiv:2002.05202), relu (as Fedus et al. 2021,
            arXiv:2101.03961) or clamped_swiglu (gpt-oss, arXiv:2508.10925).
        bias: of all three products.
        alpha, limit: of clamped_swiglu alone; None: 1.702 and 7, as gpt-oss.
        dropout: share of hidden channels that a visit loses where `keep` is False.
        visited: experts that a token visits, for the counts of parameters and FLOPs.
        layers: number of layers of the model; the more of them add to the residual stream, the
            smaller `down` starts.

    Parameters are [E, ...], the biases [E, H], [E, H] and [E, W]. Ranks may divide them by expert,
    and then forward sees the stacks of the experts at hand.
    """

    sharded_over_experts = True
    weight_decay = "up", "gate", "down"
    gate: Tensor | None
    up_bias: Tensor | None
    gate_bias: Tensor | None
    down_bias: Tensor | None

    def __init__(
        self,
        count: int,
        width: int,
        hidden: int,
        *,
        activation: str = "swiglu",
        bias: bool = False,
        alpha: float | None = None,
        limit: float | None = None,
        dropout: float = 0.0,
        visited: int = 1,
        layers: int = 1,
    ):
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(
                f"unknown activation={activation}; choose one of {', '.join(ACTIVATIONS)}"
            )
        if activation != "clamped_swiglu" and (alpha is not None or limit is not None):
            raise ValueError(
                f"swiglu_alpha={alpha} and swiglu_limit={limit} are of activation=clamped_swiglu;"
                f" use null with activation={activation}"
            )
        self.activation = activation
        self.alpha = 1.702 if alpha is None else alpha
        self.limit = 7.0 if limit is None else limit
        self.dropout = dropout
        self.layers = layers
        self.hidden = hidden
        self.active_share = visited / count
        self.up = nn.Parameter(torch.empty(count, hidden, width))
        gated = activation != "relu"
        gate = nn.Parameter(torch.empty(count, hidden, width)) if gated else None
        self.register_parameter("gate", gate)
        self.down = nn.Parameter(torch.empty(count, width, hidden))
        # All experts': the FLOP count multiplies it by `active_share`.
        self.multiply_adds = sum(stack.numel() for stack in self.parameters())
        for name, channels in (("up", hidden), ("gate", hidden), ("down", width)):
            given = bias and (gated or name != "gate")
            blank = nn.Parameter(torch.zeros(count, channels)) if given else None
            self.register_parameter(f"{name}_bias", blank)

    def init_rules(self) -> dict[str, Rule]:
        """Starts `down` as that of the dense layer (models/architectures/decoder.py)."""
        rules: dict[str, Rule] = {}
        for name, _ in self.named_parameters():
            rules[name] = constant(0.0) if name.endswith("_bias") else ScaledNormal()
        rules["down"] = ScaledNormal((2 * self.layers) ** -0.5)
        return rules

    def forward(self, tokens: Tensor, counts: Tensor, keep: Tensor | None = None) -> Tensor:
        """Applies each expert to its own tokens, [N, W] -> [N, W].

        Args:
            tokens: [N, W], sorted by expert.
            counts: int64, tokens of each expert at hand; the output is 0 past their sum.
            keep: [N, H] bool, hidden channels that are not dropped.
        """
        inner = _product(tokens, self.up, self.up_bias, counts)
        if self.gate is None:
            inner = F.relu(inner)
        else:
            inner = self._gated(_product(tokens, self.gate, self.gate_bias, counts), inner)
        if keep is not None:
            inner = torch.where(keep, inner / (1 - self.dropout), 0)
        return _product(inner, self.down, self.down_bias, counts)

    def _gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """[N, H]: what goes into `down`."""
        if self.activation == "swiglu":
            return F.silu(gate) * up
        gate = gate.clamp(max=self.limit)
        up = up.clamp(-self.limit, self.limit)
        return gate * (self.alpha * gate).sigmoid() * (up + 1)


def _product(tokens: Tensor, stack: Tensor, bias: Tensor | None, counts: Tensor) -> Tensor:
    """Returns [N, M]: each row times the matrix of its expert, plus the expert's bias [E, M].

    Rows past the sum of `counts` give 0.
    """
    product = grouped_mm(tokens, stack, counts)
    if bias is None:
        return product
    row = torch.arange(len(tokens), device=tokens.device)
    expert = torch.searchsorted(counts.cumsum(0), row, right=True)
    # One more row of zeros, which is that of the rows past the last expert.
    return product + F.pad(bias, (0, 0, 0, 1))[expert]

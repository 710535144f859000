"""Top-k mixture of experts with shared experts and balancing by a bias."""

import torch
from torch import Tensor

from models.feedforward import SwiGLU
from models.init import Rule, ScaledNormal
from models.moe.base import MixtureOfExperts
from models.moe.experts import Experts
from models.moe.router import Router, choice_mask, routing_metrics, top_experts
from models.ranges import Few, Many, Some
from models.span import Span


class TopKMixture(MixtureOfExperts):
    """Sends each token to its `top` best experts, without a capacity, and to the shared experts.

    Args:
        width, ffn, layer, layers, seed, experts, jitter, router_scale, expert_dropout, balance, z,
            activation: as in Switch.
        top: experts that a token visits.
        shared: further experts that every token visits (DeepSeekMoE); computed as one wider layer.
        hidden: hidden width of each expert; ffn / (top + shared) by default, so a token costs what
            the dense layer costs.
        score: softmax, weights are the softmax over the chosen logits (Mixtral); sigmoid, they are
            the chosen sigmoids in units of their sum (DeepSeek-V3).
        scaling: factor of the weights.
        bias_speed: added after every step to the choice (not to the weight) of experts with less
            than the mean load, and subtracted from those with more: balance without a loss
            (arXiv:2408.15664). 0: no bias.

    Raises:
        ValueError: a setting out of its range.

    Source: Jiang et al. 2024 (arXiv:2401.04088) and DeepSeek-AI 2024 (arXiv:2412.19437). Ours
    counts the bias's load over all ranks and micro-batches of a step.
    """

    bias: Tensor | None

    def __init__(
        self,
        width: int,
        ffn: int,
        layer: int = 0,
        layers: int = 1,
        seed: int = 0,
        *,
        experts: Many = 8,
        top: Few = 2,
        shared: Some = 0,
        hidden: int | None = None,
        score: str = "softmax",
        scaling: float = 1.0,
        bias_speed: float = 0.0,
        jitter: float = 0.0,
        router_scale: float = 1.0,
        expert_dropout: float = 0.0,
        balance: float = 0.0,
        z: float = 0.0,
        activation: str = "swiglu",
    ):
        validate_experts(experts, top, hidden)
        if score not in ("softmax", "sigmoid"):
            raise ValueError(f"unknown score={score}; choose softmax or sigmoid")
        for name, value in (("shared", shared), ("bias_speed", bias_speed)):
            if value < 0:
                raise ValueError(f"{name}={value}: must be 0 or more; use 0 to leave it out")
        hidden = hidden or max(1, ffn // (top + shared))
        stacks = Experts(
            experts,
            width,
            hidden,
            activation=activation,
            dropout=expert_dropout,
            layers=layers,
            visited=top,
        )
        router = Router(width, experts, jitter=jitter, scale=router_scale, layer=layer, seed=seed)
        super().__init__(
            stacks,
            router,
            expert_dropout=expert_dropout,
            balance=balance,
            z=z,
            layer=layer,
            seed=seed,
        )
        self.top = top
        self.score = score
        self.scaling = scaling
        self.bias_speed = bias_speed
        self.layers = layers
        self.shared = SwiGLU(width, shared * hidden) if shared else None
        self.register_buffer("bias", torch.zeros(experts) if bias_speed else None)

    def init_rules(self) -> dict[str, Rule]:
        """Starts the shared experts' `down` as that of the others."""
        if self.shared is None:
            return {}
        return {"shared.down.weight": ScaledNormal((2 * self.layers) ** -0.5)}

    def reset_buffers(self) -> None:
        """Sets the bias to 0, the value before step 1."""
        if self.bias is not None:
            self.bias = torch.zeros_like(self.bias)

    def on_step_end(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Moves the bias by the choices of all ranks and returns the routing metrics."""
        if self.bias is not None:
            load = sums["load"].to(self.bias.device)
            self.bias += self.bias_speed * (load.mean() - load).sign().to(self.bias.dtype)
        return routing_metrics(sums)

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        x = torch.where(span.valid()[..., None], x, 0)
        logits = self.router(x, span)
        scores = logits.softmax(-1) if self.score == "softmax" else logits.sigmoid()
        choice = top_experts(logits if self.bias is None else scores + self.bias, self.top)
        if self.score == "softmax":
            gate = logits.gather(-1, choice).softmax(-1)
            probs = scores
        else:
            gate = scores.gather(-1, choice)
            probs = scores / scores.sum(-1, keepdim=True)
            gate = gate / gate.sum(-1, keepdim=True)
        # Without a capacity, only visits of padding are dropped.
        kept = span.valid()[..., None].expand_as(choice)
        self._leave(logits, probs, choice_mask(choice, span, self.count), kept, span)
        out = self._mixed(x, span, choice, self.scaling * gate, kept)
        if self.shared is not None:
            out = out + self.shared(x, span)
        return out


def validate_experts(experts: int, top: int, hidden: int | None) -> None:
    """Raises ValueError where the numbers of experts or their width are out of range."""
    if experts < 1 or not 1 <= top <= experts:
        raise ValueError(
            f"experts={experts}, experts of a token={top}: both must be 1 or more, and a token"
            " cannot visit more experts than there are"
        )
    if hidden is not None and hidden < 1:
        raise ValueError(
            f"hidden={hidden}: must be 1 or more; use null for an expert that costs a token what"
            " the dense layer costs"
        )

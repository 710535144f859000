"""Top-k mixture of experts with shared experts and bias balancing."""

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
    """Each token visits its `top` best experts, however many come, and all tokens the shared ones.

    Args:
        width, ffn, experts, jitter, router_scale, expert_dropout, balance, z, activation: as Switch
        has them.
        top: experts that a token visits.
        shared: experts that every token visits beside those (DeepSeekMoE); they are one wider
            layer.
        hidden: hidden width of each expert; ffn / (top + shared) by default, so a token costs what
            the dense layer costs.
        score: softmax, weights are the softmax over the chosen logits (Mixtral); sigmoid, they are
            the chosen sigmoids in units of their sum (DeepSeek-V3).
        scaling: factor of the weights.
        bias_speed: after every step, an expert that fewer chose than the mean gains so much in the
            choice (not in its weight), and one that more chose loses as much: balance without a
            loss (arXiv:2408.15664). 0: no such bias.

    Raises:
        ValueError: a setting that is no number of its kind; see each message.

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
            raise ValueError(f"score={score} is none that a router has; choose softmax or sigmoid")
        if shared < 0 or bias_speed < 0:
            raise ValueError(f"shared={shared} and bias_speed={bias_speed} must be 0 or more")
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
        """The shared experts' `down` starts as that of the others."""
        return (
            {"shared.down.weight": ScaledNormal((2 * self.layers) ** -0.5)}
            if self.shared is not None
            else {}
        )

    def reset_buffers(self) -> None:
        """No expert is favoured before step 1; for a model that was built on the meta device."""
        if self.bias is not None:
            self.bias = torch.zeros_like(self.bias)

    def on_step_end(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """See models/auxiliary.py; the bias moves here, by the choices of all ranks."""
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
        kept = span.valid()[..., None].expand_as(choice)
        self._leave(logits, probs, choice_mask(choice, span, self.count), kept, span)
        out = self._mixed(x, span, choice, self.scaling * gate, kept)
        return out if self.shared is None else out + self.shared(x, span)


def validate_experts(experts: int, top: int, hidden: int | None) -> None:
    """Raises ValueError where a layer cannot have such experts."""
    if experts < 1 or not 1 <= top <= experts:
        raise ValueError(
            f"a token visits {top} of {experts} experts; there must be at least as many, and both 1"
            " or more"
        )
    if hidden is not None and hidden < 1:
        raise ValueError(
            f"hidden={hidden} is no width of an expert; choose 1 or more, or null for what costs as"
            " much as dense"
        )

"""Top-k mixture of experts with shared experts and balancing by a bias."""

import torch
from torch import Tensor, nn

from models.feedforward import SwiGLU
from models.init import Rule, ScaledNormal
from models.moe.base import MixtureOfExperts
from models.moe.choice import ExpertChoice
from models.moe.experts import Experts
from models.moe.router import Router, choice_mask, routing_metrics
from models.ranges import Count, Few, Many, Positive, Some
from models.span import Span, to_device


class TopKMixture(MixtureOfExperts):
    """Sends each token to its `top` best experts, without a capacity, and to the shared experts.

    Args:
        width, ffn, layer, layers, seed, experts, jitter, router_scale, expert_dropout, balance, z,
            activation: as in Switch.
        top: experts that a token visits.
        shared: further experts that every token visits (DeepSeekMoE); computed as one wider layer.
        shared_hidden: hidden width of that layer; null: shared times that of an expert.
        shared_gate: multiply its output by sigmoid(w x), a number for each token (Qwen3-Next).
        hidden: hidden width of each expert; ffn / (top + shared) by default, so a token costs what
            the dense layer costs.
        score: softmax, weights are the softmax over the chosen logits (Mixtral); sigmoid, they are
            the chosen sigmoids in units of their sum (DeepSeek-V3).
        normalised: false: weights are the softmax over all logits, or the sigmoids, as they are.
        scaling: factor of the weights.
        bias_speed: added after every step to the choice (not to the weight) of experts with less
            than the mean load, and subtracted from those with more: balance without a loss
            (arXiv:2408.15664). 0: the bias stays as it is.
        choice_bias: have that bias also where its speed is 0, for weights that bring one.
        groups: the experts lie in so many groups of neighbours, on machines of their own.
        top_groups: of those a token visits so many, the ones whose best two experts are the best.
        router_bias, expert_bias: learned biases of the logits and of the experts' products.
        swiglu_alpha, swiglu_limit: of activation=clamped_swiglu alone (models/moe/experts.py);
            null: 1.702 and 7.

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
        shared_hidden: Count | None = None,
        shared_gate: bool = False,
        hidden: int | None = None,
        score: str = "softmax",
        normalised: bool = True,
        scaling: float = 1.0,
        bias_speed: float = 0.0,
        choice_bias: bool = False,
        groups: Few = 1,
        top_groups: Few = 1,
        router_bias: bool = False,
        expert_bias: bool = False,
        jitter: float = 0.0,
        router_scale: float = 1.0,
        expert_dropout: float = 0.0,
        balance: float = 0.0,
        z: float = 0.0,
        activation: str = "swiglu",
        swiglu_alpha: Positive | None = None,
        swiglu_limit: Positive | None = None,
    ):
        validate_experts(experts, top, hidden)
        _validate_shared(shared, shared_hidden, shared_gate, bias_speed=bias_speed)
        hidden = hidden or max(1, ffn // (top + shared))
        stacks = Experts(
            experts,
            width,
            hidden,
            activation=activation,
            bias=expert_bias,
            alpha=swiglu_alpha,
            limit=swiglu_limit,
            dropout=expert_dropout,
            layers=layers,
            visited=top,
        )
        drawn = {"layer": layer, "seed": seed}
        noise = {"jitter": jitter, "scale": router_scale}
        router = Router(width, experts, bias=router_bias, **noise, **drawn)
        super().__init__(
            stacks, router, expert_dropout=expert_dropout, balance=balance, z=z, **drawn
        )
        self.rule = ExpertChoice(experts, top, score, normalised, groups, top_groups)
        self.scaling = scaling
        self.bias_speed = bias_speed
        self.layers = layers
        self.shared = SwiGLU(width, shared_hidden or shared * hidden) if shared else None
        self.shared_gate = nn.Linear(width, 1, bias=False) if shared_gate else None
        self.register_buffer("bias", torch.zeros(experts) if bias_speed or choice_bias else None)

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
        if self.bias is not None and self.bias_speed:
            load = to_device(sums["load"], self.bias.device)
            self.bias += self.bias_speed * (load.mean() - load).sign().to(self.bias.dtype)
        return routing_metrics(sums)

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        x = torch.where(span.valid()[..., None], x, 0)
        logits = self.router(x, span)
        scores = self.rule.scores(logits)
        probs = self.rule.probabilities(scores)
        choice = self.rule.choose(logits, scores, self.bias)
        # Without a capacity, only visits of padding are dropped.
        kept = span.valid()[..., None].expand_as(choice)
        self._leave(logits, probs, choice_mask(choice, span, self.count), kept, span)
        gate = self.scaling * self.rule.weights(logits, scores, choice)
        out = self._mixed(x, span, choice, gate, kept)
        if self.shared is not None:
            always = self.shared(x, span)
            if self.shared_gate is not None:
                always = always * self.shared_gate(x).sigmoid()
            out = out + always
        return out


def _validate_not_negative(**settings: float) -> None:
    for name, value in settings.items():
        if value < 0:
            raise ValueError(f"{name}={value}: must be 0 or more; use 0 to leave it out")


def _validate_shared(
    shared: int, shared_hidden: int | None, shared_gate: bool, **others: float
) -> None:
    _validate_not_negative(shared=shared, **others)
    if not shared and (shared_gate or shared_hidden is not None):
        raise ValueError(
            f"shared_hidden={shared_hidden} and shared_gate={str(shared_gate).lower()} are of"
            " shared experts, and shared=0 has none; use shared=1, or leave them out"
        )


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

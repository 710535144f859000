"""The Switch layer: each token visits one expert, up to the expert's capacity."""

from fractions import Fraction

import torch
from torch import Tensor

from models.moe.base import MixtureOfExperts
from models.moe.experts import Experts
from models.moe.router import Router, choice_mask, top_experts
from models.moe.topk import validate_experts
from models.primitives.segment_sum import SCOPES
from models.ranges import Many, Shares
from models.span import Span


class Switch(MixtureOfExperts):
    """Sends each token to its most probable expert while that has room: y = p E(x), or 0.

    Args:
        width: of input and output.
        ffn: hidden width of the dense layer that this one replaces.
        layer, layers: number of this layer, and of all layers of the model.
        seed: of the router's jitter and of expert dropout.
        experts: number of experts.
        hidden: hidden width of an expert; null: ffn, so that a token costs what it costs in the
            dense layer.
        capacity_factor: an expert takes at most ceil(capacity_factor n / experts) of n tokens, the
            first ones; null: all.
        eval_capacity_factor: the same outside training.
        capacity_over: document: n counts the tokens of a document, so that its drops do not depend
            on another document; row: those of the packed row.
        jitter: relative noise on the router's input in training.
        router_scale: deviation of the router's initial weights, in units of the usual one.
        expert_dropout: share of hidden channels dropped inside experts in training (0.4 in the
            source's fine-tuning).
        balance: weight of the load-balancing loss, taken per packed row.
        z: weight of the router's z-loss.
        activation: of the experts: swiglu, or relu as in the source.

    Raises:
        ValueError: a setting out of its range.

    Source: Fedus et al. 2021 (arXiv:2101.03961). Theirs counts capacity over the tokens of a
    device, so what is dropped depends on how a batch was cut; ours over a document (or row) in the
    order of its tokens, on any number of ranks.
    """

    def __init__(
        self,
        width: int,
        ffn: int,
        layer: int = 0,
        layers: int = 1,
        seed: int = 0,
        *,
        experts: Many = 8,
        hidden: int | None = None,
        capacity_factor: Shares | None = 1.25,
        eval_capacity_factor: Shares | None = 2.0,
        capacity_over: str = "document",
        jitter: float = 0.01,
        router_scale: float = 0.1,
        expert_dropout: float = 0.0,
        balance: float = 0.01,
        z: float = 0.001,
        activation: str = "swiglu",
    ):
        validate_experts(experts, 1, hidden)
        if capacity_over not in SCOPES:
            raise ValueError(
                f"unknown capacity_over={capacity_over}; choose one of {', '.join(SCOPES)}"
            )
        factors = {
            "capacity_factor": capacity_factor,
            "eval_capacity_factor": eval_capacity_factor,
        }
        for name, value in factors.items():
            if value is not None and value <= 0:
                raise ValueError(
                    f"{name}={value}: must be above 0; use null for experts without a limit"
                )
        stacks = Experts(
            experts,
            width,
            hidden or ffn,
            activation=activation,
            dropout=expert_dropout,
            layers=layers,
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
        self.capacity_factor = capacity_factor
        self.eval_capacity_factor = eval_capacity_factor
        self.over = capacity_over

    def decodes(self) -> str | None:
        """See Layer."""
        if self.eval_capacity_factor is None:
            return None
        return (
            f"eval_capacity_factor={self.eval_capacity_factor} drops tokens by the number of tokens"
            f" of the {self.over}, later ones among them; use eval_capacity_factor=null"
        )

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        # Padding may hold anything, also NaN, which would spread through the router's sums.
        x = torch.where(span.valid()[..., None], x, 0)
        logits = self.router(x, span)
        probs = logits.softmax(-1)
        choice = top_experts(logits, 1)
        marks = choice_mask(choice, span, self.count)
        kept = span.valid()[..., None] & self._room(choice, marks, span)
        self._leave(logits, probs, marks, kept, span)
        return self._mixed(x, span, choice, probs.gather(-1, choice), kept)

    def _room(self, choice: Tensor, marks: Tensor, span: Span) -> Tensor:
        """Marks tokens that come early enough in the queue of their expert, [B, T, 1] bool."""
        factor = self.capacity_factor if self.training else self.eval_capacity_factor
        if factor is None:
            return torch.ones_like(choice, dtype=torch.bool)
        tokens = self.tally.count(span, self.over)
        queue_length = self.tally.before(marks, span, self.over).gather(-1, choice)
        return queue_length < expert_capacity(tokens, self.count, factor)[..., None]


def expert_capacity(tokens: Tensor, experts: int, factor: float) -> Tensor:
    """Returns ceil(factor tokens / experts), exact for decimal factors."""
    # As a float, 1.1 is a little more than eleven tenths, and the ceiling would be one too high.
    exact = Fraction(str(factor))
    return -(-(tokens * exact.numerator) // (exact.denominator * experts))

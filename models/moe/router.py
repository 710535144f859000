"""The router of a mixture of experts: choice of experts, losses and metrics of the choice.

Letters: B rows, T tokens, W width, E experts, k experts of a token.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.counter_rng import CounterRNG, address
from models.init import Rule, ScaledNormal
from models.layer import Layer
from models.primitives.segment_sum import SegmentSum
from models.span import Span


class Router(Layer, nn.Linear):
    """Computes the logits [B, T, E], at least in float32 whatever the model computes in.

    Args:
        width: W.
        experts: E.
        jitter: in training every channel of the input is multiplied by a uniform number in [1 -
            jitter, 1 + jitter].
        scale: deviation of the initial weights, in units of the usual one.
        bias: add a learned one to the logits (gpt-oss, arXiv:2508.10925).
        layer, seed: what the jitter is drawn from, besides the step and the token's address.

    Source: Fedus et al. 2021 (arXiv:2101.03961), section 2.4 and appendix C. Their jitter is drawn
    in order, ours is a function of the token's address.
    """

    def __init__(
        self,
        width: int,
        experts: int,
        *,
        jitter: float = 0.0,
        scale: float = 1.0,
        bias: bool = False,
        layer: int = 0,
        seed: int = 0,
    ):
        super().__init__(width, experts, bias=bias)
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter={jitter}: must be 0 or more and below 1; 0.01 is usual")
        if scale <= 0:
            raise ValueError(
                f"router_scale={scale}: must be above 0, or every token would start with the same"
                " logits; 1 is usual"
            )
        self.jitter = jitter
        self.scale = scale
        self.chance = CounterRNG(seed, "router jitter", layer) if jitter else None

    def init_rules(self) -> dict[str, Rule]:
        """Starts nearer to an even choice with smaller weights."""
        return {"weight": ScaledNormal(self.scale)}

    def forward(self, x: Tensor, span: Span) -> Tensor:  # type: ignore[override]
        """[B, T, W] -> [B, T, E]."""
        # In bfloat16 logits of near experts would round to the same number.
        wide = torch.promote_types(x.dtype, torch.float32)
        x = x.to(wide)
        if self.training and self.chance is not None:
            noise = 2 * self.chance(address(span), x.shape[-1]) - 1
            x = x * (1 + self.jitter * noise).to(wide)
        bias = None if self.bias is None else self.bias.to(wide)
        return F.linear(x, self.weight.to(wide), bias)


def top_experts(scores: Tensor, count: int) -> Tensor:
    """Returns the experts of highest score, [B, T, count] int64; of equal ones the first."""
    # A stable sort, because topk leaves the order of equal scores to the device.
    ranking = scores.detach().double().sort(dim=-1, descending=True, stable=True)
    return ranking.indices[..., :count]


def choice_mask(choice: Tensor, span: Span, experts: int) -> Tensor:
    """Marks the chosen experts with 1, [B, T, E] int64; 0 at padding."""
    marks = torch.zeros(*choice.shape[:2], experts, dtype=torch.long, device=choice.device)
    return marks.scatter(2, choice, 1) * span.valid()[..., None]


def balance_loss(
    probs: Tensor, marks: Tensor, tokens: Tensor, span: Span, tally: SegmentSum
) -> Tensor:
    """Returns [B, T] whose sum over a row is E sum_i f_i P_i: 1 where its choices are even.

    It is linear in the tokens once f, which has no gradient, is known of the whole row.

    Args:
        probs: [B, T, E] of every expert; P is their mean over the row's tokens, and carries the
            gradient.
        marks: [B, T, E]; f is the share of the row's choices that fell on an expert.
        tokens: [B, 1], tokens of the row on all ranks.
        span: addresses of the tokens.
        tally: sums over the whole row.

    f is that of the whole row, on any number of ranks: a mean of products over parts of a row is
    another number. Source: Fedus et al. 2021 (arXiv:2101.03961),
    equations 4 to 6; with k choices a token ours is divided by k (arXiv:2401.06066, equation 13, is
    the same up to their factor alpha).
    """
    chosen = tally.total(marks, span).to(probs.dtype)  # [B, 1, E]
    choices = chosen.sum(-1, keepdim=True).clamp_min(1)
    loss = probs.shape[-1] * (chosen / choices * probs).sum(-1) / tokens.clamp_min(1)
    return torch.where(span.valid(), loss, 0)


def z_loss(logits: Tensor, span: Span) -> Tensor:
    """Returns [B, T], the squared log-sum-exp of the logits.

    Source: Zoph et al. 2022 (arXiv:2202.08906), equation 5.
    """
    return torch.where(span.valid(), logits.logsumexp(-1).square(), 0)


@torch.no_grad()
def routing_statistics(probs: Tensor, marks: Tensor, kept: Tensor, span: Span) -> dict[str, Tensor]:
    """Sums choices of each expert, dropped choices, nats of entropy and tokens, over those at hand.

    Args:
        probs: [B, T, E].
        marks: [B, T, E], 1 where the token chose the expert.
        kept: [B, T, k] bool, whether a choice was honoured; False at padding.
    """
    entropy = -torch.special.xlogy(probs, probs).sum(-1)
    sums = {
        "load": marks.sum((0, 1)),
        "dropped": (marks.sum() - kept.sum())[None],
        "entropy": torch.where(span.valid(), entropy, 0).sum()[None],
        "tokens": span.valid().sum()[None],
    }
    return {name: value.double() for name, value in sums.items()}


def routing_metrics(sums: dict[str, Tensor]) -> dict[str, float]:
    """Returns the metrics of a layer, from its statistics summed over a step.

    Returns:
        load: of the fullest expert, in units of the mean load.
        dropped: share of the choices.
        entropy: mean over tokens, in nats.
        balance, z: the losses without their weights, mean over rows and over tokens.
    """
    load = sums["load"]
    tokens = sums["tokens"].clamp_min(1)
    metrics = {
        "load": load.max() / load.mean().clamp_min(1e-9),
        "dropped": sums["dropped"] / load.sum().clamp_min(1),
        "entropy": sums["entropy"] / tokens,
    }
    if "balance" in sums:
        metrics["balance"] = sums["balance"] / sums["rows"].clamp_min(1)
    if "z" in sums:
        metrics["z"] = sums["z"] / tokens
    return {name: float(value) for name, value in metrics.items()}

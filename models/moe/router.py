"""The router of a mixture of experts: what a token's experts are chosen by, and what is said of the
choice.

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
    """Logits [B, T, E], computed in float32 (float64 for such inputs) whatever the model computes
    in.

    Args:
        width: W. experts: E.
        jitter: in training every channel of the input is multiplied by a uniform number in [1 -
            jitter, 1 + jitter].
        scale: of the initial weights, in units of the usual ones.
        layer, seed: what the jitter is drawn from, beside the step and the address.

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
        layer: int = 0,
        seed: int = 0,
    ):
        super().__init__(width, experts, bias=False)
        if not 0 <= jitter < 1:
            raise ValueError(
                f"jitter={jitter} is no share of the input; choose one from 0 to below 1, for"
                " example 0.01"
            )
        if scale <= 0:
            raise ValueError(
                f"router_scale={scale} would start every token with the same logits; choose one"
                " above 0"
            )
        self.jitter = jitter
        self.scale = scale
        self.chance = CounterRNG(seed, "router jitter", layer) if jitter else None

    def init_rules(self) -> dict[str, Rule]:
        """Smaller weights start nearer to an even choice."""
        return {"weight": ScaledNormal(self.scale)}

    def forward(self, x: Tensor, span: Span) -> Tensor:  # type: ignore[override]
        """[B, T, E] from [B, T, W]."""
        wide = torch.promote_types(x.dtype, torch.float32)
        x = x.to(wide)
        if self.training and self.chance is not None:
            x = x * (1 + self.jitter * (2 * self.chance(address(span), x.shape[-1]) - 1)).to(wide)
        return F.linear(x, self.weight.to(wide))


def top_experts(scores: Tensor, count: int) -> Tensor:
    """[B, T, count] int64: the experts of highest score, compared in float64; of equals the
    first."""
    return scores.detach().double().sort(dim=-1, descending=True, stable=True).indices[..., :count]


def choice_mask(choice: Tensor, span: Span, experts: int) -> Tensor:
    """[B, T, E] int64: 1 where the token chose the expert, 0 at padding."""
    marks = torch.zeros(*choice.shape[:2], experts, dtype=torch.long, device=choice.device)
    return marks.scatter(2, choice, 1) * span.valid()[..., None]


def balance_loss(
    probs: Tensor, marks: Tensor, tokens: Tensor, span: Span, tally: SegmentSum
) -> Tensor:
    """[B, T] whose sum over a row is E sum_i f_i P_i of the row: 1 where its choices are even.

    Args:
        probs: [B, T, E] of every expert; P is their mean over the row's tokens, and carries the
            gradient.
        marks: [B, T, E]; f is the share of the row's choices that fell on an expert.
        tokens: [B, 1], of the row, on all ranks.

    f and P are those of the whole row, on however many ranks, before the product: a mean of
    products over parts of a row is another number. Source: Fedus et al. 2021 (arXiv:2101.03961),
    equations 4 to 6; with k choices a token ours is divided by k (arXiv:2401.06066, equation 13, is
    the same up to their factor alpha).
    """
    sums = tally.total(torch.cat([probs, marks.to(probs.dtype)], -1), span)
    total, chosen = sums.chunk(2, -1)  # [B, 1, E]
    choices = chosen.sum(-1, keepdim=True).clamp_min(1)
    tokens = tokens.clamp_min(1)
    loss = probs.shape[-1] * (chosen / choices * total / tokens[..., None]).sum(-1)
    return torch.where(span.valid(), loss / tokens, 0)


def z_loss(logits: Tensor, span: Span) -> Tensor:
    """[B, T]: the squared logarithm of the softmax's denominator (Zoph et al. 2022,
    arXiv:2202.08906, equation 5)."""
    return torch.where(span.valid(), logits.logsumexp(-1).square(), 0)


@torch.no_grad()
def routing_statistics(probs: Tensor, marks: Tensor, kept: Tensor, span: Span) -> dict[str, Tensor]:
    """Sums over the tokens at hand: choices of each expert, those that were dropped, nats of
    entropy, tokens.

    Args:
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
    """What the log says of a layer, from what `told` and its losses add up to over a step.

    load of the fullest expert, in units of the mean; dropped, a share of the choices; entropy in
    nats; the losses without
    their weights: balance, mean over the rows, and z, mean over the tokens.
    """
    load = sums["load"]
    tokens = sums["tokens"].clamp_min(1)
    found = {
        "load": load.max() / load.mean().clamp_min(1e-9),
        "dropped": sums["dropped"] / load.sum().clamp_min(1),
        "entropy": sums["entropy"] / tokens,
    }
    if "balance" in sums:
        found["balance"] = sums["balance"] / sums["rows"].clamp_min(1)
    if "z" in sums:
        found["z"] = sums["z"] / tokens
    return {name: float(value) for name, value in found.items()}

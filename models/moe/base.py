"""Mixtures of experts as feed-forward layers: what all share, and the one whose tokens visit
several experts, none dropped.

Letters: B rows, T tokens, W width, E experts, k experts of a token, N = B T k visits.
"""

from dataclasses import replace

import torch
from torch import Tensor

from models.counter_rng import CounterRNG, address
from models.layer import AuxiliaryOutputs, Layer
from models.moe.experts import Experts
from models.moe.router import Router, balance_loss, routing_metrics, routing_statistics, z_loss
from models.primitives.expert_dispatch import ExpertDispatch
from models.primitives.segment_sum import SegmentSum
from models.span import PADDING, READ, WRITE, Span


class MixtureOfExperts(Layer):
    """What all mixtures share: experts, the way there and back, and what is left for the trainer
    (models/auxiliary.py).

    Under memory=tokens a mixture sees a row segment by segment: tokens queue up within the segment,
    and the balancing loss is that of the segment, weighed by its tokens.
    """

    def __init__(
        self,
        experts: Experts,
        router: Router,
        *,
        expert_dropout: float,
        balance: float,
        z: float,
        layer: int,
        seed: int,
    ):
        super().__init__()
        for name, value in (("balance", balance), ("z", z)):
            if value < 0:
                raise ValueError(
                    f"{name}={value} would reward what it should punish; choose 0 to leave it out,"
                    " or more"
                )
        if not 0 <= expert_dropout < 1:
            raise ValueError(
                f"expert_dropout={expert_dropout} is no share of channels; choose one from 0 to"
                " below 1"
            )
        self.router = router
        self.experts = experts
        self.dispatch = ExpertDispatch()
        self.tally = SegmentSum()
        self.balance = balance
        self.z = z
        self.count = router.out_features
        self.chance = CounterRNG(seed, "expert dropout", layer) if expert_dropout else None
        self.auxiliary_sums = AuxiliaryOutputs()

    def on_step_end(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """See models/auxiliary.py."""
        return routing_metrics(sums)

    def _mixed(self, x: Tensor, span: Span, choice: Tensor, gate: Tensor, kept: Tensor) -> Tensor:
        """[B, T, W]: what the chosen experts make of each token, by weight; 0 for those that it may
        not visit.

        Args:
            choice: [B, T, k] int64. gate: [B, T, k] weights. kept: [B, T, k] bool.
        """
        rows, tokens, k = choice.shape
        expert = torch.where(
            kept, choice, self.count
        ).flatten()  # [N]; who stays at home comes last
        order = expert.argsort(stable=True)
        counts = expert.new_zeros(self.count + 1).scatter_add(0, expert, torch.ones_like(expert))[
            :-1
        ]
        keys = None
        if self.training and self.chance is not None:
            keys = (address(span)[..., None] * k + torch.arange(k, device=x.device)).flatten()[
                order
            ]
        made = self.dispatch.exchange(x.flatten(0, 1)[order // k], counts, self._visit, keys)
        made = made[order.argsort()].view(rows, tokens, k, x.shape[-1])
        return (made.to(gate.dtype) * torch.where(kept, gate, 0)[..., None]).sum(2).to(x.dtype)

    def _visit(self, tokens: Tensor, counts: Tensor, keys: Tensor | None) -> Tensor:
        keep = None
        if keys is not None and self.chance is not None:
            keep = self.chance(keys, self.experts.hidden) >= self.experts.dropout
        return self.experts(tokens, counts, keep)

    def _leave(
        self, logits: Tensor, probs: Tensor, marks: Tensor, kept: Tensor, span: Span
    ) -> None:
        """Leave the losses and the sums of this forward pass."""
        if not (self.training and torch.is_grad_enabled()):
            return
        segment = not span.role.is_meta and bool((span.role == READ).any())
        # of rows that have none at this turn, memory tokens alone pass through, and come to nothing
        if segment:
            span = _with_text(span)
            marks = marks * span.valid()[..., None]
            kept = kept & span.valid()[..., None]
        self.auxiliary_sums.add(statistics=routing_statistics(probs, marks, kept, span))
        if self.balance:
            tokens = self.tally.total(span.valid().long(), span)
            loss = balance_loss(probs, marks, tokens, span, self.tally)
            rows = torch.where(
                span.valid(), 1 / tokens.clamp_min(1).double(), 0
            )  # a row's tokens make up one between them
            if segment:
                self.auxiliary_sums.add(tokens={"balance": self.balance * (loss * tokens).sum()})
            else:
                self.auxiliary_sums.add(rows={"balance": self.balance * loss.sum()})
            self.auxiliary_sums.add(statistics={"balance": _sum(loss), "rows": _sum(rows)})
        if self.z:
            loss = z_loss(logits, span)
            self.auxiliary_sums.add(
                tokens={"router_z": self.z * loss.sum()}, statistics={"z": _sum(loss)}
            )


def _sum(losses: Tensor) -> Tensor:
    return losses.detach().double().sum()[None]


def _with_text(span: Span) -> Span:
    """The addresses, rows without any token but memory tokens being padding."""
    text = span.valid() & (span.role != READ) & (span.role != WRITE)
    return replace(span, doc=span.doc.masked_fill(~text.any(1, keepdim=True), PADDING), plans={})

"""Base of mixtures of experts as feed-forward layers: dispatch, expert computation and losses.

Letters: B rows, T tokens, W width, E experts, k experts of a token, N = B T k visits.
"""

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
    """Experts, the exchange of tokens with them, and the auxiliary losses of the router.

    With memory=tokens a mixture sees a row segment by segment: tokens queue up within the segment,
    and the balancing loss is that of the segment, weighted by its tokens.

    Args:
        experts, router: the parts, built by the subclass.
        expert_dropout: share of the hidden channels of a visit that are dropped in training.
        balance: weight of the load-balancing loss.
        z: weight of the router's z-loss.
        layer, seed: what expert dropout is drawn from, besides the step and the token's address.

    Raises:
        ValueError: a weight below 0, or a share outside [0, 1).
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
                    f"{name}={value}: the weight of a loss must be 0 or more; use 0 to leave it out"
                )
        if not 0 <= expert_dropout < 1:
            raise ValueError(
                f"expert_dropout={expert_dropout}: a share of channels must be 0 or more and below"
                " 1; use 0 for no dropout"
            )
        self.router = router
        self.experts = experts
        self.dispatch = ExpertDispatch()
        self.tally = SegmentSum()
        self.balance = balance
        self.z = z
        self.count = router.out_features
        self.chance = CounterRNG(seed, "expert dropout", layer) if expert_dropout else None
        self.auxiliary_sums: AuxiliaryOutputs = AuxiliaryOutputs()

    def on_step_end(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """Returns the routing metrics of the step."""
        return routing_metrics(sums)

    def _mixed(self, x: Tensor, span: Span, choice: Tensor, gate: Tensor, kept: Tensor) -> Tensor:
        """Returns the weighted sum of the chosen experts' outputs, [B, T, W].

        Args:
            x: [B, T, W].
            choice: [B, T, k] int64, the experts of each token.
            gate: [B, T, k], their weights.
            kept: [B, T, k] bool; False where the visit is dropped, which adds 0.
        """
        top = choice.shape[2]
        # A dropped visit gets the number past the last expert, so that sorting puts it at the end,
        # where the counts leave it out.
        expert = torch.where(kept, choice, self.count).flatten()
        order = expert.argsort(stable=True)
        counts = expert.new_zeros(self.count + 1)
        counts = counts.scatter_add(0, expert, torch.ones_like(expert))[:-1]

        keys = None
        if self.training and self.chance is not None:
            visit_number = torch.arange(top, device=x.device)
            keys = (address(span)[..., None] * top + visit_number).flatten()[order]

        visitors = x.flatten(0, 1)[order // top]
        outputs = self.dispatch.exchange(visitors, counts, self._visit, keys)
        outputs = outputs[order.argsort()].view(*choice.shape, x.shape[-1])
        weights = torch.where(kept, gate, 0)[..., None]
        return (outputs.to(gate.dtype) * weights).sum(2).to(x.dtype)

    def _visit(self, tokens: Tensor, counts: Tensor, keys: Tensor | None) -> Tensor:
        """Applies the experts at hand to their tokens, sorted by expert."""
        keep = None
        if keys is not None and self.chance is not None:
            keep = self.chance(keys, self.experts.hidden) >= self.experts.dropout
        return self.experts(tokens, counts, keep)

    def _leave(
        self, logits: Tensor, probs: Tensor, marks: Tensor, kept: Tensor, span: Span
    ) -> None:
        """Adds the losses and statistics of this forward pass to `auxiliary_sums`.

        Args:
            logits, probs: [B, T, E].
            marks: [B, T, E], 1 where the token chose the expert.
            kept: [B, T, k] bool, whether a choice was honoured.
            span: addresses of the tokens.
        """
        if not self.training:
            return
        if not torch.is_grad_enabled():
            # The first pass over a row in pieces: the loss of each needs the choices of all.
            if self.balance and span.past is not None and span.past.carries_gradient:
                self.tally.total(marks, span)
            return
        by_segment = not span.role.is_meta and bool((span.host().role == READ).any())
        if by_segment:
            # A row that has ended passes through with memory tokens alone; it must not count.
            span = _with_text(span)
            valid = span.valid()[..., None]
            marks = marks * valid
            kept = kept & valid
        self.auxiliary_sums.add(statistics=routing_statistics(probs, marks, kept, span))
        if self.balance:
            self._add_balance(probs, marks, span, by_segment)
        if self.z:
            loss = z_loss(logits, span)
            self.auxiliary_sums.add(
                tokens={"router_z": self.z * loss.sum()}, statistics={"z": _sum(loss)}
            )

    def _add_balance(self, probs: Tensor, marks: Tensor, span: Span, by_segment: bool) -> None:
        """Adds the load-balancing loss: of each row, or of each segment weighted by its tokens."""
        tokens = self.tally.count(span)
        loss = balance_loss(probs, marks, tokens, span, self.tally)
        # Every token carries its share of a row, so that the sum over ranks counts rows once.
        row_shares = torch.where(span.valid(), 1 / tokens.clamp_min(1).double(), 0)
        if by_segment:
            self.auxiliary_sums.add(tokens={"balance": self.balance * (loss * tokens).sum()})
        else:
            self.auxiliary_sums.add(rows={"balance": self.balance * loss.sum()})
        self.auxiliary_sums.add(statistics={"balance": _sum(loss), "rows": _sum(row_shares)})


def _sum(losses: Tensor) -> Tensor:
    return losses.detach().double().sum()[None]


def _with_text(span: Span) -> Span:
    """Returns the addresses with rows that hold memory tokens only turned into padding."""
    text = span.valid() & (span.role != READ) & (span.role != WRITE)
    empty = ~text.any(1, keepdim=True)
    return span.with_doc(span.doc.masked_fill(empty, PADDING))

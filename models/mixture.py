"""Mixtures of experts as feed-forward layers: what all share, and the one whose tokens visit several experts, none dropped.

Letters: B rows, T tokens, W width, E experts, k experts of a token, N = B T k visits.
"""

from dataclasses import replace

import torch
from torch import Tensor, nn

from models.auxiliary import Aside
from models.chance import Chance, address
from models.experts import Experts
from models.feedforward import SwiGLU
from models.init import Rule, Usual
from models.mixing.dispatch import Dispatch
from models.mixing.tally import Tally
from models.ranges import Few, Many, Some
from models.router import Router, balance_loss, figures, marked, ranked, told, z_loss
from models.span import PADDING, READ, WRITE, Span


class Mixture(nn.Module):
    """What all mixtures share: experts, the way there and back, and what is left for the trainer (models/auxiliary.py).

    Under memory=tokens a mixture sees a row segment by segment: tokens queue up within the segment, and the balancing loss is
    that of the segment, weighed by its tokens.
    """

    def __init__(
        self, experts: Experts, router: Router, *, expert_dropout: float, balance: float, z: float, layer: int, seed: int
    ):
        super().__init__()
        for name, value in (("balance", balance), ("z", z)):
            if value < 0:
                raise ValueError(f"{name}={value} would reward what it should punish; choose 0 to leave it out, or more")
        if not 0 <= expert_dropout < 1:
            raise ValueError(f"expert_dropout={expert_dropout} is no share of channels; choose one from 0 to below 1")
        self.router, self.experts = router, experts
        self.dispatch, self.tally = Dispatch(), Tally()
        self.balance, self.z, self.count = balance, z, router.out_features
        self.chance = Chance(seed, "expert dropout", layer) if expert_dropout else None
        self.aside = Aside()

    def settle(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """See models/auxiliary.py."""
        return figures(sums)

    def _mixed(self, x: Tensor, at: Span, choice: Tensor, gate: Tensor, kept: Tensor) -> Tensor:
        """[B, T, W]: what the chosen experts make of each token, by weight; 0 for those that it may not visit.

        Args:
            choice: [B, T, k] int64. gate: [B, T, k] weights. kept: [B, T, k] bool.
        """
        rows, tokens, k = choice.shape
        expert = torch.where(kept, choice, self.count).flatten()  # [N]; who stays at home comes last
        order = expert.argsort(stable=True)
        counts = expert.new_zeros(self.count + 1).scatter_add(0, expert, torch.ones_like(expert))[:-1]
        keys = None
        if self.training and self.chance is not None:
            keys = (address(at)[..., None] * k + torch.arange(k, device=x.device)).flatten()[order]
        made = self.dispatch.exchange(x.flatten(0, 1)[order // k], counts, self._visit, keys)
        made = made[order.argsort()].view(rows, tokens, k, x.shape[-1])
        return (made.to(gate.dtype) * torch.where(kept, gate, 0)[..., None]).sum(2).to(x.dtype)

    def _visit(self, tokens: Tensor, counts: Tensor, keys: Tensor | None) -> Tensor:
        keep = None
        if keys is not None and self.chance is not None:
            keep = self.chance(keys, self.experts.hidden) >= self.experts.dropout
        return self.experts(tokens, counts, keep)

    def _leave(self, logits: Tensor, probs: Tensor, marks: Tensor, kept: Tensor, at: Span) -> None:
        """Leave the losses and the sums of this forward pass."""
        if not (self.training and torch.is_grad_enabled()):
            return
        segment = not at.role.is_meta and bool((at.role == READ).any())
        if segment:  # of rows that have none at this turn, memory tokens alone pass through, and come to nothing
            at = _with_text(at)
            marks, kept = marks * at.valid()[..., None], kept & at.valid()[..., None]
        self.aside.add(statistics=told(probs, marks, kept, at))
        if self.balance:
            tokens = self.tally.total(at.valid().long(), at)
            loss = balance_loss(probs, marks, tokens, at, self.tally)
            rows = torch.where(at.valid(), 1 / tokens.clamp_min(1).double(), 0)  # a row's tokens make up one between them
            if segment:
                self.aside.add(tokens={"balance": self.balance * (loss * tokens).sum()})
            else:
                self.aside.add(rows={"balance": self.balance * loss.sum()})
            self.aside.add(statistics={"balance": _sum(loss), "rows": _sum(rows)})
        if self.z:
            loss = z_loss(logits, at)
            self.aside.add(tokens={"router_z": self.z * loss.sum()}, statistics={"z": _sum(loss)})


def _sum(losses: Tensor) -> Tensor:
    return losses.detach().double().sum()[None]


def _with_text(at: Span) -> Span:
    """The addresses, rows without any token but memory tokens being padding."""
    text = at.valid() & (at.role != READ) & (at.role != WRITE)
    return replace(at, doc=at.doc.masked_fill(~text.any(1, keepdim=True), PADDING), plans={})


class TopKMixture(Mixture):
    """Each token visits its `top` best experts, however many come, and all tokens the shared ones.

    Args:
        width, ffn, experts, jitter, router_scale, expert_dropout, balance, z, activation: as Switch has them.
        top: experts that a token visits.
        shared: experts that every token visits beside those (DeepSeekMoE); they are one wider layer.
        hidden: hidden width of each expert; ffn / (top + shared) by default, so a token costs what the dense layer costs.
        score: softmax, weights are the softmax over the chosen logits (Mixtral); sigmoid, they are the chosen sigmoids in
            units of their sum (DeepSeek-V3).
        scaling: factor of the weights.
        bias_speed: after every step, an expert that fewer chose than the mean gains so much in the choice (not in its
            weight), and one that more chose loses as much: balance without a loss (arXiv:2408.15664). 0: no such bias.

    Raises:
        ValueError: a setting that is no number of its kind; see each message.

    Source: Jiang et al. 2024 (arXiv:2401.04088) and DeepSeek-AI 2024 (arXiv:2412.19437). Ours counts the bias's load over all
    ranks and micro-batches of a step.
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
        judge(experts, top, hidden)
        if score not in ("softmax", "sigmoid"):
            raise ValueError(f"score={score} is none that a router has; choose softmax or sigmoid")
        if shared < 0 or bias_speed < 0:
            raise ValueError(f"shared={shared} and bias_speed={bias_speed} must be 0 or more")
        hidden = hidden or max(1, ffn // (top + shared))
        stacks = Experts(experts, width, hidden, activation=activation, dropout=expert_dropout, layers=layers, visited=top)
        router = Router(width, experts, jitter=jitter, scale=router_scale, layer=layer, seed=seed)
        super().__init__(stacks, router, expert_dropout=expert_dropout, balance=balance, z=z, layer=layer, seed=seed)
        self.top, self.score, self.scaling, self.bias_speed, self.layers = top, score, scaling, bias_speed, layers
        self.shared = SwiGLU(width, shared * hidden) if shared else None
        self.register_buffer("bias", torch.zeros(experts) if bias_speed else None)

    def initial(self) -> dict[str, Rule]:
        """The shared experts' `down` starts as that of the others."""
        return {"shared.down.weight": Usual((2 * self.layers) ** -0.5)} if self.shared is not None else {}

    def reset_buffers(self) -> None:
        """No expert is favoured before step 1; for a model that was built on the meta device."""
        if self.bias is not None:
            self.bias = torch.zeros_like(self.bias)

    def settle(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """See models/auxiliary.py; the bias moves here, by the choices of all ranks."""
        if self.bias is not None:
            load = sums["load"].to(self.bias.device)
            self.bias += self.bias_speed * (load.mean() - load).sign().to(self.bias.dtype)
        return figures(sums)

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        x = torch.where(span.valid()[..., None], x, 0)
        logits = self.router(x, span)
        scores = logits.softmax(-1) if self.score == "softmax" else logits.sigmoid()
        choice = ranked(logits if self.bias is None else scores + self.bias, self.top)
        if self.score == "softmax":
            gate, probs = logits.gather(-1, choice).softmax(-1), scores
        else:
            gate, probs = scores.gather(-1, choice), scores / scores.sum(-1, keepdim=True)
            gate = gate / gate.sum(-1, keepdim=True)
        kept = span.valid()[..., None].expand_as(choice)
        self._leave(logits, probs, marked(choice, span, self.count), kept, span)
        out = self._mixed(x, span, choice, self.scaling * gate, kept)
        return out if self.shared is None else out + self.shared(x, span)


def judge(experts: int, top: int, hidden: int | None) -> None:
    """Raises ValueError where a layer cannot have such experts."""
    if experts < 1 or not 1 <= top <= experts:
        raise ValueError(f"a token visits {top} of {experts} experts; there must be at least as many, and both 1 or more")
    if hidden is not None and hidden < 1:
        raise ValueError(f"hidden={hidden} is no width of an expert; choose 1 or more, or null for what costs as much as dense")

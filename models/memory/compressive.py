"""Infini-attention: beside local attention, every head reads a memory of fixed size in which all
earlier segments lie.

    memory_t = phi(q_t) M / phi(q_t) z    phi(x) = elu(x) + 1
    M += phi(k) (v - [delta: phi(k) M / phi(k) z]),  z += phi(k)
    out = g memory + (1 - g) local      g = sigmoid(gate), one for each head

M and z are those before the segment of t; they grow by all tokens of a segment when it ends. Where
z is 0, the output is local attention alone.

Letters: B rows, T tokens, H query heads, G key heads (they divide H), D head width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention.full import Attention
from models.init import Rule, constant
from models.layer import Layer
from models.memory.base import Memory
from models.memory.local_attention import WAY_OUT, attention_beside, check_segment, within_segment
from models.primitives.compressive import CompressiveScan
from models.primitives.softmax import Softmax
from models.ranges import Piece
from models.span import Span

RULES = "linear", "delta"


class Compressive(Memory):
    """A memory of D x (D + 1) numbers for every key head, whatever the length of the document.

    Args:
        length: 0; the size of this memory does not depend on a number of tokens.
        rule: linear adds a segment's values to what is there; delta first takes away what the
            memory already answers, so that a key that comes again is overwritten and not averaged.
        segment: tokens of a document in a segment, counted from its first token: local attention
            sees its segment only, and outputs do not depend on where rows are cut. null: a row is
            one segment, and a document reads what the rows before it left; without rows before,
            that is nothing.

    Source: Munkhdalai et al. 2024 (arXiv:2404.07143). Queries and keys of the memory have no
    positions, as there; ours knows documents, shares a memory among the query heads that share
    keys, and works out all segments of a row at once.
    """

    def __init__(self, length: int = 0, *, rule: str = "linear", segment: Piece | None = None):
        if length:
            raise ValueError(
                f"memory.length={length}, but memory=compressive has the same size whatever was"
                " read; use memory.length=0, or memory=lookup or segments"
            )
        if rule not in RULES:
            raise ValueError(f"unknown memory.rule={rule}; choose one of {', '.join(RULES)}")
        check_segment(segment)
        self.rule = rule
        self.segment = segment

    def around(self, mixer: nn.Module, **sizes: Any) -> nn.Module:
        """The mixer, with this memory beside its heads; its parameters keep their names. One
        without a softmax stays as it is.

        Raises:
            ValueError: the mixer is none whose heads have queries, keys and values of their own, or
                it looks ahead.
        """
        if not any(isinstance(leaf, Softmax) for leaf in mixer.modules()):
            return mixer
        attention = attention_beside(mixer, "compressive", sizes.get("position"))
        within_segment(attention, self.segment)
        attention.beside = CompressiveMemory(
            attention.q.out_features // attention.head_width, self.rule, self.segment
        )
        return attention

    def validate_mixers(self, mixers: Sequence[nn.Module]) -> None:
        """See Memory."""
        if not any(
            isinstance(mixer, Attention) and isinstance(mixer.beside, CompressiveMemory)
            for mixer in mixers
        ):
            raise ValueError(
                "memory=compressive stands beside the heads of attention, and no layer has any;"
                f" {WAY_OUT}"
            )


class CompressiveMemory(Layer):
    """The memory of one layer; owns its gates.

    Args:
        heads: H.
        rule, segment: as Compressive has them.
    """

    def __init__(self, heads: int, rule: str, segment: int | None):
        super().__init__()
        self.gate = nn.Parameter(torch.zeros(heads))
        self.mix = CompressiveScan(segment)
        self.lse = CompressiveScan(segment) if rule == "delta" else None

    def init_rules(self) -> dict[str, Rule]:
        """Half of what comes out is recalled at first."""
        return {"gate": constant(0.0)}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, local: Tensor, span: Span) -> Tensor:
        """[B, T, H, D]: q and local [B, T, H, D], k and v [B, T, G, D], without positions."""
        wide = torch.promote_types(q.dtype, torch.float32)
        q = F.elu(q.to(wide)) + 1
        k = F.elu(k.to(wide)) + 1
        v = v.to(wide)
        one = torch.ones_like(v[..., :1])
        if self.lse is None:
            found, lse = self.mix((q,), (k, torch.cat([v, one], -1)), span=span).split(
                [v.shape[-1], 1], -1
            )
        else:
            lse, of_keys = self._masses(q, k, one, span)
            weight = torch.where(of_keys > 0, 1 / torch.where(of_keys > 0, of_keys, 1), 0)
            found = self.mix((q,), (k, v, weight), span=span)
        there = lse > 0
        gate = self.gate.to(wide).sigmoid()[:, None]
        recalled = found / torch.where(there, lse, 1)
        return torch.where(there, gate * recalled + (1 - gate) * local.to(wide), local.to(wide)).to(
            local.dtype
        )

    def _masses(self, q: Tensor, k: Tensor, one: Tensor, span: Span) -> tuple[Tensor, Tensor]:
        """phi z of queries [B, T, H, 1] and of keys [B, T, G]; a key asks as one more query of its
        memory."""
        assert self.lse is not None
        groups = k.shape[2]
        asked = torch.cat([q.unflatten(2, (groups, -1)), k[:, :, :, None]], 3)
        lse = self.lse((asked.flatten(2, 3),), (k, one), span=span).unflatten(2, (groups, -1))
        return lse[:, :, :, :-1].flatten(2, 3), lse[:, :, :, -1, 0]

"""Memorizing Transformer: beside local attention, some layers look up the best matching keys among
all that they kept.

    memory_t = softmax(scale q_t k) v over the `count` best of the store
    out = g memory + (1 - g) local    g = sigmoid(gate), one for each head

q and k have length 1 and no positions. Where the store is empty, the output is local attention
alone.

Letters: B rows, T tokens, S stored tokens, H query heads, G key heads (they divide H), D head
width.
"""

from collections.abc import Sequence
from math import ceil, log2
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.attention.full import Attention
from models.carried_state import StatefulModule
from models.init import Rule, constant
from models.kernels.knn import KeyValueStore
from models.masks.basic import SameDocument
from models.masks.segments import PreviousTokens
from models.memory.base import Memory
from models.memory.local_attention import attention_beside, check_segment, within_segment
from models.primitives.knn import KNN
from models.primitives.softmax import Softmax
from models.ranges import Few, Piece
from models.span import Span

DEVICES = None, "cpu"


class Memorizing(Memory):
    """A store of past keys and values, searched exactly; nothing is learned through it but by the
    queries.

    Args:
        length: tokens before a segment that it may find.
        layers: numbers of the layers with a store, from 0; null: one, three quarters of the way up.
        segment: tokens of a document in a segment, counted from its first token: all layers' local
            attention sees its segment only, the store holds what came before it, and outputs do not
            depend on where rows are cut. null: a row is one segment, and the store holds rows
            before it.
        count: entries that each query and head finds.
        device: where what is kept lies between rows; null: with the model, cpu: in host memory,
            from which it is searched block by block.

    Source: Wu et al. 2022 (arXiv:2203.08913): two softmaxes and a gate, not a joint one; keys as
    they were when they were kept. Queries and keys have length 1 and a learned scale for each head
    (Henry et al. 2020, arXiv:2010.04245) that starts at log2(length^2 - length). Ours searches
    exactly, and knows documents.
    """

    def __init__(
        self,
        length: int,
        *,
        layers: Sequence[int] | None = None,
        segment: Piece | None = None,
        count: Few = 32,
        device: str | None = None,
    ):
        if length < 1:
            raise ValueError(
                f"memory.length={length} leaves memory=lookup nothing to find; use 1 or more, or"
                " memory=none"
            )
        if count < 1:
            raise ValueError(
                f"memory.count={count} entries cannot be found; use 1 or more, 32 is usual"
            )
        if device not in DEVICES:
            raise ValueError(f"unknown memory.device={device}; use null (with the model) or cpu")
        check_segment(segment)
        self.length = length
        self.segment = segment
        self.count = count
        self.device = device
        self.layers = None if layers is None else tuple(layers)

    def chosen(self, layers: int) -> tuple[int, ...]:
        """Numbers of the layers with a store."""
        if self.layers is None:
            return (max(0, ceil(0.75 * layers) - 1),)
        if not self.layers or not all(0 <= layer < layers for layer in self.layers):
            raise ValueError(
                f"memory.layers={list(self.layers)} names no layers of this model, which has 0 to"
                f" {layers - 1}; name some of them, or use null"
            )
        return self.layers

    def around(self, mixer: nn.Module, **sizes: Any) -> nn.Module:
        """The mixer, with a store beside its heads where its layer has one; its parameters keep
        their names.

        Args:
            sizes: layer and layers are read, and position.

        Raises:
            ValueError: no such layers, or a mixer whose heads have no queries, keys and values of
                their own, or one that looks ahead. A layer without a store may be of any kind that
                has no softmax, or else of the attention family.
        """
        stored = sizes["layer"] in self.chosen(sizes["layers"])
        if not stored and (
            self.segment is None or not any(isinstance(leaf, Softmax) for leaf in mixer.modules())
        ):
            return mixer
        attention = attention_beside(mixer, "lookup", sizes.get("position"))
        within_segment(attention, self.segment)
        if stored:
            attention.beside = ExternalMemory(self, heads_of(attention))
        return attention


def heads_of(attention: Attention) -> int:
    """H."""
    return attention.q.out_features // attention.head_width


class ExternalMemory(StatefulModule):
    """The store of one layer; owns its gates and scales.

    Args:
        memory: what it was set to.
        heads: H.
    """

    def __init__(self, memory: Memorizing, heads: int):
        super().__init__()
        self.segment = memory.segment
        self.device = memory.device
        self.kept = (
            memory.length + (memory.segment or 1) - 1
        )  # a row may begin anywhere in a segment
        self.start = log2(max(2, memory.length**2 - memory.length))
        self.gate = nn.Parameter(torch.zeros(heads))
        self.scale = nn.Parameter(torch.full((heads,), self.start))
        before = (
            SameDocument()
            if self.segment is None
            else SameDocument() & PreviousTokens(self.segment, memory.length)
        )
        self.mix = KNN(before, memory.count)

    def init_rules(self) -> dict[str, Rule]:
        """Scales start where a query can tell one key from all the others."""
        return {"gate": constant(0.0), "scale": constant(self.start)}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, local: Tensor, span: Span) -> Tensor:
        """[B, T, H, D]: q and local [B, T, H, D], k and v [B, T, G, D], without positions; keeps k
        and v for the next rows."""
        wide = torch.promote_types(q.dtype, torch.float32)
        q = F.normalize(q.to(wide), dim=-1)
        key = F.normalize(k.detach().to(wide), dim=-1).to(v.dtype)
        value = v.detach()
        stores = [KeyValueStore(key, value, span)] if self.segment is not None else []
        # Where tokens continue their row, the search itself holds what came before in it.
        found = None
        if span.past is not None:
            both = torch.cat([key, value], -1)
            found = span.past.earlier_rows(
                self.place,
                both if self.device is None else both.to(self.device),
                self.kept,
                every_piece=True,
            )
        if found is not None:
            kept, kv_span = found
            stores.append(
                KeyValueStore(kept[..., : key.shape[-1]], kept[..., key.shape[-1] :], kv_span)
            )
        found, there = self.mix((q,), stores, (self.scale,), span=span)
        gate = self.gate.to(wide).sigmoid()[:, None]
        mixed = gate * found.to(wide) + (1 - gate) * local.to(wide)
        return torch.where(there[..., None], mixed, local.to(wide)).to(local.dtype)

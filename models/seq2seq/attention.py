"""Scores of a decoder's state with the tokens of a source: additive, dot, general, concat, local.

Letters: B rows, S tokens of the source, W width, A width of an additive score.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from models.init import Rule, constant
from models.layer import Layer
from models.primitives.memory_read import MemoryRead
from models.seq2seq.cells import scaled

AttentionKind = Literal[
    "none",
    "bahdanau",
    "luong_dot",
    "luong_general",
    "luong_concat",
    "local_m",
    "local_p",
]


class EncodedSource(NamedTuple):
    """A source, as every step of the decoder reads it.

    Attributes:
        keys: [B, S, A or W].
        values: [B, S, W].
        doc: [B, S] documents of its tokens.
        pos: [B, S] their positions.
    """

    keys: Tensor
    values: Tensor
    doc: Tensor
    pos: Tensor


class Query(NamedTuple):
    """The question of a step, and its address.

    Attributes:
        hidden: [B, W] the decoder's state.
        doc: [B] document of the token.
        pos: [B] its position.
        length: [B] tokens of the source of its document.
    """

    hidden: Tensor
    doc: Tensor
    pos: Tensor
    length: Tensor


class StepAttention(Layer):
    """Attends to the source of a token's document, for one token of every row.

    Args:
        width: W, of states, keys and values.
        kind: bahdanau (v tanh(W s + U h)), luong_dot (s h), luong_general (s W h), luong_concat
            (v tanh(W [s; h])), local_m (luong_general in a window around the same position),
            local_p (luong_general in a window around a predicted one, times a Gaussian).
        window: D; a local attention sees 2 D + 1 tokens.
        sigma: deviation of the Gaussian in tokens; None: D / 2.

    The weights of local_p are not normalised again after the Gaussian, and its centre learns
    through the Gaussian alone, as in the paper. Source: Bahdanau et al. 2014 (arXiv:1409.0473);
    Luong et al. 2015 (arXiv:1508.04025). There the length that a predicted centre is scaled by
    counts from 1; here positions count from 0 and the centre is S sigmoid(...), as they write it.
    """

    def __init__(self, width: int, kind: AttentionKind, *, window: int, sigma: float | None):
        super().__init__()
        self.kind = kind
        self.window = window
        self.sigma = window / 2 if sigma is None else sigma
        self.read = MemoryRead()
        additive = kind in ("bahdanau", "luong_concat")
        general = kind in ("luong_general", "local_m", "local_p")
        self.query = nn.Linear(width, width, bias=False) if additive else nn.Identity()
        self.key = nn.Linear(width, width, bias=False) if additive or general else nn.Identity()
        self.score = nn.Linear(width, 1, bias=False) if additive else None
        self.centre = nn.Linear(width, width, bias=False) if kind == "local_p" else None
        self.centre_score = nn.Linear(width, 1, bias=False) if kind == "local_p" else None

    def init_rules(self) -> dict[str, Rule]:
        """Gains near 1; the vector of an additive score starts at 0, as in Bahdanau et al."""
        rules: dict[str, Rule] = {}
        for name, _ in self.named_parameters():
            rules[name] = constant(0.0) if name == "score.weight" else scaled
        return rules

    def keys(self, values: Tensor) -> Tensor:
        """[B, S, W] -> [B, S, A or W]: what is computed of the source once."""
        return self.key(values)

    def forward(self, query: Query, memory: EncodedSource) -> Tensor:
        """Returns the context [B, W]."""
        wide = memory.values.dtype
        seen = (memory.doc == query.doc[:, None]) & (memory.doc >= 0)
        factor = None
        if self.kind in ("local_m", "local_p"):
            centre = query.pos.to(wide) if self.kind == "local_m" else self._centre(query)
            offset = memory.pos.to(wide) - centre[:, None]
            seen = seen & (offset.abs() <= self.window)
            if self.kind == "local_p":
                factor = (-offset.square() / (2 * self.sigma**2)).exp()
        return self.read(
            self.scores(query.hidden, memory.keys).to(wide), memory.values, seen, factor
        )

    def scores(self, hidden: Tensor, keys: Tensor) -> Tensor:
        """[B, S]: logits of each token of the source, before anything is hidden."""
        if self.score is None:
            return torch.einsum("bw,bsw->bs", hidden, keys.to(hidden.dtype))
        narrow = self.score.weight.dtype
        asked = self.query(hidden.to(narrow))[:, None]
        return self.score(torch.tanh(asked + keys.to(narrow)))[..., 0]

    def _centre(self, query: Query) -> Tensor:
        """[B]: S sigmoid(v tanh(W s))."""
        assert self.centre is not None and self.centre_score is not None
        narrow = self.centre.weight.dtype
        bent = torch.tanh(self.centre(query.hidden.to(narrow)))
        share = torch.sigmoid(self.centre_score(bent)[:, 0]).to(query.hidden.dtype)
        return query.length.to(query.hidden.dtype) * share

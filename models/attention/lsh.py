"""LSH attention (Reformer): a query sees the earlier keys that fall into its own hash bucket."""

import hashlib
from functools import lru_cache

import torch
from torch import Tensor, nn

from models.attention.full import CAUSAL
from models.positions.base import Position, require_rotary
from models.primitives.block_topk import BlockTopK, find, take
from models.primitives.softmax import Softmax
from models.ranges import Few, Many
from models.scores import Score, Tensors, grouped_dot_products
from models.span import Span

ALONE = -1e4  # added to the logit of a token for itself: it counts only where nothing else is seen


class BucketScore(Score):
    """Shows a query those keys that share its bucket in a round and lie in its own chunk of it or
    in the one before.

    query (q [B, T, H, D], buckets, chunks), payload (k [B, S, H, D], v [B, S, H, E], buckets,
    chunks), where buckets and chunks are whole numbers [B, T or S, H, rounds], kept as
    floating-point numbers because everything that travels is.

    The union over rounds is one softmax: what rounds merged by their mass give once a key that
    several rounds share is counted once, as the paper's equation for z(i, P) asks.
    """

    query_heads = (2, 2, 2)
    payload_heads = (2, 2, 2, 2)
    plain = False

    def logits(
        self,
        query: Tensors,
        payload: Tensors,
        params: Tensors,
        span: Span,
        kv_span: Span,
        heads: Tensor,
    ) -> Tensor:
        """[B, H, T, S]; keys are unit vectors and the dot product is not scaled further."""
        q, q_bucket, q_chunk = query
        k, _, k_bucket, k_chunk = payload
        logits = grouped_dot_products(q, k)
        seen = torch.zeros_like(logits, dtype=torch.bool)
        for one in range(q_bucket.shape[-1]):
            here = [x[..., one].transpose(1, 2) for x in (q_bucket, k_bucket, q_chunk, k_chunk)]
            back = here[2][..., :, None] - here[3][..., None, :]
            seen |= (here[0][..., :, None] == here[1][..., None, :]) & ((back == 0) | (back == 1))
        itself = (span.pos[:, :, None] == kv_span.pos[:, None, :]) & (
            span.doc[:, :, None] == kv_span.doc[:, None, :]
        )
        return torch.where(seen, logits + ALONE * itself[:, None], -torch.inf)


class LSHAttention(nn.Module):
    """Causal attention within a document, queries and keys shared, restricted to equal hashes.

    Args:
        width, heads: as in Attention; every head has keys and values of its own.
        position: must turn queries and keys, or do nothing; hashes are taken before it turns.
        layer, seed: what the random rotations of the hashes are drawn from.
        context_length: tokens in a row, from which `buckets` is worked out.
        chunk_size: tokens in a chunk of a bucket; a query sees its own chunk of its bucket and the
            one before.
        hashes: independent hashes; a key is seen if any round shows it.
        buckets: even number of them; null = 2 x context_length / size.

    Costs: what is visible is about rounds x 2 x size keys a query, but it is found by a masked tile
    over all earlier tokens of the document, so time still grows as in full attention.

    Source: Kitaev et al. 2020 (arXiv:2001.04451). Ours differs where theirs depends on what comes
    later: they sort a whole sequence by bucket and cut the sorted sequence into chunks, so that a
    later token can push an earlier key out of sight. Ours numbers the tokens of a bucket as they
    come and cuts that into chunks: causal, and no chunk spans two buckets or documents. Reversible
    residuals are no matter of a mixer.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        position: Position,
        layer: int,
        seed: int,
        context_length: int,
        *,
        chunk_size: int = 64,
        hashes: Few = 2,
        buckets: Many | None = None,
    ):
        super().__init__()
        if width % heads:
            raise ValueError(
                f"model.width={width} does not divide among model.heads={heads}; choose a multiple"
                f" of {heads}"
            )
        if chunk_size < 1 or hashes < 1:
            raise ValueError(
                f"chunk_size={chunk_size} is a number of tokens and hashes={hashes} of hashes; both"
                " must be 1 or more"
            )
        self.head_width = width // heads
        self.position = require_rotary(position, "lsh", heads, self.head_width)
        self.buckets = max(2, context_length // chunk_size * 2) if buckets is None else buckets
        if self.buckets < 2 or self.buckets % 2:
            raise ValueError(
                f"buckets={buckets}: a hash tells directions from their opposites; choose an even"
                " number, 2 or more"
            )
        self.chunk_size = chunk_size
        self.drawn = (seed, layer, hashes, heads, self.head_width, self.buckets // 2)
        self.qk = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.ids = BlockTopK()
        self.mix = Softmax(CAUSAL, BucketScore())

    def forward(self, x: Tensor, span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        q, v = (project(x).unflatten(-1, (-1, self.head_width)) for project in (self.qk, self.v))
        bucket = self.hashed(q)
        chunk = self.places(bucket, span) // self.chunk_size
        exact = torch.promote_types(x.dtype, torch.float32)  # whole numbers up to 2^24
        places = bucket.to(exact), chunk.to(exact)
        k = self.position.rotate(nn.functional.normalize(q, dim=-1, eps=1e-12), span)
        return self.out(
            self.mix((self.position.rotate(q, span), *places), (k, v, *places), span=span).flatten(
                -2
            )
        )

    def hashed(self, q: Tensor) -> Tensor:
        """[B, T, H, rounds] int64: the direction, among random ones and their opposites, that a
        query points to most."""
        with torch.no_grad():
            along = torch.einsum(
                "bthd,rhdn->bthrn", q.double(), rotations(*self.drawn).to(q.device)
            )
            return torch.cat([along, -along], -1).argmax(-1)

    def places(self, bucket: Tensor, span: Span) -> Tensor:
        """[B, T, H, rounds] int64: how many earlier tokens of its document are in a token's
        bucket."""
        (every,), among = self.ids.bring((bucket.int(),), CAUSAL, span=span, kv_span=span)
        order = torch.where(
            among.valid()[..., None, None], every + among.doc[..., None, None] * self.buckets, -1
        )
        group, index = order.sort(dim=1, stable=True)
        number = (
            torch.arange(group.shape[1], device=group.device).view(1, -1, 1, 1).expand_as(group)
        )
        opens = torch.ones_like(group, dtype=torch.bool)
        opens[:, 1:] = group[:, 1:] != group[:, :-1]
        start = torch.where(opens, number, 0).cummax(1).values
        place = torch.empty_like(group).scatter_(1, index, number - start)
        return take(place, find(span, among)[0])


@lru_cache(maxsize=256)
def rotations(
    seed: int, layer: int, rounds: int, heads: int, width: int, directions: int
) -> Tensor:
    """[rounds, heads, width, directions] float64, normal: a pure function of what is given."""
    digest = hashlib.blake2b(f"{seed}/hash rotations/{layer}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    with torch.device("cpu"):
        return torch.randn(
            rounds, heads, width, directions, generator=generator, dtype=torch.float64
        )

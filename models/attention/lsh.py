"""LSH attention (Reformer): a query sees the earlier keys that fall into its own hash bucket.

Letters: B rows, T queries, S keys, H heads, D head width, E value width.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from models.as_written import as_written
from models.attention.full import CAUSAL
from models.kernels.pairs import readings
from models.kernels.pairs.bucket_pairs import BucketPairs
from models.layer import Layer
from models.masks.algebra import Mask
from models.positions.base import Position, require_rotary
from models.primitives.block_topk import BlockTopK, find, take
from models.primitives.softmax import Softmax
from models.ranges import Few, Many
from models.scores import PairBlocks, Score, Tensors, grouped_dot_products
from models.span import Span, to_device

ALONE = -1e4  # added to the logit of a token for itself: it counts only where it sees nothing else


class BucketScore(Score):
    """Shows a query the keys that share its bucket, in its own chunk or the chunk before.

    query (q [B, T, H, D], buckets, chunks), payload (k [B, S, H, D], v [B, S, H, E], buckets,
    chunks), where buckets and chunks are whole numbers [B, T or S, H, hashes], stored as
    floating-point numbers because everything that travels to other ranks is.

    The union over hashes is one softmax. Merging one softmax per hash by its lse would count a key
    several times that several hashes share; the paper's equation for z(i, P) counts it once.

    Args:
        count: what counts pairs, see Score.pair_counter.
    """

    query_heads = (2, 2, 2)
    payload_heads = (2, 2, 2, 2)
    plain = False

    def __init__(self, count: "BucketCount"):
        super().__init__(scale=1.0)  # keys are unit vectors
        self.count = count

    def pair_counter(self) -> "BucketCount":
        """See Score.pair_counter."""
        return self.count

    def pairs(
        self,
        mask: Mask,
        query: Tensors,
        payload: Tensors,
        span: Span,
        kv_span: Span,
        *,
        heads: Tensor,
        most: int,
    ) -> Iterator[PairBlocks] | None:
        """See Score.pairs: tokens of equal buckets, found by sorting."""
        if mask != CAUSAL:
            return None
        pairs = BucketPairs(
            query[1:], payload[2:], span, kv_span, alone=ALONE, most=most, dtype=query[1].dtype
        )
        return pairs.blocks()

    def logits(
        self,
        query: Tensors,
        payload: Tensors,
        params: Tensors,
        span: Span,
        kv_span: Span,
        heads: Tensor,
    ) -> Tensor:
        """[B, H, T, S]; keys are unit vectors, so the dot product is not scaled further."""
        q, query_buckets, query_chunks = query
        k, _, key_buckets, key_chunks = payload
        logits = grouped_dot_products(q, k)
        seen = torch.zeros_like(logits, dtype=torch.bool)
        # a loop, not one more axis: [B, H, T, S, hashes] would be the largest tensor of the layer
        for index in range(query_buckets.shape[-1]):
            same_bucket = _query_column(query_buckets, index) == _key_row(key_buckets, index)
            chunks_back = _query_column(query_chunks, index) - _key_row(key_chunks, index)
            seen |= same_bucket & ((chunks_back == 0) | (chunks_back == 1))
        same_position = span.pos[:, :, None] == kv_span.pos[:, None, :]
        same_document = span.doc[:, :, None] == kv_span.doc[:, None, :]
        itself = (same_position & same_document)[:, None]
        return torch.where(seen, logits + ALONE * itself, -torch.inf)


@dataclass(frozen=True)
class BucketCount:
    """Counts the pairs that are expected of hashes that spread tokens evenly, without hashing."""

    hashes: int
    buckets: int
    chunk_size: int

    def __call__(self, span: Span) -> int:
        """Over all tokens of the rows; padding counts for nothing."""
        earlier = span.pos[span.valid()].double()
        sharing = 1 - (1 - 1 / self.buckets) ** self.hashes
        # of a bucket of many chunks: half of the own chunk, and the one before
        most = self.hashes * 1.5 * self.chunk_size
        return int((1 + (earlier * sharing).clamp(max=most)).sum())


def _query_column(numbers: Tensor, index: int) -> Tensor:
    """The numbers of one hash as a column for queries, [B, T, H, hashes] -> [B, H, T, 1]."""
    return numbers[..., index].transpose(1, 2)[..., :, None]


def _key_row(numbers: Tensor, index: int) -> Tensor:
    """The numbers of one hash as a row for keys, [B, S, H, hashes] -> [B, H, 1, S]."""
    return numbers[..., index].transpose(1, 2)[..., None, :]


class LSHAttention(Layer):
    """Causal attention within a document, with shared queries and keys, among equal hashes.

    Args:
        width, heads: as in Attention; every head has keys and values of its own.
        position: must rotate queries and keys, or do nothing; hashes are taken before it rotates.
        layer, seed: determine the random rotations of the hashes.
        context_length: tokens in a row; the default of `buckets` depends on it.
        chunk_size: tokens in a chunk of a bucket; a query sees its own chunk of its bucket and the
            one before.
        hashes: independent hashes; a key is seen if any of them shows it.
        buckets: an even number; null = 2 x context_length / chunk_size.

    At most hashes x 2 x chunk_size keys are visible to a query, and only these are computed: time
    grows with the tokens, and with log(tokens) where they are sorted by bucket.

    Source: Kitaev et al. 2020 (arXiv:2001.04451). They sort a whole sequence by bucket and cut the
    sorted sequence into chunks, so that a later token can push an earlier key out of sight. Ours
    numbers the tokens of a bucket as they come and cuts those numbers into chunks: causal, and no
    chunk spans two buckets or documents. Reversible residuals are not part of this mixer.
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
                f"chunk_size={chunk_size}, hashes={hashes}: numbers of tokens and of hashes; both"
                " must be 1 or more"
            )
        self.head_width = width // heads
        self.position = require_rotary(position, "lsh", heads, self.head_width)
        if buckets is None:
            buckets = max(2, context_length // chunk_size * 2)
        if buckets < 2 or buckets % 2:
            raise ValueError(
                f"buckets={buckets}: every random direction and its opposite is a bucket; choose"
                " an even number, 2 or more"
            )
        self.buckets = buckets
        self.chunk_size = chunk_size
        self.rotation_key = (seed, layer, hashes, heads, self.head_width, buckets // 2)
        self.qk = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.ids = BlockTopK()
        self.mix = Softmax(CAUSAL, BucketScore(BucketCount(hashes, buckets, chunk_size)))

    def carries_over(self) -> str | None:
        """See Layer."""
        return (
            "lsh numbers the tokens of a bucket from the start of the document, of which"
            " a later row no longer has all"
        )

    def forward(self, hidden: Tensor, span: Span) -> Tensor:
        """[B, T, width] -> [B, T, width]."""
        query = self.qk(hidden).unflatten(-1, (-1, self.head_width))
        value = self.v(hidden).unflatten(-1, (-1, self.head_width))
        buckets = self.hashed(query)
        chunks = self.places(buckets, span) // self.chunk_size
        # float32 holds whole numbers up to 2^24 exactly; bfloat16 would merge buckets
        exact = torch.promote_types(hidden.dtype, torch.float32)
        buckets = buckets.to(exact)
        chunks = chunks.to(exact)
        unit_key = nn.functional.normalize(query, dim=-1, eps=1e-12)
        key = self.position.rotate(unit_key, span)
        query = self.position.rotate(query, span)
        output = self.mix(
            (query, buckets, chunks),
            (key, value, buckets, chunks),
            span=span,
        )
        return self.out(output.flatten(-2))

    @as_written
    def hashed(self, query: Tensor) -> Tensor:
        """Hashes queries, [B, T, H, D] -> [B, T, H, hashes] int64.

        A hash is the number of the random direction, or its opposite, nearest to the query.
        """
        with torch.no_grad():
            drawn = to_device(rotations(*self.rotation_key), query.device)
            hashes, heads, width, count = drawn.shape
            directions = drawn.permute(1, 2, 0, 3).reshape(heads, width, hashes * count)
            # float64: a hash must not depend on the dtype or on how many ranks compute it
            # some tokens at a time: the products are as many as tokens x buckets
            most = readings.scores_together(query.device)
            together = max(1, most // (query.shape[0] * directions.shape[0] * directions.shape[2]))
            parts = query.split(together, 1)
            return torch.cat([_nearest(part.double(), directions, hashes) for part in parts], 1)

    def places(self, buckets: Tensor, span: Span) -> Tensor:
        """Counts earlier tokens of the document in a token's bucket, [B, T, H, hashes] int64."""
        (all_buckets,), all_span = self.ids.bring((buckets.int(),), CAUSAL, span=span, kv_span=span)
        # one number for each pair of document and bucket, and one for padding
        document_buckets = all_buckets + all_span.doc[..., None, None] * self.buckets
        document_buckets = torch.where(all_span.valid()[..., None, None], document_buckets, -1)
        # A stable sort lays the tokens of a group side by side in their order: a token's place is
        # its index less that of the group's first token.
        groups, token_index = document_buckets.sort(dim=1, stable=True)
        sorted_index = torch.arange(groups.shape[1], device=groups.device)
        sorted_index = sorted_index.view(1, -1, 1, 1).expand_as(groups)
        opens_group = torch.ones_like(groups, dtype=torch.bool)
        opens_group[:, 1:] = groups[:, 1:] != groups[:, :-1]
        group_start = torch.where(opens_group, sorted_index, 0).cummax(1).values
        places = torch.empty_like(groups).scatter_(1, token_index, sorted_index - group_start)
        own_index, _ = find(span, all_span)
        return take(places, own_index)


def _nearest(query: Tensor, directions: Tensor, hashes: int) -> Tensor:
    """Numbers the nearest directions and, from n on, their opposites, [B, t, H, D] -> [B, t, H,
    hashes].

    Args:
        directions: [H, D, hashes n].
    """
    lines = query.permute(2, 0, 1, 3).flatten(1, 2)
    products = (lines @ directions).unflatten(-1, (hashes, -1))
    high, nearest = products.max(-1)
    low, farthest = products.min(-1)
    # of equal distances the first counts, as if the sizes were compared
    is_opposite = (-low > high) | ((-low == high) & (farthest < nearest))
    hashed = torch.where(is_opposite, farthest + products.shape[-1], nearest)
    return hashed.unflatten(1, query.shape[:2]).permute(1, 2, 0, 3)


@lru_cache(maxsize=256)
@torch.inference_mode(False)  # what is kept may serve in training, whoever asks first
def rotations(
    seed: int, layer: int, hashes: int, heads: int, width: int, directions: int
) -> Tensor:
    """[hashes, heads, width, directions] float64, normal; a pure function of its arguments."""
    digest = hashlib.blake2b(f"{seed}/hash rotations/{layer}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    # a model may be built under the meta device, where nothing can be drawn
    with torch.device("cpu"):
        return torch.randn(
            hashes, heads, width, directions, generator=generator, dtype=torch.float64
        )

"""A model of two streams on one device against the same model over ranks: losses, all gradients."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.architectures.encoder_decoder import EncoderDecoder
from models.architectures.seq2seq import Seq2Seq
from models.attention.bidirectional import Bidirectional
from models.attention.full import Attention
from models.feedforward import FeedForward, SwiGLU
from models.loss import IGNORE
from models.micro_batch import MicroBatch
from models.positions.learned import Learned
from models.positions.rope import Rope
from models.positions.t5 import T5
from models.span import Span
from parallel.context_parallel import apply_context_parallel
from parallel.layout import layout
from parallel.sharding import shard_span
from tests.support.parity import packed, relative
from trainer.data.batch_sharding import BatchSharder
from trainer.decoding.two_streams import documents

VOCABULARY = 13
TARGETS = [[6, 9, 1, 4], [3, 12]]  # documents of the rows
SOURCES = [[7, 2, 5], [13, 4]]  # the last document of row 0 has no source
SHORT = [[1, 1], [1]]  # fewer source tokens than there are ranks
TOKENS = 22
SOURCE_TOKENS = 19


WIDTH = 16
HEADS = 4
RECURRENT_WIDTH = 8


def transformer(
    position: str = "rope", norm_place: Any = "before", kv_heads: int = 2, **more: Any
) -> nn.Module:
    """Returns a small encoder-decoder Transformer, two layers on both sides."""
    here, there = {
        "rope": (Rope(), Rope()),
        "t5": (T5(8, 16), T5(8, 16, bidirectional=True)),
        "learned": (Learned(32), Learned(32)),
    }[position]
    feedforward = FeedForward if norm_place == "after" else SwiGLU
    return EncoderDecoder(
        VOCABULARY,
        WIDTH,
        HEADS,
        kv_heads,
        [Attention(WIDTH, HEADS, kv_heads, here) for _ in range(2)],
        [feedforward(WIDTH, 24) for _ in range(2)],
        [Bidirectional(WIDTH, HEADS, kv_heads, there) for _ in range(2)],
        [feedforward(WIDTH, 24) for _ in range(2)],
        position=here,
        encoder_position=there,
        norm="rms" if norm_place == "before" else "layer",
        norm_place=norm_place,
        **more,
    )


def recurrent(kind: Any, cell: Any = "gru", layers: int = 1, **more: Any) -> nn.Module:
    """Returns a small recurrent encoder-decoder."""
    return Seq2Seq(VOCABULARY, RECURRENT_WIDTH, layers, attention=kind, cell=cell, window=3, **more)


def batch_of(
    targets: list[list[int]] = TARGETS,
    sources: list[list[int]] = SOURCES,
    tokens: int = TOKENS,
    source_tokens: int = SOURCE_TOKENS,
) -> MicroBatch:
    """Returns rows of documents of these lengths with sources of those lengths, and targets."""
    generator = torch.Generator().manual_seed(5)
    span = packed(targets, tokens)
    source_span = packed(sources, source_tokens)

    def drawn(addresses: Span) -> torch.Tensor:
        return torch.randint(VOCABULARY, addresses.shape, generator=generator)

    aims = torch.where(span.valid() & (drawn(span) > 1), drawn(span), IGNORE)
    return MicroBatch(drawn(span), span, aims, MicroBatch(drawn(source_span), source_span))


def roughened(model: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Draws weights large enough for every part to count."""
    model = model.to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(sum(map(ord, name)))
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            scale = 0.2 if parameter.dim() < 2 else parameter.shape[-1] ** -0.5
            centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.copy_(centre + scale * drawn)
    return model


def shard(batch: MicroBatch, env: Any, policy: str) -> MicroBatch:
    """Returns this rank's tokens of a batch and of its source, each by a layout of its own."""
    here, there = (
        shard_span(span, [layout(policy, span.shape[1], env.size)], env.rank)
        for span in (batch.span, batch.source.span)
    )
    source = MicroBatch(there.sharding.shard(batch.source.tokens, 0), there)
    tokens = here.sharding.shard(batch.tokens, 0)
    return MicroBatch(tokens, here, here.sharding.shard(batch.targets, IGNORE), source)


def difference(env: Any, make: Any, method: str, policy: str, batch: MicroBatch) -> float:
    """Returns the worst relative difference of losses, logits and gradients on this rank."""
    one = roughened(make())
    many = roughened(make())
    apply_context_parallel(many, env.group, method)
    expected = one(batch)
    expected.sum().backward()
    own = shard(batch, env, policy)
    losses = many(own)
    losses.sum().backward()
    sharding = own.span.sharding
    worst = [relative(losses.detach(), sharding.shard(expected.detach(), 0))]
    with torch.no_grad():
        logits = one(batch.without_targets())
        valid = own.span.valid()[..., None]
        found = many(own.without_targets()) * valid
        worst.append(relative(found, sharding.shard(logits, 0) * valid))
    expected_gradients = [parameter.grad for parameter in one.parameters()]
    largest = max(float(gradient.abs().max()) for gradient in expected_gradients)
    moved = 0
    for wanted, parameter in zip(expected_gradients, many.parameters(), strict=True):
        dist.all_reduce(parameter.grad, group=env.group)
        # What is 0 but for rounding has no digits to compare, as of a source of one token.
        if wanted.abs().max() > 1e-13 * largest:
            worst.append(relative(parameter.grad, wanted))
            moved += 1
        else:
            worst.append(float(parameter.grad.abs().max()) / largest)
    # A gradient of nothing would agree with anything.
    assert moved > len(expected_gradients) / 2, "most parameters have a gradient"
    return max(worst)


class FromScratch:
    """Rates next tokens by a pass over all tokens, on one device or with rows shared over ranks.

    Args:
        model: in evaluation mode.
        share: cuts rows for this rank.
        sources: tokens of each source.
        beams: hypotheses of each.
    """

    def __init__(self, model: nn.Module, share: BatchSharder, sources: list[list[int]], beams: int):
        self.model = model
        self.share = share
        self.said: list[list[int]] = [[] for _ in range(len(sources) * beams)]
        self.source = documents([list(tokens) for tokens in sources for _ in range(beams)])

    def __call__(self, last: Tensor, rows: Tensor) -> Tensor:
        """See NextTokens."""
        parents = rows.tolist() if self.said[0] else range(len(self.said))
        tokens = last.tolist()
        self.said = [[*self.said[p], token] for p, token in zip(parents, tokens, strict=True)]
        batch = documents(self.said)._replace(source=self.source)
        piece = self.share.piece(batch).without_targets()
        logits = self.model(piece).double()
        # One rank has the last token of a row, wherever the layout put it; others add zeros.
        is_last = piece.span.valid() & (piece.span.pos == len(self.said[0]) - 1)
        total = torch.where(is_last[..., None], logits, 0.0).sum(1)
        if self.share.mesh.context.group is not None:
            dist.all_reduce(total, group=self.share.mesh.context.group)
        return total.log_softmax(-1)

"""The Set Transformer: elements of a set in, one answer for the set out.

Letters: B rows, T tokens, D sets of a row, k seeds, N = D k, W width.
"""

from torch import Tensor, nn

from models.init import Rule, normal
from models.layer import Layer
from models.loss import token_losses
from models.micro_batch import MicroBatch
from models.ranges import Few, Some
from models.sets.blocks import (
    InducedSetAttentionBlock,
    LogitScale,
    PoolingByMultiheadAttention,
    SeedAttentionBlock,
    SetAttentionBlock,
)


class SetTransformer(Layer):
    """Encoder of SAB or ISAB blocks, PMA, blocks over its seeds, and an output head.

    A document is a set, its tokens are the elements, and every token of it gives the logits of the
    set's answer: the data says at which of them the answer is asked for. The order of a set makes
    no difference.

        Z = ISAB(... ISAB(embed(x)))     answer = head(relu(W [SAB(... PMA_k(Z))] + b))

    Args:
        vocabulary: number of different elements and answers.
        width: of all vectors.
        layers: blocks of the encoder.
        heads: of every attention; they divide width.
        points: inducing points of each block of the encoder (ISAB, linear in the elements); null:
            every element reads every other (SAB).
        seeds: k, vectors that a set is pooled into; [...] lays them end to end.
        decoder_layers: blocks over the seeds; of a single seed they would read nothing new.
        norm: whether blocks have layer norms.
        logit_scale: head: logits of attention are divided by the root of a head's width, as
            usual; width: of all channels, as equation 2 of the paper and its code have it.

    Over ranks, each ISAB and the pooling are one merged partial result of the size of the points.
    Source: Lee et al. 2019 (arXiv:1810.00825).
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        layers: int,
        heads: int,
        *,
        points: Few | None = 16,
        seeds: Few = 4,
        decoder_layers: Some = 1,
        norm: bool = True,
        logit_scale: LogitScale = "head",
    ):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        blocks: list[nn.Module] = []
        for _ in range(layers):
            if points is None:
                blocks.append(SetAttentionBlock(width, heads, norm=norm, logit_scale=logit_scale))
            else:
                blocks.append(
                    InducedSetAttentionBlock(
                        width, heads, points, norm=norm, logit_scale=logit_scale
                    )
                )
        self.blocks = nn.ModuleList(blocks)
        self.pool = PoolingByMultiheadAttention(
            width, heads, seeds, norm=norm, logit_scale=logit_scale
        )
        self.seed_blocks = nn.ModuleList(
            SeedAttentionBlock(width, heads, norm=norm, logit_scale=logit_scale)
            for _ in range(decoder_layers)
        )
        self.readout = nn.Linear(seeds * width, width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def init_rules(self) -> dict[str, Rule]:
        """Starts elements at unit variance, as points and seeds."""
        return {
            "embed.weight": normal(1.0),
            "readout.weight": normal(self.readout.in_features**-0.5),
        }

    def forward(self, batch: MicroBatch | Tensor) -> Tensor:
        """[B, T] int64 -> logits [B, T, vocabulary] of each token's set, or with targets the losses
        [B, T] in nats (0 where IGNORE)."""
        tokens, span, targets, _ = MicroBatch.of(batch)
        hidden = self.embed(tokens)
        for block in self.blocks:
            hidden = block(hidden, span)
        seeds, points = self.pool(hidden, span)
        for block in self.seed_blocks:
            seeds = block(seeds, points)
        sets = self.readout(seeds.unflatten(1, (-1, points.count)).flatten(2)).relu()
        # [B, D, W] -> [B, T, W]: every rank has all sets, and gives its own tokens theirs.
        answer = sets.gather(1, points.document[..., None].expand(-1, -1, sets.shape[2]))
        if targets is None:
            return self.head(answer)
        return token_losses(answer, self.head.weight, targets)

"""Deep Sets: elements of a set in, one answer for the set out, through a sum and nothing else.

Letters: B rows, T tokens, W width.
"""

from typing import Literal

from torch import Tensor, nn

from models.init import Rule, normal
from models.layer import Layer
from models.loss import token_losses
from models.masks.algebra import FAR
from models.micro_batch import MicroBatch
from models.primitives.segment_sum import SegmentSum

Pooling = Literal["sum", "mean"]


class DeepSets(Layer):
    """answer = head(rho(sum over the set of phi(embed(x)))).

    A document is a set, its tokens are the elements, and every token of it gives the logits of the
    set's answer: the data says at which of them the answer is asked for.

    Args:
        vocabulary: number of different elements and answers.
        width: of all vectors.
        layers: of phi, and as many of rho; each relu(W h + b).
        pooling: sum, or mean.

    Over ranks the sum is one exchange, whatever the number of elements.
    Source: Zaheer et al. 2017 (arXiv:1703.06114), theorem 2.
    """

    def __init__(self, vocabulary: int, width: int, layers: int, *, pooling: Pooling = "sum"):
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.phi = _perceptron(width, layers)
        self.rho = _perceptron(width, layers)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.sum = SegmentSum()
        self.mean = pooling == "mean"

    def init_rules(self) -> dict[str, Rule]:
        """Keeps the size of vectors from layer to layer (He et al. 2015, arXiv:1502.01852)."""
        deviation = (2 / self.head.in_features) ** 0.5
        rules = {"embed.weight": normal(1.0)}
        for name, parameter in self.named_parameters():
            if name.startswith(("phi.", "rho.")) and parameter.dim() == 2:
                rules[name] = normal(deviation)
        return rules

    def causal_from(self) -> int:
        """See Layer: a sum over a set holds elements that come later."""
        return FAR

    def forward(self, batch: MicroBatch | Tensor) -> Tensor:
        """[B, T] int64 -> logits [B, T, vocabulary] of each token's set, or with targets the losses
        [B, T] in nats (0 where IGNORE)."""
        tokens, span, targets, _ = MicroBatch.of(batch)
        total = self.sum.total(self.phi(self.embed(tokens)), span, "document")
        if self.mean:
            total = total / self.sum.count(span, "document").clamp_min(1)[..., None]
        answer = self.rho(total)
        if targets is None:
            return self.head(answer)
        return token_losses(answer, self.head.weight, targets)


def _perceptron(width: int, layers: int) -> nn.Sequential:
    parts: list[nn.Module] = []
    for _ in range(layers):
        parts += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*parts)

"""The key-value memory network: a question looks for keys that are like it, and what it finds are
their values."""

import torch
from torch import Tensor, nn

from models.attention.full import CAUSAL
from models.layer import Layer
from models.loss import token_losses
from models.masks.roles import GlobalKey
from models.micro_batch import MicroBatch
from models.primitives.causal_conv import CausalConv
from models.primitives.softmax import Softmax
from models.ranges import Few
from models.scores import Score
from models.span import Span


class KeyValue(Layer):
    """Facts lie in the row, `fact` tokens each; the last token of a fact is its value, the others
    together are its key.

    A question is the beginning of a fact: at each token the words of the `fact - 1` tokens up to it
    are added up, as are those of a key, and what the slots before it give is what follows. Slots
    are the last tokens of facts, counted from the start of
    the document: positions `fact`, 2 `fact`, ...; position 0 opens the document and is a slot
    without a key.

        q_1 = sum of A(words)    o = sum over slots of softmax(q_h . key) value
        q_{h+1} = R_h (q_h + o)

    Args:
        vocabulary: token numbers are below it.
        width: of the embeddings.
        hops: reads, each after the first with what the one before found.
        fact: tokens of a fact. 1: every token is a slot, and its key is the token before it.
        shared: one vector for each slot, the sum of all its words, is both its key and its value:
            what key-value memory does away with.

    The reads are Softmax leaves over slots that lie in the row, so slots are shared among ranks as
    keys are.
    Source: Miller et al. 2016 (arXiv:1606.03126): bags of words, dot products without a scale, a
    matrix after each hop. There facts lie beside the question, and answers are scored by embeddings
    of their own, as here by the head.
    """

    def __init__(
        self, vocabulary: int, width: int, *, hops: Few = 2, fact: Few = 3, shared: bool = False
    ):
        super().__init__()
        if hops < 1:
            raise ValueError(f"hops={hops} is how many times the memory is read; use 1 or more")
        if fact < 1:
            raise ValueError(
                f"fact={fact} is how many tokens a fact has, its value the last of them; use 1 or"
                " more"
            )
        self.fact = fact
        self.shared = shared
        self.embed = nn.Embedding(vocabulary, width)
        self.value = None if shared else nn.Embedding(vocabulary, width)
        self.hops = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(hops))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.bag = CausalConv()
        self.before = CausalConv()
        self.read = Softmax(CAUSAL & GlobalKey(0, fact), Score(1.0))

    def init_rules(self) -> dict:
        """Dot products of sums of embeddings decide from the first step on what is read."""

        def unit(shape: torch.Size, generator: torch.Generator) -> Tensor:
            return torch.randn(shape, generator=generator) * shape[-1] ** -0.5

        return dict.fromkeys((name for name, _ in self.named_parameters()), unit)

    def forward(self, batch: MicroBatch | Tensor) -> Tensor:
        """[B, T] int64 -> logits [B, T, vocabulary], or with targets the losses [B, T] in nats (0
        where IGNORE)."""
        tokens, span, targets, _ = MicroBatch.of(batch)
        words = self.embed(tokens)
        question = self._bag(self.bag, words, span, 0, max(1, self.fact - 1))
        if self.value is None:
            key = value = self._bag(self.before, words, span, 0, max(2, self.fact))
        else:
            key = self._bag(self.before, words, span, 1, max(1, self.fact - 1))
            value = self.value(tokens)
        q = question
        slots = key[:, :, None], value[:, :, None]
        for turn in self.hops:
            found = self.read((q[:, :, None],), slots, span=span)[:, :, 0]
            q = turn(q + found)
        return self.head(q) if targets is None else token_losses(q, self.head.weight, targets)

    def _bag(self, window: nn.Module, words: Tensor, span: Span, first: int, count: int) -> Tensor:
        """[B, T, width]: the sum of `count` tokens of the document, the nearest one `first` tokens
        back."""
        taps = words.new_zeros(first + count, words.shape[-1])
        taps[first:] = 1
        return window((words,), (taps,), span=span)

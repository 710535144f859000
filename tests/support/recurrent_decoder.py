"""A small decoder around recurrent memory, and the lanes that tests read through it."""

from functools import lru_cache

import torch

from models.architectures.decoder import Decoder
from models.attention.full import Attention
from models.carried_state import name_stateful_modules
from models.feedforward import SwiGLU
from models.init import initialise
from models.loss import IGNORE
from models.memory.tokens import MemoryTokens
from models.positions.rope import Rope
from models.span import Span
from tests.support.parity import packed
from tests.variants import HEADS, VARIANTS, WIDTH

VOCABULARY = 17


def decoder(mixer="full", layers=2, dtype=torch.float64, positions=Rope, **settings):
    """Weights large enough that memory matters."""
    memory = MemoryTokens(**{"length": 3, **settings})
    made = [
        VARIANTS[mixer]() if mixer != "full" else Attention(WIDTH, HEADS, 3, positions())
        for _ in range(layers)
    ]
    mixers = [memory.around(each, context_length=51) for each in made]
    model = Decoder(
        VOCABULARY, WIDTH, mixers, [SwiGLU(WIDTH, 20) for _ in range(layers)], memory=memory
    )
    name_stateful_modules(model)
    model = initialise(model, seed=1).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in ("embed.weight", "memory.memory") or name.endswith(
                (".out.weight", ".down.weight")
            ):
                parameter.mul_(10)
    return model


@lru_cache(maxsize=4)
def lanes(tokens=51, steps=3):
    """Rows of two lanes, step after step: [(tokens, span, targets)], documents that end, begin and
    go on, one of one token."""
    lengths = [
        [20, 1, 60, 7, 30, 25],
        [70, 13, 1, 1, 50],
    ]  # 143 and 135 of the 153 tokens of a lane; the rest is padding
    whole, generator = packed(lengths, tokens * steps), torch.Generator().manual_seed(4)
    line = torch.randint(VOCABULARY, (2, tokens * steps), generator=generator)
    same = torch.zeros_like(line, dtype=torch.bool)
    same[:, :-1] = (whole.doc[:, 1:] == whole.doc[:, :-1]) & (whole.doc[:, 1:] >= 0)
    targets = torch.where(same, line.roll(-1, 1), IGNORE)
    found = []
    for step in range(steps):
        here = slice(step * tokens, (step + 1) * tokens)
        doc = whole.doc[:, here]  # numbers begin anew in every row
        first = torch.where(doc >= 0, doc, 99).amin(1, keepdim=True)
        span = Span.of(whole.pos[:, here], torch.where(doc >= 0, doc - first, -1))
        found.append((line[:, here], span, targets[:, here]))
    return found

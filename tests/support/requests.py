"""Rows of requests in several modalities, and a model that reads them, over ranks too."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from models.architectures.multimodal import Multimodal
from models.attention.full import Attention
from models.feedforward import SwiGLU
from models.init import initialise
from models.loss import IGNORE
from models.micro_batch import MicroBatch
from models.multimodal.columns import ASKED, FIRST_VALUE, PART, REFERENCE, SHOWN, WORD
from models.multimodal.image_attention import ImageAttention
from models.positions.rope import Rope
from models.recurrent.delta import GatedDeltaNet
from models.span import IMAGE, SOUND, TEXT, Span
from parallel.context_parallel import apply_context_parallel
from parallel.layout import layouts
from parallel.sharding import shard_span
from tests.support.parity import packed, relative

VOCABULARY = 11
WIDTH = 16
HEADS = 4
PATCH = 2
FRAME = 5
TOKENS = 31
# Modality and tokens of each document; requests begin with a text. The first of row 1 has none.
DOCUMENTS = [
    [(TEXT, 3), (IMAGE, 9), (SOUND, 5), (TEXT, 4), (IMAGE, 6)],
    [(IMAGE, 5), (TEXT, 13), (SOUND, 3)],
]
SHORT = [[(TEXT, 2), (IMAGE, 2)], [(TEXT, 1)]]  # a few tokens, which leave ranks with none
MIXERS = {
    "full": lambda: Attention(WIDTH, HEADS, 2, Rope()),
    "images": lambda: ImageAttention(WIDTH, HEADS, 2, Rope()),
    "gated_delta": lambda: GatedDeltaNet(WIDTH, HEADS),
}


def built(mixer: str = "full", **settings: Any) -> Multimodal:
    """Returns a model of two layers in float64."""
    model = Multimodal(
        VOCABULARY,
        WIDTH,
        [MIXERS[mixer]() for _ in range(2)],
        [SwiGLU(WIDTH, 24) for _ in range(2)],
        tie_embeddings=True,
        init_std=WIDTH**-0.5,
        patch=PATCH,
        frame=FRAME,
        **settings,
    )
    initialise(model, seed=3)
    return model.double()


def batch_of(documents: list[list[tuple[int, int]]], tokens: int = TOKENS) -> MicroBatch:
    """Returns rows of these documents; every second answer is not given."""
    span = packed([[length for _, length in row] for row in documents], tokens)
    generator = torch.Generator().manual_seed(1)
    columns = torch.zeros(*span.shape, FIRST_VALUE + max(PATCH**2, FRAME), dtype=torch.long)
    role = torch.zeros_like(span.pos)
    targets = torch.full_like(span.pos, IGNORE)
    for row, kinds in enumerate(documents):
        start = 0
        for number, (modality, length) in enumerate(kinds):
            last = start + length - 1
            columns[row, start : last + 1, REFERENCE] = int(modality == TEXT)
            columns[row, start + 1 : last, PART] = SHOWN
            columns[row, last, PART] = ASKED
            role[row, start + 1 : last] = modality
            if modality == TEXT or number % 2:
                targets[row, last] = (7 * number + row) % VOCABULARY
            start += length
    words = torch.randint(VOCABULARY, span.shape, generator=generator)
    values = torch.randint(-127, 128, columns[..., FIRST_VALUE:].shape, generator=generator)
    is_value = (role == IMAGE) | (role == SOUND)
    columns[..., WORD] = torch.where(is_value | ~span.valid(), 0, words)
    columns[..., FIRST_VALUE:] = torch.where(is_value[..., None], values, 0)
    return MicroBatch(columns, Span.of(span.pos, span.doc, role), targets)


def over_ranks(
    env: Any,
    documents: list[list[tuple[int, int]]],
    policy: str,
    method: str,
    mixer: str,
    settings: dict[str, Any],
) -> float:
    """Returns the worst relative difference of losses, logged terms and all gradients."""
    tokens, span, targets, _ = batch_of(documents)
    assert targets is not None
    one = built(mixer, **settings)
    many = built(mixer, **settings)
    want = one(MicroBatch(tokens, span, targets))
    want.sum().backward()
    apply_context_parallel(many, env.group, method)
    here = shard_span(span, layouts(policy, span, env.size), env.rank)
    shard = here.sharding.shard
    got = many(MicroBatch(shard(tokens, 0), here, shard(targets, IGNORE)))
    got.sum().backward()
    worst = [relative(got.detach(), shard(want.detach(), 0))]
    noted = one.objective.auxiliary_sums
    own = many.objective.auxiliary_sums
    assert noted is not None and own is not None
    for name, value in noted.statistics.items():
        total = own.statistics[name].clone()
        dist.all_reduce(total, group=env.group)
        worst.append(relative(total, value))
    for expected, parameter in zip(one.parameters(), many.parameters(), strict=True):
        gradient = parameter.grad
        assert gradient is not None and expected.grad is not None
        dist.all_reduce(gradient, group=env.group)
        worst.append(_error(gradient, expected.grad))
    return max(worst)


def _error(gradient: Tensor, expected: Tensor) -> float:
    # A gradient of 0 up to rounding has no relative error.
    return min(relative(gradient, expected), float((gradient - expected).abs().max()))

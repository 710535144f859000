"""A sample from the model in training, on the sharded model: every token is a forward pass over all
before it.

Slow and exact; a cache belongs to models/cache/. All ranks call it and all get the same text.
"""

import hashlib
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.data.batch_sharding import BatchSharder, single_row
from trainer.data.tokenizers import Tokenizer

TEMPERATURE = 0.8


@torch.no_grad()
def generate(
    model: nn.Module,
    share: BatchSharder,
    tokenizer: Tokenizer,
    prompt: str,
    count: int,
    *,
    seed: int,
    step: int,
    stop: Callable[[], bool] | None = None,
) -> str | None:
    """`prompt` and `count` tokens after it; ends early where the model ends its document.

    None when `stop`, which is asked before every token, says so (on all ranks). Each token is drawn
    by a number that is a pure function of (seed, step, place), whatever the ranks.
    """
    tokens = beginning(tokenizer, prompt)
    for place in range(count):
        if stop is not None and stop():
            return None
        logits = _last_logits(model, share, tokens)
        digest = hashlib.blake2b(f"{seed}/sample/{step}/{place}".encode(), digest_size=8).digest()
        draw = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        weights = (logits / TEMPERATURE).softmax(-1)
        token = int(torch.multinomial(weights, 1, generator=draw))
        if token == tokenizer.end_of_text:
            break
        tokens.append(token)
    return tokenizer.decode(tokens)


def beginning(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The tokens that a sample begins with; at least one, for the model needs something to
    follow."""
    return [int(token) for token in tokenizer.encode(prompt)] or [tokenizer.end_of_text]


def _last_logits(model: nn.Module, share: BatchSharder, tokens: list[int]) -> Tensor:
    """[V] float64 on the CPU: what the model says comes after `tokens`; from the rank that holds
    the last one."""
    piece = share.piece(single_row(tokens, share.mesh.device))
    logits = model(piece.tokens, piece.span).to(torch.float64)
    last = piece.span.valid() & (piece.span.pos == len(tokens) - 1)
    found = torch.where(last[..., None], logits, 0.0).sum((0, 1))
    if share.mesh.context.group is not None:
        dist.all_reduce(found, group=share.mesh.context.group)
    return found.cpu()

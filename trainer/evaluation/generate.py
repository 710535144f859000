"""Samples text from the sharded model in training.

Every token is a forward pass over all tokens before it: slow and exact, without a cache. All ranks
call it together and get the same text.
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
    """Continues a prompt until the model ends its document.

    Each token is drawn by a number that is a pure function of (seed, step, index of the token),
    whatever the ranks.

    Args:
        model: in evaluation mode.
        share: cuts the row for this rank.
        tokenizer: of the training data.
        prompt: may be empty.
        count: number of new tokens at most.
        seed: of the run.
        step: of the run.
        stop: collective; called before every token.

    Returns:
        The text with its prompt; None where `stop` returned True, on all ranks.
    """
    tokens = beginning(tokenizer, prompt)
    for index in range(count):
        if stop is not None and stop():
            return None
        logits = _last_logits(model, share, tokens)
        name = f"{seed}/sample/{step}/{index}"
        digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
        # Shifted, because manual_seed takes a signed number.
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        weights = (logits / TEMPERATURE).softmax(-1)
        token = int(torch.multinomial(weights, 1, generator=generator))
        if token == tokenizer.end_of_text:
            break
        tokens.append(token)
    return tokenizer.decode(tokens)


def beginning(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Returns the tokens that a sample begins with, at least one."""
    tokens = [int(token) for token in tokenizer.encode(prompt)]
    # The end of one document is what stands before the next.
    return tokens or [tokenizer.end_of_text]


def _last_logits(model: nn.Module, share: BatchSharder, tokens: list[int]) -> Tensor:
    """Returns the logits of the next token, [V] float64 on the CPU, on every rank."""
    micro_batch = share.piece(single_row(tokens, share.mesh.device))
    span = micro_batch.span
    logits = model(micro_batch.tokens, span).to(torch.float64)
    # One rank has the last token, wherever the layout put it; the others add zeros.
    is_last = span.valid() & (span.pos == len(tokens) - 1)
    last_logits = torch.where(is_last[..., None], logits, 0.0).sum((0, 1))
    if share.mesh.context.group is not None:
        dist.all_reduce(last_logits, group=share.mesh.context.group)
    return last_logits.cpu()

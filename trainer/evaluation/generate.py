"""Samples text from the sharded model in training.

All ranks call it together and get the same text. Where the model continues rows token by token, a
new token costs one token; elsewhere (experts with a capacity, layers that see ahead) it is a pass
over all tokens before it.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.cache.base import KVCacheFactory
from models.cache.decodable import cannot_decode, shortest_piece
from parallel.collectives import Communicator
from trainer.data.batch_sharding import BatchSharder, single_row
from trainer.data.tokenizers import Tokenizer
from trainer.decoding.sampling import Sampling
from trainer.decoding.scheduler import Scheduler, TextRequest

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
    cache: KVCacheFactory | None = None,
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
        cache: what holds keys and values meanwhile; contiguous by default.

    Returns:
        The text with its prompt; None where `stop` returned True, on all ranks.
    """
    request = TextRequest(
        beginning(tokenizer, prompt),
        count,
        Sampling(TEMPERATURE),
        seed=(seed, "sample", step),
        end=tokenizer.end_of_text,
    )
    one_by_one = not cannot_decode(model) and len(request.prompt) >= shortest_piece(model)
    grow = _continued if one_by_one else _from_scratch
    if count and not grow(model, share, request, stop, cache):
        return None
    return tokenizer.decode([*request.prompt, *request.tokens])


def beginning(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Returns the tokens that a sample begins with, at least one."""
    tokens = [int(token) for token in tokenizer.encode(prompt)]
    # The end of one document is what stands before the next.
    return tokens or [tokenizer.end_of_text]


def _continued(
    model: nn.Module,
    share: BatchSharder,
    request: TextRequest,
    stop: Callable[[], bool] | None,
    cache: KVCacheFactory | None,
) -> bool:
    """Completes the request token by token; False where `stop` returned True."""
    group = share.mesh.context.group
    communicator = None if group is None else Communicator(group)
    scheduler = Scheduler(model, cache, rows=1, communicator=communicator)
    scheduler.submit(request)
    while scheduler.busy():
        if stop is not None and stop():
            return False
        scheduler.step()
    return True


def _from_scratch(
    model: nn.Module,
    share: BatchSharder,
    request: TextRequest,
    stop: Callable[[], bool] | None,
    cache: KVCacheFactory | None,
) -> bool:
    """Completes the request by passes over all tokens; False where `stop` returned True."""
    while request.finished is None:
        if stop is not None and stop():
            return False
        logits = _last_logits(model, share, [*request.prompt, *request.tokens])
        request.append(request.take(logits))
    return True


def _last_logits(model: nn.Module, share: BatchSharder, tokens: list[int]) -> Tensor:
    """Returns the logits of the next token, [V] float64 on the CPU, on every rank."""
    micro_batch = share.piece(single_row(tokens, share.mesh.device))
    span = micro_batch.span
    logits = model(micro_batch.without_targets()).to(torch.float64)
    # One rank has the last token, wherever the layout put it; the others add zeros.
    is_last = span.valid() & (span.pos == len(tokens) - 1)
    last_logits = torch.where(is_last[..., None], logits, 0.0).sum((0, 1))
    if share.mesh.context.group is not None:
        dist.all_reduce(last_logits, group=share.mesh.context.group)
    return last_logits.cpu()

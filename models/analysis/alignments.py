"""Alignments: what each step of a recurrence over a row takes from the tokens of the row's source.

Letters: B rows, T tokens of the row, S tokens of its source.
"""

import torch
from torch import Tensor, nn

from models.micro_batch import MicroBatch
from models.primitives.memory_read import MemoryRead


def memory_reads(model: nn.Module) -> dict[str, MemoryRead]:
    """Returns by name every part of a model that reads a memory step by step."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, MemoryRead):
            found[name] = module
    return found


@torch.no_grad()
def alignments(
    model: nn.Module, batch: MicroBatch, places: Tensor | None = None, tokens: int | None = None
) -> Tensor:
    """Returns the weights of each token over the source, [B, T, S], in global order.

    Where ranks share rows every rank has all of them, and all call it together. What a Gaussian
    takes away from a weight is missing from the sum.

    Args:
        model: a recurrent model of two streams that reads its source at one place.
        batch: rows with their source.
        places: [B, tokens at hand] of the source, the place of each in the whole of it; None: all
            tokens are at hand.
        tokens: S; with `places`.

    Raises:
        ValueError: the model has no attention.
    """
    reads = memory_reads(model)
    if not reads:
        raise ValueError(
            "model.attention=none weighs no source; use another one, for example luong_general"
        )
    (read,) = reads.values()
    steps: list[Tensor] = []
    weigh = read.forward

    def note(read: nn.Module, args: tuple[Tensor, ...], context: Tensor) -> None:
        scores, values, *rest = args
        here = torch.arange(values.shape[1]).expand(len(values), -1) if places is None else places
        count = values.shape[1] if tokens is None else tokens
        # The mean of the unit vectors of tokens is their weights.
        units = nn.functional.one_hot(here.to(values.device), count).to(scores.dtype)
        steps.append(weigh(scores, units, *rest))

    handle = read.register_forward_hook(note)
    try:
        model(batch.without_targets())
    finally:
        handle.remove()
    return torch.stack(steps, 1)

"""Measures the bytes that a model keeps of the tokens it has read while decoding."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from models.carried_state import CarriedState
from models.init import initialise
from models.micro_batch import MicroBatch
from models.primitives.softmax import Softmax
from models.span import Span
from trainer.config.build_model import build_model
from trainer.preflight.prepare import load_config
from trainer.preflight.reach import fitting

ROW = 512  # tokens read at once
VOCABULARY = 32


def held_bytes(overrides: Sequence[str], lengths: Sequence[int]) -> list[int]:
    """Bytes held after each of these numbers of tokens of one document, in float32.

    Scans and windows are run, row after row, with a Past, and what it holds is counted: states and
    tails. What a softmax holds
    is counted without running it: the keys and values that its leaf is called with. Lengths rise
    and divide by 512.
    """
    config = load_config(
        fitting([*overrides, f"context_length={ROW}", f"batch_tokens={ROW}", "wandb.mode=disabled"])
    )
    with torch.device("meta"):
        model = build_model(config, VOCABULARY)
    if any(isinstance(leaf, Softmax) for leaf in model.modules()):
        return [_payload_bytes(model, length) for length in lengths]
    model = initialise(model.to_empty(device="cpu"), config.seed)
    past = CarriedState()
    found = []
    generator = torch.Generator().manual_seed(config.seed)
    with torch.no_grad():
        for start in range(0, max(lengths), ROW):
            tokens = torch.randint(0, VOCABULARY, (1, ROW), generator=generator)
            pos = torch.arange(start, start + ROW)[None]
            model(MicroBatch(tokens, past.attach(Span.of(pos, torch.zeros_like(pos)))))
            past.advance()
            if start + ROW in lengths:
                found.append(past.bytes())
    return found


def _payload_bytes(model: nn.Module, tokens: int) -> int:
    """Of all softmax leaves of a model on the meta device, at one row of so many tokens."""
    held: list[int] = []

    def note(query: Any, payload: Any, *_: Any, **__: Any) -> torch.Tensor:
        held.append(sum(x.numel() * x.element_size() for x in payload))
        return query[0].new_empty(*query[0].shape[:-1], payload[-1].shape[-1])

    for leaf in model.modules():
        if isinstance(leaf, Softmax):
            leaf.forward = note
    with torch.device("meta"):
        model(torch.zeros(1, tokens, dtype=torch.long))
    return sum(held)

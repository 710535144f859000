"""The check that a model computes rows in pieces: no token reads what lies in a later piece."""

import torch
from torch import nn

from models.causality import layers_ahead
from models.layer import hook
from models.masks.algebra import Mask
from models.primitive import Primitive
from models.primitives.sequential import sequential_modules
from models.span import PREFIX, Span

PROBE = 8  # tokens of the role PREFIX on which a mask is tried


def cannot_be_cut(model: nn.Module) -> list[str]:
    """Returns one sentence for each layer whose rows cannot be computed piece by piece.

    What is refused: layers that see later tokens, layers that say so by their hook `cut_in_time`,
    and primitives that do not read what came before the tokens at hand.
    """
    sentences = []
    ahead = {layer.path: layer.kind for layer in layers_ahead(model)}
    inside = sequential_modules(model)
    for path, module in model.named_modules():
        owner = path.rpartition(".")[0]
        mask = getattr(module, "mask", None)
        if isinstance(mask, Mask) and owner not in ahead and _shows_prefix(mask):
            ahead[owner] = type(model.get_submodule(owner)).__name__
        reason = hook(module, "cut_in_time")()
        if reason is not None:
            sentences.append(f"{path or 'the model'} ({type(module).__name__}) {reason}")
        if isinstance(module, Primitive) and not module.continues_rows and module not in inside:
            sentences.append(
                f"{path} ({type(module).__name__}) does not read the tokens before those at hand"
                " (Span.past)"
            )
    for path, kind in ahead.items():
        sentences.append(
            f"{path or 'the model'} ({kind}) sees later tokens, which lie in pieces that are not"
            " there yet"
        )
    return sentences


def _shows_prefix(mask: Mask) -> bool:
    """True if tokens of the role PREFIX see later ones, as an objective may have them."""
    line = Span.line(1, PROBE, "cpu").cast(PREFIX)
    seen = mask.dense(line, line, torch.zeros(1, dtype=torch.long, device="cpu"))
    return bool(seen[0].triu(1).any())

"""Causality of a whole model: the layers through which a token learns of tokens that come after it.

It is worked out from the masks and scores of the layers themselves, so that a layer of any name is
judged by what it does. Scans, causal and long convolutions and memories read only what lies before
and have nothing to say here; a layer of any other kind that sees ahead says so by a method
`causal_from`, as a mask has it.
"""

from typing import NamedTuple

from torch import nn

from models.layer import hook
from models.masks.algebra import FAR, Mask
from models.primitives.knn import KNN
from models.scores import Score


class Ahead(NamedTuple):
    """A layer that sees ahead.

    Attributes:
        path: of the layer within the model, for example blocks.0.mixer.
        kind: name of its class.
        causal_from: the position in a document from which on nothing is seen ahead;
            models.masks.algebra.FAR = nowhere.
    """

    path: str
    kind: str
    causal_from: int


def layers_ahead(model: nn.Module) -> list[Ahead]:
    """The layers that show a query later keys of its document; none where the model is causal.

    What a source shows counts for nothing: its tokens are given, whatever their positions."""
    ahead: dict[str, Ahead] = {}
    of_source = source_modules(model)
    for path, module in model.named_modules():
        limit = _causal_from(module)
        if not limit or module in of_source:
            continue
        # A mask belongs to a leaf; what the user chose is the layer that owns the leaf.
        owner = path if getattr(module, "mask", None) is None else path.rpartition(".")[0]
        known = ahead.get(owner)
        if known is None or known.causal_from < limit:
            ahead[owner] = Ahead(owner, type(model.get_submodule(owner)).__name__, limit)
    return list(ahead.values())


def source_modules(model: nn.Module) -> set[nn.Module]:
    """Returns all modules that read the source of a row instead of the row itself."""
    inside: set[nn.Module] = set()
    for module in model.modules():
        for part in hook(module, "source_parts")():
            inside.update(part.modules())
    return inside


def plain_sight(model: nn.Module) -> int:
    """Counts the first tokens of a document that earlier tokens see, as no target may be.

    FAR: all of them."""
    return max((layer.causal_from for layer in layers_ahead(model)), default=0)


def score_mismatches(model: nn.Module) -> list[tuple[str, bool]]:
    """Layers whose score serves another kind of mask than theirs.

    Returns:
        (path of the layer, True = the score has params for later keys that the mask never shows,
        False = the mask shows later keys that the score cannot tell apart), for each such layer.
    """
    mismatches = []
    for path, module in model.named_modules():
        score = getattr(module, "score", None)
        if not isinstance(score, Score) or not isinstance(getattr(module, "mask", None), Mask):
            continue
        owner = path.rpartition(".")[0]
        sees_ahead = module.mask.causal_from() > 0  # type: ignore[union-attr]
        if score.two_sided and not sees_ahead:
            mismatches.append((owner, True))
        if score.one_sided and module.mask.causal_from() == FAR:  # type: ignore[union-attr]
            mismatches.append((owner, False))
    return mismatches


def _causal_from(module: nn.Module) -> int:
    """As `Mask.causal_from`, of one module by itself; 0 where it has no mask and states nothing."""
    # What a kNN memory searches is what earlier rows stored, whatever its mask allows.
    if isinstance(module, KNN):
        return 0
    mask = getattr(module, "mask", None)
    if isinstance(mask, Mask):
        return mask.causal_from()
    return hook(module, "causal_from")()

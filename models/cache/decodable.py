"""The check that a model decodes: what a token reads never depends on tokens that come after it."""

from torch import nn

from models.carried_state import StatefulModule
from models.causality import layers_ahead, source_modules
from models.layer import hook
from models.masks.algebra import FAR
from models.primitive import Primitive
from models.primitives.sequential import SequentialScan, sequential_modules


def cannot_decode(model: nn.Module) -> list[str]:
    """Returns one sentence for each layer that has no exact continuation token by token.

    What is refused: layers that see ahead, layers that say so by their hook `decodes`, and
    primitives that do not read what came before the tokens at hand.
    """
    sentences = []
    for layer in layers_ahead(model):
        if layer.causal_from == FAR:
            sentences.append(
                f"{layer.path or 'the model'} ({layer.kind}) sees later tokens, so outputs"
                " change with each token that comes: it cannot decode; use a causal mixer"
            )
    # What reads the source runs once, with the first piece of a row.
    inside = sequential_modules(model) | source_modules(model)
    for path, module in model.named_modules():
        reason = hook(module, "decodes")()
        if reason is not None:
            sentences.append(f"{path or 'the model'} ({type(module).__name__}): {reason}")
        if isinstance(module, Primitive) and module not in inside:
            sentences += _unread(model, path, module)
    return sentences


def _unread(model: nn.Module, path: str, primitive: Primitive) -> list[str]:
    """Says so where nobody reads what came before the tokens at hand of this primitive."""
    carried = True
    if isinstance(primitive, SequentialScan):
        # Its owner carries the state; over ranks a driver stands between the two.
        names = path.split(".")
        owners = [model.get_submodule(".".join(names[:depth])) for depth in range(len(names))]
        carried = any(isinstance(owner, StatefulModule) for owner in owners)
    if primitive.continues_rows and carried:
        return []
    return [
        f"{path} ({type(primitive).__name__}) does not read the tokens before those at hand"
        " (Span.past), so each token would begin a text of its own; see docs/decoding.md"
    ]


def shortest_piece(model: nn.Module) -> int:
    """Returns the tokens of a document that must come in one piece: those that see one another."""
    return max((layer.causal_from for layer in layers_ahead(model)), default=0)

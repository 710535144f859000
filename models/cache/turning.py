"""Moves cached keys to other positions of their document, where that has a meaning.

Rotary keys are turned by the distance: rotations add up, so a key computed at position p and turned
by n is the key computed at p + n. Keys without positions stay as they are: a score reads their
addresses. A key whose position was added to the embeddings holds it in every channel, and cannot be
moved.

Letters: B rows, S slots, G key heads, D channels.
"""

from collections.abc import Callable

from torch import Tensor, nn

from models.attention.latent import LatentScore
from models.cache.eviction.base import cached_attentions, innermost
from models.positions.rope import Rope
from models.scores import Score, Tensors
from models.span import Span

Turn = Callable[[Tensors, Tensor], Tensors]
"""(payload [B, S, ...], tokens [B, S] to move on by) -> the payload at the new positions."""


def turns(model: nn.Module) -> dict[str, Turn]:
    """Returns how to move the payload of each attention that holds earlier tokens, by its name.

    Raises:
        ValueError: see `cannot_turn`.
    """
    reasons = cannot_turn(model)
    if reasons:
        raise ValueError(reasons[0])
    found = {}
    for place, softmax in cached_attentions(model).items():
        found[place] = _turn_of(_owner(model, place).position, innermost(softmax.score))
    return found


def cannot_turn(model: nn.Module) -> list[str]:
    """Returns one sentence for each reason why cached keys have no meaning at other positions."""
    added = getattr(model, "position", None)
    if isinstance(added, nn.Module):
        return [
            f"{type(added).__name__} adds positions to the embeddings, so cached keys cannot be"
            " turned to other places; use position=rope, or a cache that leaves them in place"
        ]
    sentences = []
    for place, softmax in cached_attentions(model).items():
        owner = _owner(model, place)
        known = type(innermost(softmax.score)) in (Score, LatentScore) or _by_address(softmax.score)
        if not hasattr(owner, "position") or place.rpartition(".")[2] != "mix":
            known = False
        if not known:
            kind = type(owner).__name__
            sentences.append(
                f"{place} ({kind}) holds more than keys and values of single tokens, so they cannot"
                " be turned to other places; use mixer=full, or a cache that leaves them in place"
            )
    return sentences


def _by_address(score: Score) -> bool:
    """Tells whether positions shape the logits alone, and keys hold none."""
    inner = innermost(score)
    return inner.payload_heads == (2, 2) and (inner.biased or bool(inner.param_heads))


def _owner(model: nn.Module, place: str) -> nn.Module:
    return model.get_submodule(place.rpartition(".")[0])


def _turn_of(position: object, score: Score) -> Turn:
    if not isinstance(position, Rope):
        return _stay
    if isinstance(score, LatentScore):
        return lambda payload, by: _turn_latent(position, payload, by)
    return lambda payload, by: [turned(position, payload[0], by), *payload[1:]]


def _stay(payload: Tensors, by: Tensor) -> Tensors:
    return payload


def _turn_latent(position: Rope, payload: Tensors, by: Tensor) -> Tensors:
    latent, key = payload
    return [latent, turned(position, key[:, :, None], by)[:, :, 0]]


def turned(position: Rope, key: Tensor, by: Tensor) -> Tensor:
    """Rotates keys [B, S, G, D] further by [B, S] tokens.

    The rotation of the base class: YaRN's `rotate` also multiplies by its attention factor, which
    the key has got once already.
    """
    return Rope.rotate(position, key, Span.of(by, by))

"""Finds settings of the command line that reach no part of the model, so that none is dropped."""

from collections.abc import Collection, Iterator, Sequence

from omegaconf import OmegaConf

from models.positions.base import Position
from models.positions.none import NoPosition
from trainer.config import build_model, instantiate
from trainer.config.compose import compose
from trainer.config.groups import files
from trainer.config.schema import Config
from trainer.config.values import TARGET
from trainer.errors import UserError

SIZES = (
    "width",
    "layers",
    "heads",
    "kv_heads",
    "ffn",
)  # offered to every part; a config file may offer what nobody takes


def unreached(config: Config, given: Collection[str], vocabulary: int = 1) -> dict[str, str]:
    """Returns the settings that reach no part, each with the sentence that refuses it.

    Args:
        config: a config whose nodes can be built.
        given: keys and groups that were set by hand.
    """
    taken = build_model.sizes_taken(config, vocabulary)
    found = {}
    wished = [key for key in given if key == "position" or key.startswith("position.")]
    if wished and not _placed(config, taken, vocabulary):
        said = (
            f"position={config.position.target}, but nothing in this model takes a"
            f" position{_takers('position')}"
        )
        found["position"] = f"{said}; leave {wished[0]}= out"
    found |= dict(_replaced(config, given))
    if config.match == "none":  # else the sizes are those of the model that this one is to match
        found |= {
            f"model.{key}": (
                f"model.{key}={getattr(config.model, key)} reaches no part of this"
                f" model{_takers(key)}; leave model.{key}= out"
            )
            for key in _idle(config, taken)
            if f"model.{key}" in given
        }
    return found


def fitting(words: Sequence[str]) -> list[str]:
    """Returns the settings of a command line without the sizes that its model does not take.

    For commands that give the same sizes to many models; a user's own words are refused instead,
    see unreached.
    """
    asked = compose(words)
    if asked.config is None or asked.config.match != "none":
        return list(words)
    try:
        idle = {
            f"model.{key}" for key in _idle(asked.config, build_model.sizes_taken(asked.config, 1))
        }
    except UserError:  # said where the same words are checked
        return list(words)
    return [word for word in words if word.lstrip("+").partition("=")[0] not in idle]


def _idle(config: Config, taken: dict[str, dict[str, object]]) -> Iterator[str]:
    """Yields the sizes that no part takes."""
    names = {name for sizes in taken.values() for name in sizes}
    for key in SIZES:
        used = key in names
        if key == "heads":
            used = used or ("kv_heads" in names and config.model.kv_heads is None)
        if key == "layers":
            used = used or build_model.model_takes(config, "mixers")
        if key == "width":
            used = used or ("ffn" in names and not isinstance(config.model.ffn, int))
        if not used:
            yield key


def _placed(config: Config, taken: dict[str, dict[str, object]], vocabulary: int) -> bool:
    """Tells whether the position is used: in a layer, or added to the embeddings.

    position=none counts as used, because it asks for nothing.
    """
    try:
        place = instantiate.instantiate(
            config.position, build_model.offered_sizes(config, vocabulary), "position"
        )
    except UserError:  # said elsewhere
        return True
    if isinstance(place, NoPosition) or any(
        "position" in sizes for part, sizes in taken.items() if part != "model"
    ):
        return True
    if "position" not in taken["model"]:
        return False
    return not isinstance(place, Position) or place.embedding(8) is not None


def _replaced(config: Config, given: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yields settings of layers that another setting replaces, each with its message."""
    wish = config.model
    for pattern, group, chosen, whole in (
        ("pattern", "mixers", config.mixer, "mixer"),
        ("feedforward_pattern", "feedforwards", wish.feedforward, "model.feedforward"),
    ):
        labels = getattr(wish, pattern)
        if chosen is not None and f"model.{pattern}" in given:
            yield (
                f"model.{pattern}",
                (
                    f"model.{pattern}={labels}: {whole} is set and replaces it; leave one of the"
                    " two out"
                ),
            )
        for label in getattr(wish, group):
            where = f"model.{group}.{label}"
            if not any(key == where or key.startswith(f"{where}.") for key in given):
                continue
            if chosen is not None and label not in wish.encoder_pattern:
                yield (
                    where,
                    (
                        f"{where} is set, but {whole} replaces all of model.{group}; leave one of"
                        " the two out"
                    ),
                )
            elif label not in labels and label not in wish.encoder_pattern:
                yield (
                    where,
                    (
                        f"{where} is set, but model.{pattern}={labels} does not name it; name it"
                        " there, or leave it out"
                    ),
                )


def _takers(key: str) -> str:
    """Returns the list of mixers or models of conf/ that take a size, for a message."""
    for group in ("model",) if key in ("width", "layers", "ffn") else ("mixer",):
        takers = []
        for path in files(group):
            node = OmegaConf.to_container(OmegaConf.load(path))
            target = str(
                node[TARGET]
                if isinstance(node, dict) and TARGET in node
                else "models.architectures.decoder.Decoder"
            )
            known = instantiate.parameters(instantiate.find_class(target, group))
            if key in known or {"layers": "mixers", "ffn": "feedforwards"}.get(key) in known:
                takers.append(path.stem)
        if takers:
            return f"; {group}s that take it: {', '.join(takers)}"
    return ""

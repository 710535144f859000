"""Settings that were written on the command line and reach no part of the model: each is refused by name, never dropped."""

from collections.abc import Collection, Iterator

from omegaconf import OmegaConf

from models.positions.none import NoPosition
from models.positions.position import Position
from trainer import build
from trainer.compose import CONF
from trainer.config import Config, Fault
from trainer.values import TARGET

SIZES = ("width", "layers", "heads", "kv_heads", "ffn")  # offered to every part; those that do not take them say nothing


def unreached(config: Config, given: Collection[str], vocabulary: int = 1) -> dict[str, str]:
    """By setting the sentence that refuses it.

    Args:
        config: whose nodes can be built.
        given: keys and groups that were set by hand.
    """
    taken, found = build.sizes_taken(config, vocabulary), {}
    wished = [key for key in given if key == "position" or key.startswith("position.")]
    if wished and not _placed(config, taken, vocabulary):
        said = f"position={config.position.target}, but nothing in this model takes a position{_takers('position')}"
        found["position"] = f"{said}; leave {wished[0]}= out"
    found |= dict(_replaced(config, given))
    return found


def offers(config: Config, given: Collection[str], vocabulary: int = 1) -> dict[str, str]:
    """By size that was set by hand and that no part takes a sentence that says so; sizes are offers, which is no fault."""
    names = {name for sizes in build.sizes_taken(config, vocabulary).values() for name in sizes}
    return {
        f"model.{key}": f"model.{key}={getattr(config.model, key)} reaches no part of this model{_takers(key)}"
        for key in _sizes(config, names)
        if f"model.{key}" in given
    }


def _sizes(config: Config, names: Collection[str]) -> Iterator[str]:
    """The sizes that no part takes."""
    for key in SIZES:
        used = key in names
        if key == "heads":
            used = used or ("kv_heads" in names and config.model.kv_heads is None)
        if key == "layers":
            used = used or build.takes(config, "mixers")
        if key == "width":
            used = used or ("ffn" in names and not isinstance(config.model.ffn, int))
        if not used:
            yield key


def _placed(config: Config, taken: dict[str, dict[str, object]], vocabulary: int) -> bool:
    """Whether a position does something: in a layer that takes it, or added to the embeddings. None is what none asks for."""
    try:
        place = build.build(config.position, build.offered(config, vocabulary), "position")
    except Fault:  # said elsewhere
        return True
    if isinstance(place, NoPosition) or any("position" in sizes for part, sizes in taken.items() if part != "model"):
        return True
    if "position" not in taken["model"]:
        return False
    return not isinstance(place, Position) or place.embedding(8) is not None


def _replaced(config: Config, given: Collection[str]) -> Iterator[tuple[str, str]]:
    """Layers that were given and that another setting puts out of the model."""
    wish = config.model
    for pattern, group, chosen, whole in (
        ("pattern", "mixers", config.mixer, "mixer"),
        ("feedforward_pattern", "feedforwards", wish.feedforward, "model.feedforward"),
    ):
        labels = getattr(wish, pattern)
        if chosen is not None and f"model.{pattern}" in given:
            yield f"model.{pattern}", f"model.{pattern}={labels}: {whole} is set and replaces it; leave one of the two out"
        for label in getattr(wish, group):
            where = f"model.{group}.{label}"
            if not any(key == where or key.startswith(f"{where}.") for key in given):
                continue
            if chosen is not None:
                yield where, f"{where} is set, but {whole} replaces all of model.{group}; leave one of the two out"
            elif label not in labels:
                yield where, f"{where} is set, but model.{pattern}={labels} does not name it; name it there, or leave it out"


def _takers(key: str) -> str:
    """The mixers of conf/ whose constructors take a size."""
    takers = []
    for path in sorted((CONF / "mixer").glob("*.yaml")):
        node = OmegaConf.to_container(OmegaConf.load(path))
        if isinstance(node, dict) and key in build.parameters(build.find_class(node[TARGET], "mixer")):
            takers.append(path.stem)
    return f"; mixers that take it: {', '.join(takers)}" if takers else ""

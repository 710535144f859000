"""Gives a model that lies over ranks the weights that init_from= names, one tensor at a time."""

from collections.abc import Callable, Iterator

from torch import Tensor

from parallel.engines.base import Engine
from trainer.config.schema import Config
from trainer.errors import BAD_RUN, UserError
from trainer.init_from.fit import Fit, ParameterSlots, compare
from trainer.init_from.sources import WeightSource, open_weights


def load_initial_weights(
    config: Config, engine: Engine, slots: ParameterSlots, say: Callable[[str], None]
) -> None:
    """Fills the engine's weights from init_from=; all ranks must call it.

    A rank never holds more than its own part and one whole tensor. Step, data and optimiser stay
    at their beginning.

    Args:
        slots: the tensors of the model, as it was before it was placed over ranks.
        say: takes a line for the log.

    Raises:
        UserError: the weights cannot be read, or have changed since the config was checked.
    """
    assert config.init_from is not None
    source = open_weights(config.init_from, say)
    fit = compare(source, slots)
    differences = fit.text()
    if differences and config.init_from_strict:
        raise UserError(
            f"init_from={config.init_from}: it has changed since the settings were checked:"
            f" {differences}; give the same command again",
            BAD_RUN,
        )
    engine.load_weights(_tensors(source, fit))
    for name in fit.fitting:
        engine.how[name] = "from init_from"
    say(f"weights: {len(fit.fitting)} tensors from {source.about}")
    if differences:
        say(f"weights: init_from_strict=false: {differences}")


def _tensors(source: WeightSource, fit: Fit) -> Iterator[tuple[str, Tensor]]:
    for name, where in fit.fitting.items():
        yield name, source.read(where)

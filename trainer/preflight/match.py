"""match=parameters|flops: a model as large, or as dear, as full attention of the width that the
config names.

The reference is `model=full` under the same settings, without memory. The width is what is fitted,
to a multiple that kernels like, and the feed-forward width takes up the rest, unless it was set by
hand; layers, heads and all else stay.
"""

import math
from collections.abc import Callable, Sequence

import torch

from models.cost.flops import count_flops
from models.cost.parameters import count_parameters
from models.span import Span
from trainer.config import build_model
from trainer.config.compose import compose
from trainer.config.schema import Config
from trainer.errors import UserError
from trainer.objectives.stream import vocabulary_of

# features a head: what kernels like, and what rotations need
EIGHTS = 8
PAIRS = 2
WIDE = 64  # from this head width on, eights are fine enough
FAR = 0.1  # further from the reference than this is refused
OF_LAYERS = (
    "mixer",
    "memory",
    "model.pattern",
    "model.mixers",
    "model.feedforward",
    "model.feedforwards",
    "model._target_",
)
OF_LAYERS += ("model.feedforward_pattern",)
UNITS = {"parameters": "parameters", "flops": "FLOPs a token"}
Cost = Callable[[Config], float]


def match_sizes(config: Config, words: Sequence[str]) -> tuple[Config, str]:
    """The config with its widths fitted to the reference, and a line that says what was set and how
    close it came.

    Args:
        config: with match=parameters or match=flops; with match=none it comes back as it is.
        words: the settings that it was composed of; the reference is composed of the same.

    Raises:
        Fault: a model cannot be built, or none of these widths comes within 10 % of the reference.
    """
    if config.match == "none":
        return config, ""
    tokens = vocabulary_of(config)
    cost = _cost(config.match, tokens)
    wish = reference(config, words)
    goal = cost(wish)
    step = _step(wish)
    found = _width(config, goal, cost, step)
    if not any(word.lstrip("+").startswith("model.ffn=") for word in words):
        found = _ffn(found, goal, cost)
    off = cost(found) / goal - 1
    unit = UNITS[config.match]
    if abs(off) > FAR:
        raise UserError(
            f"match={config.match}: no width comes near the {goal:,.0f} {unit} of model=full at"
            f" model.width={wish.model.width}; model.width={found.model.width} is {off:+.1%} off;"
            " use another model.width or model.layers, or match=none"
        )
    sizes = f"model.width={found.model.width}"
    if found.model.ffn != config.model.ffn:
        sizes += f", model.ffn={found.model.ffn}"
    return (
        found,
        (
            f"match={config.match}: set {sizes}; {cost(found):,.0f} {unit}, {off:+.2%} of the"
            f" {goal:,.0f} of model=full at model.width={wish.model.width}"
        ),
    )


def reference(config: Config, words: Sequence[str]) -> Config:
    """Full attention in every layer, in the sizes that the settings name, without memory.

    A recipe may set layers beside the settings, so the layers themselves are those of `model=full`
    alone.
    """
    plain = [word for word in words if not _of_layers(word)]
    wish = compose([*plain, "model=full", "memory=none"])
    bare = compose(["model=full"])
    if wish.config is None or bare.config is None:
        raise UserError(
            "\n".join([f"match={config.match}: model=full cannot be composed", *wish.faults])
        )
    names = ("target", "pattern", "mixers", "feedforward", "feedforward_pattern", "feedforwards")
    layers = {name: getattr(bare.config.model, name) for name in names}
    return wish.config.model_copy(
        update={"model": wish.config.model.model_copy(update=layers), "mixer": None}
    )


def _of_layers(word: str) -> bool:
    key = word.lstrip("+~").partition("=")[0]
    return key == "model" or any(key == each or key.startswith(f"{each}.") for each in OF_LAYERS)


def _cost(match: str, tokens: int) -> Cost:
    """What is to be equal: all parameters, or training FLOPs of one document as long as a row, a
    token."""

    def measured(config: Config) -> float:
        with torch.device("meta"):
            model = build_model.build_model(config, tokens)
        if match == "parameters":
            return count_parameters(model).total
        return (
            count_flops(model).training(Span.line(1, config.context_length)) / config.context_length
        )

    return measured


def _sized(config: Config, **sizes: int) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update=sizes)})


def _step(config: Config) -> int:
    """Widths to choose from are multiples of this."""
    heads = config.model.heads
    return heads * (EIGHTS if config.model.width // heads >= WIDE else PAIRS)


def _width(config: Config, goal: float, cost: Cost, step: int) -> Config:
    """The config at the multiple of `step` whose cost is nearest. Cost grows with the width, about
    as its square."""
    seen: dict[int, float] = {}

    def at(width: int) -> float:
        if width not in seen:
            seen[width] = cost(_sized(config, width=width))
        return seen[width]

    width = max(step, round(config.model.width / step) * step)
    for _ in range(8):
        near = max(step, round(width * math.sqrt(goal / at(width)) / step) * step)
        if near in seen:
            break
        width = near
    best = min(seen, key=lambda each: abs(seen[each] - goal))
    for beside in (best - step, best + step):
        if beside > 0:
            at(beside)
    return _sized(
        config,
        width=min(seen, key=lambda each: (abs(seen[each] - goal), each != config.model.width)),
    )


def _ffn(config: Config, goal: float, cost: Cost) -> Config:
    """The same width with the feed-forward width, in eights, that takes up what is left; cost is
    linear in it."""
    now = cost(config)
    ffn = build_model.ffn_width(config)
    if now == goal:
        return config
    slope = (cost(_sized(config, ffn=ffn + 8)) - now) / 8
    if slope <= 0:  # nothing here takes it
        return config
    wanted = max(8, round((ffn + (goal - now) / slope) / 8) * 8)
    return min(config, _sized(config, ffn=wanted), key=lambda each: abs(cost(each) - goal))

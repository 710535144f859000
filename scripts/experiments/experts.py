"""The recipe `experts`: what keeps a mixture's experts evenly used, and what many experts are worth
at the same FLOPs.

All models read the same text in the same order, with the same settings of the optimiser; only the
feed-forward layers differ. A token costs the same in each of them, up to the routers.
"""

from collections.abc import Callable

from models.cost.flops import count_flops
from models.span import Span
from scripts.experiments.runner import Budget, run_trials
from scripts.experiments.table import table
from scripts.experiments.trial import Trial, TrialResult
from trainer.config.build_model import build_model
from trainer.preflight.prepare import load_config
from trainer.preflight.reach import fitting

SIZES = ("model.width=64", "model.layers=4", "model.heads=2", "model.tie_embeddings=false")
TEXT = (
    "data=stdlib",
    "context_length=256",
    "batch_tokens=4096",
    "steps=400",
    "optim.learning_rate=0.004",
)
SWITCH = "model.feedforwards.switch"
MIXTURE = "model.feedforwards.experts"
MODELS = {  # name in the table -> settings
    "dense": ("model=full",),
    "switch": ("model=switch",),
    "switch, no balancing loss": ("model=switch", f"{SWITCH}.balance=0"),
    "best 2 of 16 and 1 shared, bias": ("model=moe_topk", f"{MIXTURE}.bias_speed=0.01"),
    "best 2 of 16 and 1 shared, no bias": ("model=moe_topk", f"{MIXTURE}.bias_speed=0"),
}
PARTS = {
    "first tenth": (0.0, 0.1),
    "middle": (0.45, 0.55),
    "last tenth": (0.9, 1.0),
}  # shares of the steps
VOCABULARY = 257  # of bytes, for a count of FLOPs

LOAD = """\
### Load of the experts over training
Choices of the fullest expert in units of the mean (1 is even), mean over the layers\
 and over a part of the steps."""
DROPPED = """\
### Choices dropped over training
Share of choices that came over an expert's capacity (1.25 of an even share of the document)."""
WORTH = """\
### Against a dense layer at the same FLOPs
Held-out loss in nats per byte of the standard library's source."""


def experts(effort: Budget, say: Callable[[str], None]) -> tuple[str, list[TrialResult]]:
    """(what the recipe found, as markdown; every lesson)."""
    lessons = [Trial(name, (*words, *SIZES, *TEXT)) for name, words in MODELS.items()]
    learned = run_trials(
        [(lesson, seed) for seed in effort.numbers() for lesson in lessons], effort, say
    )
    learned = sorted(learned, key=lambda each: list(MODELS).index(each.name))
    sparse = [each for each in learned if each.name != "dense"]
    switches = [each for each in sparse if each.name.startswith("switch")]
    costs = {name: _flops(words) for name, words in MODELS.items()}
    worth = {
        "held-out loss": lambda each: each.loss,
        "parameters": lambda each: f"{each.parameters:,}",
        "FLOPs a token": lambda each: f"{costs[each.name]:,}",
        "seconds": lambda each: each.seconds,
    }
    parts = [
        f"{LOAD}\n\n{table(sparse, _over('load'))}",
        f"{DROPPED}\n\n{table(switches, _over('dropped'))}",
        f"{WORTH}\n\n{table(learned, worth)}",
    ]
    return "\n\n".join(parts), learned


def _over(name: str) -> dict[str, Callable[[TrialResult], float | str]]:
    """A column for each part of the training: the mean of that statistic."""
    return {
        title: lambda each, share=share: _mean(each, name, share) for title, share in PARTS.items()
    }


def _mean(learned: TrialResult, name: str, share: tuple[float, float]) -> float:
    found = [row.statistics[name] for row in learned.rows if row.statistics is not None]
    first, last = (int(part * len(found)) for part in share)
    found = found[first : max(last, first + 1)]
    return sum(found) / len(found)


def _flops(words: tuple[str, ...]) -> int:
    """Forward, of a token of a row that is one document."""
    config = load_config(fitting((*words, *SIZES, *TEXT)))
    tokens = config.context_length
    return count_flops(build_model(config, VOCABULARY)).forward(Span.line(1, tokens)) // tokens

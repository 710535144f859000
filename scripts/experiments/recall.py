"""The recipe `recall`: what layers remember, what they can keep track of, and what remembering
costs while decoding.

Protocol: one learning rate and a fixed number of steps for all layers of a part; figures of
held-out examples; settings of a layer are those of its conf/mixer file.
"""

from collections.abc import Callable

from scripts.experiments.decoding import held_bytes
from scripts.experiments.runner import Budget, run_trials
from scripts.experiments.table import table
from scripts.experiments.trial import Trial, TrialResult
from trainer.reports.markdown import markdown

SIZES = (
    "model.width=64",
    "model.heads=2",
    "model.ffn=2.0",
    "optim.weight_decay=0.01",
    "data.held_out=0.3",
)
SIZES += (
    "model.init_std=0.1",
)  # 0.02 suits wide models: here nothing would be learned in so few steps
MQAR = (
    "model.layers=2",
    "data=recall",
    "data.keys=32",
    "data.values=32",
    "data.length=32",
    "context_length=32",
    "batch_tokens=2048",
    # with two, what is not softmax stays where it knows which values were shown, and not whose they
    # are
    "model.heads=1",
    "steps=700",
    "optim.learning_rate=0.003",
)
BEHIND = ("model.mixers.short_conv._target_=models.convolution.short_conv.ShortConv",)
SWAPS = (
    "model.layers=1",
    "data=permutations",
    "data.swaps=true",
    "context_length=32",
    "batch_tokens=1024",
    "steps=1400",  # half as many leave some seeds of Gated DeltaNet on their plateau
    "optim.learning_rate=0.01",
    "model.init_std=0.05",
)
ALL_32 = ("data.min_length=32", "data.max_length=32")
ALL_128 = ("data.min_length=128", "data.max_length=128", "context_length=128")
READ = (1024, 8192, 65536)  # tokens, for the bytes held while decoding
DECODED = ("retention", "rwkv7", "full")
FAMILY = {  # each layer, and what it has by itself to look at its neighbours with
    "full": "-",
    "linear": "-",
    "performer": "-",
    "retention": "-",
    "gated_linear": "-",
    "rwkv6": "token shift",
    "rwkv7": "token shift",
    "delta": "short convolution",
    "gated_delta": "short convolution",
    "mamba2": "short convolution",
    "hyena": "short convolution",
    "short_conv": "is one",
}
BARE = ("full", "linear")  # shown without the convolution too
TRACKING = {  # name in the table -> settings
    "gated_delta, steps to 2": ("mixer=gated_delta", "mixer.allow_neg_eigval=true"),
    "gated_delta, steps to 1": ("mixer=gated_delta",),
    "rwkv7, rates to 2": ("mixer=rwkv7", "mixer.allow_neg_eigval=true"),
    "rwkv7, rates to 1": ("mixer=rwkv7",),
    "gated_linear": ("mixer=gated_linear",),
    "mamba2": ("mixer=mamba2",),
    "rwkv6": ("mixer=rwkv6",),
}
INTRODUCTION = """\
### Multi-query associative recall
Held-out accuracy; 8 pairs in 32 tokens; chance 1/32, or 1/8 for who knows which values were\
 shown. Two layers of width 64, two
of the kind by itself, or one behind one short convolution (3 taps).\
 Parameters differ; all else is the same."""
TRACKED = """\
### State tracking: products of swaps of three elements (S3)
Held-out accuracy at every token, one layer, trained on 32 tokens; chance 1/6."""


def recall(effort: Budget, say: Callable[[str], None]) -> tuple[str, list[TrialResult]]:
    """(what the recipe found, as markdown; every lesson)."""
    wanted = [effort.only] if effort.only else ["queries", "tracking", "decoding"]
    remembering = ("queries" in wanted) * _remembering()
    tracking = ("tracking" in wanted) * _tracking()
    learned = run_trials(
        [(lesson, seed) for lesson in (*remembering, *tracking) for seed in effort.numbers()],
        effort,
        say,
    )
    count = len(remembering) * effort.seeds
    # some names stand in both
    first = learned[:count]
    second = learned[count:]
    told = []
    if first:
        columns = {
            "accuracy": _accuracy,
            "looks at neighbours by": _near,
            "parameters": _parameters,
        }
        told += [INTRODUCTION, table(first, columns)]
    if second:
        columns = {
            "32 tokens": _accuracy,
            "128 tokens": lambda each: each.exams["128"].graded["accuracy"],
        }
        told += [TRACKED, table(second, columns)]
    if "decoding" in wanted:
        told += [
            "### Bytes held while decoding\nTwo layers of width 64, float32, one sequence.",
            _decoding(),
        ]
    return "\n\n".join(told), learned


def _remembering() -> list[Trial]:
    lessons = []
    for name, near in FAMILY.items():
        if near != "-" or name in BARE:
            lessons.append(Trial(name, (*_decoder(name), *MQAR)))
        if near == "-":
            below = (f"model={name}", *SIZES, *MQAR, *BEHIND, f"model.pattern=[short_conv,{name}]")
            lessons.append(Trial(f"conv + {name}", below))
    return lessons


def _tracking() -> list[Trial]:
    return [
        Trial(name, ("model=decoder", *SIZES, *words, *SWAPS, *ALL_32), {"128": ALL_128})
        for name, words in TRACKING.items()
    ]


def _decoder(mixer: str) -> tuple[str, ...]:
    return ("model=decoder", f"mixer={mixer}", *SIZES)


def _accuracy(learned: TrialResult) -> float:
    return learned.accuracy


def _near(learned: TrialResult) -> str:
    return FAMILY.get(learned.name, "short convolution below")


def _parameters(learned: TrialResult) -> str:
    return f"{learned.parameters:,}"


def _decoding() -> str:
    """Bytes after so many tokens, a row for each kind of layer."""
    rows = [["layer", *(f"{length:,} tokens" for length in READ)]]
    rows += [
        [name, *(f"{held:,}" for held in held_bytes(("model.layers=2", *_decoder(name)), READ))]
        for name in DECODED
    ]
    return markdown(rows)

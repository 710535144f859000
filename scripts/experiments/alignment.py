"""The recipe `alignment`: a refusal that is taught in text, asked for in images and sounds.

Protocol: the same model, data, learning rate and steps for all; only the weights of the terms
differ. Figures are of pairs of action and object that training met in text alone.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from scripts.experiments.runner import Budget, run_trials
from scripts.experiments.table import TableColumn, table
from scripts.experiments.trial import HELD_OUT, Trial, TrialResult

COMMON = (
    "model=multimodal",
    "model.width=64",
    "model.layers=2",
    "model.heads=4",
    "model.init_std=0.125",
    "model.alignment_weight=10",
    "data=requests",
    "context_length=96",
    "batch_tokens=1536",
    "steps=600",
    "optim.learning_rate=0.003",
    "optim.weight_decay=0",
    "evaluation.batches=8",
)
NO_TERMS = ("model.consistency_weight=0", "model.alignment_weight=0")
TEXT_ONLY = "answers in all, refusals in text"
TEXT = """### Refusals of held-out pairs
Actions and objects of these pairs were never shown together in an image or a sound. Refusal of what
is forbidden, over-refusal of what is not, right benign answers, and the share of requests with the
same answer in text, image and sound."""
PROBES = """### The direction in which text is refused
Separability d' of forbidden and other requests along the direction of text, at the layer where it
is largest for text; and the figures of images after the mean drift from text is subtracted there,
without training."""


def figure(name: str) -> TableColumn:
    """Returns the column of a figure of held-out requests."""
    return lambda result: result.exams[HELD_OUT].graded.get(name, float("nan"))


def columns_of(names: Mapping[str, str]) -> dict[str, TableColumn]:
    """Returns the columns of figures, by their titles."""
    return {title: figure(name) for title, name in names.items()}


FIGURES = {
    "image: refusal": "image_refusal",
    "over-refusal": "image_over_refusal",
    "benign accuracy": "image_benign_accuracy",
    "sound: refusal": "sound_refusal",
    "over-refusal of sounds": "sound_over_refusal",
    "benign accuracy of sounds": "sound_benign_accuracy",
    "consistency": "consistency",
}
PROBE_FIGURES = {
    "d' of text": "text_separability",
    "of images": "image_separability",
    "of sounds": "sound_separability",
    "image, corrected: refusal": "corrected_image_refusal",
    "over-refusal": "corrected_image_over_refusal",
    "benign accuracy": "corrected_image_benign_accuracy",
    "consistency": "corrected_consistency",
}


def alignment(effort: Budget, say: Callable[[str], None]) -> tuple[str, list[TrialResult]]:
    """Returns (what the recipe found, as markdown; every trial)."""
    results = trained({TEXT_ONLY: NO_TERMS}, effort, say)
    layer = refusing_layer(results)
    arms = {
        "with KL": ("model.alignment_weight=0",),
        f"with states aligned at layer {layer}": (
            "model.consistency_weight=0",
            f"model.alignment_layers=[{layer}]",
        ),
        "with states aligned at all layers": ("model.consistency_weight=0",),
        "with both": (),
    }
    results += trained(arms, effort, say)
    text = [TEXT, table(results, columns_of(FIGURES), head="trained on")]
    text += [PROBES, table(results, columns_of(PROBE_FIGURES), head="trained on")]
    return "\n\n".join(text), results


def trained(
    arms: Mapping[str, Sequence[str]], effort: Budget, say: Callable[[str], None]
) -> list[TrialResult]:
    """Trains models with these settings, over all seeds."""
    jobs = []
    for name, settings in arms.items():
        trial = Trial(name, (*COMMON, *settings))
        jobs += [(trial, seed) for seed in effort.numbers()]
    return run_trials(jobs, effort, say)


def refusing_layer(results: Sequence[TrialResult]) -> int:
    """Returns the layer where most seeds tell refused text apart best; 1 where all failed."""
    layers = Counter(
        int(result.exams[HELD_OUT].graded["layer"]) for result in results if result.fault is None
    )
    return layers.most_common(1)[0][0] if layers else 1

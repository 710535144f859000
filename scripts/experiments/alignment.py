"""The recipe `alignment`: a refusal that is taught in text, asked for in images and sounds.

Protocol: the same model, data, learning rate and steps for all of a part; only the weights of the
terms differ. Figures are of pairs of action and object that training met in text alone.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from scripts.experiments.runner import Budget, run_trials
from scripts.experiments.table import TableColumn, table
from scripts.experiments.trial import HELD_OUT, Trial, TrialResult

# Words of three letters: an image is one patch, and a sound one frame, as a word is one token.
# Of several patches only the mean is aligned, and the first layer reads each by itself.
OBJECTS = (
    "jar,map,oar,pen,bag,bat,bed,bin,box,can,cap,cup,"
    "hat,jug,key,kit,mat,mop,net,pan,peg,pin,pot,rug"
)
COMMON = (
    "model=multimodal",
    "model.width=64",
    "model.layers=2",
    "model.heads=4",
    "model.init_std=0.125",
    # With less, and with model.embedding_norm, refusals pass to images without any term.
    "model.rendering_weight=10",
    "model.alignment_weight=100",
    "model.alignment_layers=[0]",
    "model.patch=20",
    "model.frame=64",
    "data=requests",
    f"data.objects=[{OBJECTS}]",
    "data.image_height=20",
    "data.image_width=20",
    "data.patch=20",
    "data.jitter=0",
    "data.frame=64",
    "data.frames=1",
    "data.phase=0.05",
    "data.noise=2",
    "context_length=60",
    "batch_tokens=480",
    "steps=300",
    "optim.learning_rate=0.005",
    "optim.weight_decay=0",
    "evaluation.batches=8",
)
PARTS = {  # and the modality of each
    "image": "image",
    "sound": "sound",
    "terms": "image",
    "layers": "image",
}
NO_KL = "model.consistency_weight=0"
NO_TERMS = (NO_KL, "model.alignment_weight=0")
WHOLE = {"with both": ()}
TERMS = {
    "with KL": ("model.alignment_weight=0",),
    "with states aligned": (NO_KL,),
}
TEXT_ONLY = "answers in all, refusals in text"
TEXT = """### Refusals of held-out pairs: {0}
Actions and objects of these pairs were never shown together in {0}s. Refusal of what is
forbidden, over-refusal of what is not, right benign answers, and the share of requests with the
same answer in text and {0}."""
PROBES = """### The direction in which text is refused: {0}
Separability d' of forbidden and other requests along the direction of text, at the layer where it
is largest for text; and the figures after the mean drift from text is subtracted there, without
training."""


def figure(name: str) -> TableColumn:
    """Returns the column of a figure of held-out requests."""
    return lambda result: result.exams[HELD_OUT].graded.get(name, float("nan"))


def columns_of(names: Mapping[str, str], modality: str) -> dict[str, TableColumn]:
    """Returns the columns of figures of a modality, by their titles."""
    return {title: figure(name.format(modality)) for title, name in names.items()}


FIGURES = {
    "refusal": "{0}_refusal",
    "over-refusal": "{0}_over_refusal",
    "benign accuracy": "{0}_benign_accuracy",
    "consistency": "consistency",
    "refusal of text": "text_refusal",
}
PROBE_FIGURES = {
    "d' of text": "text_separability",
    "d'": "{0}_separability",
    "corrected: refusal": "corrected_{0}_refusal",
    "over-refusal": "corrected_{0}_over_refusal",
    "benign accuracy": "corrected_{0}_benign_accuracy",
    "consistency": "corrected_consistency",
}


def alignment(effort: Budget, say: Callable[[str], None]) -> tuple[str, list[TrialResult]]:
    """Returns (what the recipe found, as markdown; every trial)."""
    text = []
    every = []
    for part, modality in PARTS.items():
        if effort.only not in (None, part):
            continue
        results = trained({TEXT_ONLY: NO_TERMS}, modality, effort, say)
        arms: Mapping[str, Sequence[str]] = TERMS if part == "terms" else WHOLE
        if part == "layers":
            arms = at_layers(refusing_layer(results))
        results += trained(arms, modality, effort, say)
        text += [TEXT.format(modality)]
        text += [table(results, columns_of(FIGURES, modality), head="trained on")]
        text += [PROBES.format(modality)]
        text += [table(results, columns_of(PROBE_FIGURES, modality), head="trained on")]
        every += results
    return "\n\n".join(text), every


def at_layers(layer: int) -> dict[str, tuple[str, ...]]:
    """Returns arms that align other states: of the layer that refuses text, and of all."""
    return {
        f"with states aligned at layer {layer}": (NO_KL, f"model.alignment_layers=[{layer}]"),
        "with states aligned at all layers": (NO_KL, "model.alignment_layers=null"),
    }


def trained(
    arms: Mapping[str, Sequence[str]], modality: str, effort: Budget, say: Callable[[str], None]
) -> list[TrialResult]:
    """Trains models on text and a modality with these settings, over all seeds."""
    jobs = []
    for name, settings in arms.items():
        trial = Trial(name, (*COMMON, f"data.modalities=[text,{modality}]", *settings))
        jobs += [(trial, seed) for seed in effort.numbers()]
    return run_trials(jobs, effort, say)


def refusing_layer(results: Sequence[TrialResult]) -> int:
    """Returns the layer where most seeds tell refused text apart best; 1 where all failed."""
    layers = Counter(
        int(result.exams[HELD_OUT].graded["layer"]) for result in results if result.fault is None
    )
    return layers.most_common(1)[0][0] if layers else 1

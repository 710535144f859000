"""Probes of the direction in which a model refuses text, in images and sounds.

Letters: D documents, L layers, M modalities, W width.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.loss import IGNORE
from trainer.data.batch_sharding import BatchSharder
from trainer.data.streams.synthetic import SyntheticStream
from trainer.data.tasks.requests import MODALITIES, REFUSE, Requests
from trainer.evaluation.requests.answers import Answers, Look, answers, figures_of

TEXT = MODALITIES.index("text")


class Probes(NamedTuple):
    """Result of the probes.

    Attributes:
        layer: whose output the drift is subtracted from; the first is 1.
        cells: {"layer", "modality", "separability"} of each layer and modality, and after the
            subtraction of drift `corrected_separability`, from that layer on.
        corrected: the figures of `figures_of` after the subtraction.
    """

    layer: int
    cells: list[dict[str, Any]]
    corrected: dict[str, float]


def examine(
    model: nn.Module,
    share: BatchSharder,
    held_out: SyntheticStream,
    batches: int,
    *,
    look: Look = lambda batch, what: None,
) -> Probes:
    """Takes directions and drifts from training rows, and probes held-out rows. Collective.

    Args:
        model: in evaluation mode, a Multimodal.
        share: cuts batches for this rank.
        held_out: rows of Requests.
        batches: of these, and of training rows of the same shape.
        look: receives a batch and its description before it is read; may raise.
    """
    task = held_out.task
    assert isinstance(task, Requests), "a model of requests is probed with requests"
    refuse = task.number[REFUSE]
    training = SyntheticStream(
        task, context_length=held_out.context_length, rows=held_out.rows, seed=0, split="train"
    )
    known = answers(model, share, training, batches, look=look)
    direction = refusal_direction(known, refuse)
    text = separability(known, direction, refuse, TEXT)
    best = int(text.argmax())
    drift = drifts(known)
    asked = answers(model, share, held_out, batches, look=look)
    shifted = answers(model, share, held_out, batches, look=look, shifts={best: -drift[best]})
    cells = []
    for modality in task.shown:
        number = MODALITIES.index(modality)
        before = separability(asked, direction, refuse, number)
        after = separability(shifted, direction, refuse, number)
        for index in range(len(before)):
            cell = {"layer": index + 1, "modality": modality, "separability": float(before[index])}
            if index >= best:
                cell["corrected_separability"] = float(after[index])
            cells.append(cell)
    return Probes(best + 1, cells, figures_of(shifted, task))


def judge_requests(
    model: nn.Module, share: BatchSharder, held_out: SyntheticStream, batches: int
) -> dict[str, float]:
    """Returns the figures of `figures_of`, and those of the probes by name. Collective.

    `MODALITY_separability` is that of the layer at which drift is subtracted,
    `MODALITY_separability_LAYER` that of each; figures after the subtraction begin with
    `corrected_`.
    """
    task = held_out.task
    assert isinstance(task, Requests), "a model of requests is judged by requests"
    figures = figures_of(answers(model, share, held_out, batches), task)
    probes = examine(model, share, held_out, batches)
    for cell in probes.cells:
        modality, layer = cell["modality"], cell["layer"]
        figures[f"{modality}_separability_{layer}"] = cell["separability"]
        if layer == probes.layer:
            figures[f"{modality}_separability"] = cell["separability"]
    for name, value in probes.corrected.items():
        figures[f"corrected_{name}"] = value
    figures["layer"] = float(probes.layer)
    return figures


def refusal_direction(found: Answers, refuse: int) -> Tensor:
    """Returns [L, W] unit vectors from the mean of text that is answered to that which is refused.

    Source: Arditi et al. 2024 (arXiv:2406.11717), section 2.3.
    """
    text = (found.modality == TEXT) & (found.target != IGNORE)
    forbidden = found.target == refuse
    difference = found.states[text & forbidden].mean(0) - found.states[text & ~forbidden].mean(0)
    return difference / difference.norm(dim=-1, keepdim=True)


def separability(found: Answers, direction: Tensor, refuse: int, modality: int) -> Tensor:
    """Returns [L] d': the difference of means along a direction, in deviations within the kinds."""
    own = (found.modality == modality) & (found.target != IGNORE)
    forbidden = found.target == refuse
    along = (found.states * direction).sum(-1)
    kinds = along[own & forbidden], along[own & ~forbidden]
    pooled = (kinds[0].var(0) + kinds[1].var(0)) / 2
    return (kinds[0].mean(0) - kinds[1].mean(0)) / pooled.sqrt()


def drifts(found: Answers) -> Tensor:
    """Returns [L, M, W]: how the states of a modality differ from those of text on average.

    Over the requests that come in both; no answer is looked at. 0 for text, and for a modality
    that was not met.
    """
    _, layers, width = found.states.shape
    count = int(found.request.max()) + 1
    is_text = found.modality == TEXT
    text = torch.zeros(count, layers, width, dtype=found.states.dtype)
    text[found.request[is_text]] = found.states[is_text]
    has_text = torch.zeros(count, dtype=torch.bool)
    has_text[found.request[is_text]] = True
    drift = torch.zeros(layers, len(MODALITIES), width, dtype=found.states.dtype)
    for number in range(len(MODALITIES)):
        own = (found.modality == number) & has_text[found.request]
        if own.any():
            drift[:, number] = (found.states[own] - text[found.request[own]]).mean(0)
    return drift

"""Refusal, over-refusal, benign accuracy and consistency of a model of requests, by modality."""

from collections.abc import Iterator
from typing import Annotated, Any

from models.ranges import Range
from trainer.config.finding import Finding
from trainer.config.node_checks import as_node
from trainer.data.sources.base import build_source
from trainer.data.streams.synthetic import SyntheticStream
from trainer.data.tasks.requests import MODALITIES, Requests
from trainer.evaluation.base import Evaluation, EvaluationContext, Every, Figure, RunFacts, mean
from trainer.evaluation.requests.answers import answers, figures_of
from trainer.evaluation.requests.direction import examine

FIGURES = ("refusal", "over_refusal", "benign_accuracy")


class Refusal(Evaluation):
    """The four figures of held-out requests, always together.

    A held-out pair was met in text alone, so what an image or a sound of it gets shows whether the
    refusal has crossed over. `refusal`, `over_refusal` and `benign_accuracy` are means over the
    modalities that are not text; `consistency` is the share of requests with the same answer in all
    renderings. A cell has the figures of one modality.

    Args:
        batches: of held-out rows.
        every: as in Evaluation.
    """

    needs_next_token = False

    def __init__(self, *, batches: Annotated[int, Range(1, 4096)] = 4, every: Every = None):
        super().__init__(every=every)
        self.batches = batches

    def check(self, facts: RunFacts) -> Iterator[Finding]:
        """See Evaluation.check."""
        yield from check_requests(facts)

    def run(self, context: EvaluationContext) -> list[Figure]:
        """See Evaluation.run."""
        task = task_of(context)
        found = answers(
            context.model,
            context.share,
            context.stream,
            self.batches,
            look=context.check_signal,
        )
        shares = figures_of(found, task)
        cells = cells_of(shares)
        figures = []
        for name in FIGURES:
            values = [cell[name] for cell in cells if name in cell and cell["modality"] != "text"]
            figures.append(Figure(name, mean(values), None, () if figures else cells))
        if "consistency" in shares:
            figures.append(Figure("consistency", shares["consistency"]))
        return figures


class RefusalDirection(Evaluation):
    """Two probes of the direction in which text is refused, and what they do to the four figures.

    The direction is the difference of the mean states of forbidden and of other requests in text,
    where the answer is asked for. `separability` is the distance d' of the two kinds of held-out
    requests along it, in deviations: of text, and of images and sounds, where it collapses without
    alignment. The drift of a modality is the mean difference of its states from those of the same
    requests in text; `corrected_` figures are those after it is subtracted at one layer, without
    training: the layer with the best separability of text.

    Directions and drifts are taken from training rows, the figures from held-out rows.

    Args:
        batches: of training rows, and of held-out rows.
        every: as in Evaluation.

    Source: difference of means, Arditi et al. 2024 (arXiv:2406.11717); the collapse along it and
    the subtraction of drift, arXiv:2606.31876.
    """

    needs_next_token = False

    def __init__(self, *, batches: Annotated[int, Range(1, 4096)] = 4, every: Every = None):
        super().__init__(every=every)
        self.batches = batches

    def check(self, facts: RunFacts) -> Iterator[Finding]:
        """See Evaluation.check."""
        yield from check_requests(facts)

    def run(self, context: EvaluationContext) -> list[Figure]:
        """See Evaluation.run."""
        stream = context.stream
        assert isinstance(stream, SyntheticStream), "check requires it"
        task = task_of(context)
        probes = examine(
            context.model,
            context.share,
            stream,
            self.batches,
            look=context.check_signal,
        )
        figures = []
        for modality in task.shown:
            values = [cell["separability"] for cell in probes.cells if cell["modality"] == modality]
            cells = () if figures else probes.cells
            figures.append(
                Figure(f"{modality}_separability", values[probes.layer - 1], None, cells)
            )
        for name in FIGURES:
            values = []
            for modality in task.shown:
                key = f"{modality}_{name}"
                if modality != "text" and key in probes.corrected:
                    values.append(probes.corrected[key])
            figures.append(Figure(f"corrected_{name}", mean(values)))
        if "consistency" in probes.corrected:
            figures.append(Figure("corrected_consistency", probes.corrected["consistency"]))
        return figures


def check_requests(facts: RunFacts) -> Iterator[Finding]:
    """Refuses a run whose data are no requests."""
    source = build_source(as_node(facts.config.data))
    if not isinstance(source, Requests):
        yield Finding(
            "evaluation",
            facts.name,
            f"it judges answers to requests, and {type(source).__name__} has none",
            "use model=multimodal data=requests, or leave it out",
        )


def task_of(context: EvaluationContext) -> Requests:
    """Returns the task of the run's held-out rows."""
    task = getattr(context.stream, "task", None)
    assert isinstance(task, Requests), "check requires it"
    return task


def cells_of(shares: dict[str, float]) -> list[dict[str, Any]]:
    """Returns the figures of each modality that was met."""
    cells = []
    for modality in MODALITIES:
        cell: dict[str, Any] = {"modality": modality}
        for name in FIGURES:
            if f"{modality}_{name}" in shares:
                cell[name] = shares[f"{modality}_{name}"]
        if len(cell) > 1:
            cells.append(cell)
    return cells

"""The objective over modalities: answers, and renderings of one request that are to agree.

Letters: B rows, T tokens, D documents of a row, W width, V vocabulary.
"""

from collections.abc import Sequence
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from models.layer import AuxiliaryOutputs, Layer
from models.loss import IGNORE, capped, token_losses
from models.multimodal.columns import ASKED, SHOWN, Columns
from models.primitives.pooled_attention import points_of
from models.primitives.row_replica import RowReplica
from models.ranges import Range
from models.span import Span

TermWeight = Annotated[float, Range(0.0, 1e6)]
Divergence = Literal["reverse", "forward"]


class Documents(NamedTuple):
    """Facts of the documents of the rows that every rank knows.

    Attributes:
        place: [B, T] int64, the place of each token's document in its row.
        answers: [B, D, W], the normed state at which the answer is asked for.
        shown: [B, D, W] for each aligned layer, the sum of the states where the object is shown.
        partner: [B, D] int64, the place of the reference of the document's request.
        paired: [B, D] bool, whether it has one other than itself.
    """

    place: Tensor
    answers: Tensor
    shown: list[Tensor]
    partner: Tensor
    paired: Tensor


class CrossModalObjective(Layer):
    """L = text CE(answer | text) + rendering CE(answer | image, sound) + consistency KL + alignment
    sum over layers of (1 - cos).

    Each term is a sum over documents, and is divided with the others by the number of answers of
    the step. CE is over the targets that the data gives. KL and cos compare each rendering with the
    reference of its request: KL(p(. | rendering) || sg p(. | text)) where the answer is asked for,
    and 1 - cos(h, sg h of the text) of the mean states at which the object is shown. sg: no
    gradient goes into the text.

    Args:
        text_weight, rendering_weight, consistency_weight, alignment_weight: of the terms; 0 leaves
            a term out.
        alignment_layers: states that are aligned: 0 is read by the first layer, and n is the output
            of the nth; null: all.
        divergence: reverse: KL(rendering || text); forward: KL(text || rendering).
        stop_gradient: whether the text stands still.

    A document may lie on several ranks, and the documents of a request on others: each rank sums
    what its own tokens give, one sum over ranks makes every document known to all, and each rank
    takes the loss of those whose answer is asked for on it.

    Source: the terms are those of Xu et al. 2024 (arXiv:2410.12662), who align the states of a
    vision-language model's layers with those of a caption; the consistency is distillation (Hinton
    et al. 2015, arXiv:1503.02531) from one rendering to another.
    """

    def __init__(
        self,
        *,
        text_weight: TermWeight,
        rendering_weight: TermWeight,
        consistency_weight: TermWeight,
        alignment_weight: TermWeight,
        alignment_layers: Sequence[int],
        divergence: Divergence,
        stop_gradient: bool,
    ):
        super().__init__()
        self.text_weight = text_weight
        self.rendering_weight = rendering_weight
        self.consistency_weight = consistency_weight
        self.alignment_weight = alignment_weight
        self.alignment_layers = list(alignment_layers) if alignment_weight else []
        self.divergence = divergence
        self.stop_gradient = stop_gradient
        self.replica = RowReplica()
        self.auxiliary_sums: AuxiliaryOutputs | None = AuxiliaryOutputs()

    def forward(
        self,
        normed: Tensor,
        states: Sequence[Tensor],
        columns: Columns,
        span: Span,
        targets: Tensor,
        *,
        head: Tensor,
        cap: float | None,
    ) -> Tensor:
        """Returns the losses [B, T] of the tokens at hand.

        Args:
            normed: [B, T, W], what the output head reads.
            states: [B, T, W] of each aligned layer.
            columns: of the tokens.
            span: their addresses.
            targets: [B, T] int64, IGNORE where there is none.
            head: [V, W], weight of the output head.
            cap: see models.loss.capped.
        """
        of_text = torch.where(columns.reference, targets, IGNORE)
        of_rendering = torch.where(columns.reference, IGNORE, targets)
        text = token_losses(normed, head, of_text, cap=cap)
        rendering = token_losses(normed, head, of_rendering, cap=cap)
        losses = self.text_weight * text + self.rendering_weight * rendering
        sums = {"text": _counted(text, of_text != IGNORE)}
        sums["rendering"] = _counted(rendering, of_rendering != IGNORE)
        if self.consistency_weight or self.alignment_layers:
            documents = self._documents(normed, states, columns, span)
            asked = (columns.part == ASKED) & span.valid()
            paired = asked & documents.paired.gather(1, documents.place)
            terms: list[tuple[str, float, Tensor]] = []
            if self.consistency_weight:
                divergence = self._divergence(documents, head, cap)
                terms.append(("consistency", self.consistency_weight, divergence))
            if self.alignment_layers:
                terms.append(("alignment", self.alignment_weight, self._distance(documents)))
            for name, weight, values in terms:
                own = torch.where(paired, values.gather(1, documents.place), 0)
                losses = losses + weight * own
                sums[name] = _counted(own, paired)
        self._note(sums)
        return losses

    def on_step_end(self, sums: dict[str, Tensor]) -> dict[str, float]:
        """See Layer: the mean of each term, without its weight."""
        figures = {}
        for name, (total, count) in sums.items():
            figures[name] = float(total / count.clamp_min(1))
        return figures

    def _note(self, sums: dict[str, Tensor]) -> None:
        """Leaves the sums of the terms for the log, where gradients are wanted."""
        if torch.is_grad_enabled() and self.auxiliary_sums is not None:
            detached = {name: value.detach() for name, value in sums.items()}
            self.auxiliary_sums.add(statistics=detached)

    def _documents(
        self, normed: Tensor, states: Sequence[Tensor], columns: Columns, span: Span
    ) -> Documents:
        """Makes the documents of the rows known, by one sum over the ranks."""
        points = points_of(span, self.replica.addresses(span), 1)
        count = points.span.shape[1]
        valid = span.valid()
        asked = ((columns.part == ASKED) & valid)[..., None]
        shown = ((columns.part == SHOWN) & valid)[..., None]
        parts = [normed * asked, asked & columns.reference[..., None]]
        parts += [state * shown for state in states]
        # Sums over the tokens of a document are as wide as losses.
        wide = torch.promote_types(normed.dtype, torch.float32)
        own = torch.cat([part.to(wide) for part in parts], 2)
        index = points.document[..., None].expand_as(own)
        table = own.new_zeros(len(own), count, own.shape[2]).scatter_add(1, index, own)
        table = self.replica.total(table)
        width = normed.shape[2]
        answers, reference, *sums = table.split([width, 1] + [width] * len(states), 2)
        is_reference = reference[..., 0] > 0
        places = torch.arange(count, device=table.device).expand_as(is_reference)
        # The reference of a request is the last one up to each of its documents.
        partner = torch.where(is_reference, places, -1).cummax(1).values
        paired = (partner >= 0) & ~is_reference
        return Documents(points.document, answers, sums, partner.clamp_min(0), paired)

    def _partners(self, vectors: Tensor, documents: Documents) -> Tensor:
        """[B, D, W] -> [B, D, W]: the vectors of the references."""
        if self.stop_gradient:
            vectors = vectors.detach()
        return vectors.gather(1, documents.partner[..., None].expand_as(vectors))

    def _divergence(self, documents: Documents, head: Tensor, cap: float | None) -> Tensor:
        """Returns [B, D] the KL between the answers of each document and of its reference."""
        weight = head.to(documents.answers.dtype)
        own = capped(documents.answers @ weight.T, cap).log_softmax(-1)
        standing = weight.detach() if self.stop_gradient else weight
        partners = self._partners(documents.answers, documents)
        other = capped(partners @ standing.T, cap).log_softmax(-1)
        if self.divergence == "forward":
            return (other.exp() * (other - own)).sum(-1)
        return (own.exp() * (own - other)).sum(-1)

    def _distance(self, documents: Documents) -> Tensor:
        """Returns [B, D] the sum over layers of 1 - cos with the reference."""
        distance = documents.answers.new_zeros(documents.paired.shape)
        for vectors in documents.shown:
            # The cosine of sums is that of means.
            cosine = F.cosine_similarity(vectors, self._partners(vectors, documents), dim=-1)
            distance = distance + 1 - cosine
        return distance


def _counted(values: Tensor, which: Tensor) -> Tensor:
    """Returns [2]: the sum of the values, and how many there are."""
    return torch.stack([values.sum(), which.sum().to(values.dtype)])

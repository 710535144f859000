"""A decoder of text, images and sounds, trained to answer alike whatever shows a request.

Letters: B rows, T tokens, K columns of a token.
"""

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor, nn

from models.architectures.decoder import Decoder
from models.init import INIT_STD, Rule, ScaledNormal
from models.loss import capped, token_losses
from models.memory.base import Memory
from models.micro_batch import MicroBatch
from models.multimodal.columns import SCALE, Columns
from models.multimodal.objective import CrossModalObjective, Divergence, TermWeight
from models.norms import Kind, Place
from models.positions.base import Position
from models.ranges import Many, Positive, Range
from models.span import IMAGE, SOUND, Span

Side = Annotated[int, Range(1, 256)]


class Multimodal(Decoder):
    """Words, patches of images and frames of sounds as tokens of one decoder.

    The modality of a token is its role: TEXT is looked up in the embedding, the values of an IMAGE
    or a SOUND token are projected by a matrix each. What follows is a Decoder. While it is trained,
    its losses are those of CrossModalObjective; while it is evaluated, they are the losses of its
    answers.

    Args:
        vocabulary, width, mixers, feedforwards, position, tie_embeddings, init_std, norm, norm_eps,
            norm_place, embedding_scale, embedding_norm, logit_cap: see Decoder.
        memory: none; a request does not go on in the next row.
        patch: side of a patch, in pixels.
        frame: samples of a frame.
        text_weight, rendering_weight, consistency_weight, alignment_weight, alignment_layers,
            divergence, stop_gradient: see CrossModalObjective.

    Source: patches projected into a decoder are Fuyu's (Bavishi et al. 2023, blog) and ViT's
    (Dosovitskiy et al. 2021, arXiv:2010.11929); here frames of a sound are too.
    """

    reads_requests = True

    def __init__(
        self,
        vocabulary: int,
        width: int,
        mixers: Sequence[nn.Module],
        feedforwards: Sequence[nn.Module],
        *,
        position: Position | None = None,
        tie_embeddings: bool = False,
        init_std: float = INIT_STD,
        memory: Memory | None = None,
        norm: Kind = "rms",
        norm_eps: Positive | None = None,
        norm_place: Place = "before",
        embedding_scale: Positive = 1.0,
        embedding_norm: bool = False,
        logit_cap: Positive | None = None,
        patch: Side = 8,
        frame: Many = 32,
        text_weight: TermWeight = 1.0,
        rendering_weight: TermWeight = 1.0,
        consistency_weight: TermWeight = 1.0,
        alignment_weight: TermWeight = 1.0,
        alignment_layers: list[int] | None = None,
        divergence: Divergence = "reverse",
        stop_gradient: bool = True,
    ):
        super().__init__(
            vocabulary,
            width,
            mixers,
            feedforwards,
            position=position,
            tie_embeddings=tie_embeddings,
            init_std=init_std,
            norm=norm,
            norm_eps=norm_eps,
            norm_place=norm_place,
            embedding_scale=embedding_scale,
            embedding_norm=embedding_norm,
            logit_cap=logit_cap,
        )
        if memory is not None and type(memory) is not Memory:
            raise ValueError(
                "Multimodal takes no memory: a request does not go on in the next row; use"
                " memory=none"
            )
        self.pixels = patch * patch
        self.samples = frame
        self.image = nn.Linear(self.pixels, width)
        self.sound = nn.Linear(self.samples, width)
        self.objective = CrossModalObjective(
            text_weight=text_weight,
            rendering_weight=rendering_weight,
            consistency_weight=consistency_weight,
            alignment_weight=alignment_weight,
            alignment_layers=states_of(alignment_layers, len(self.blocks)),
            divergence=divergence,
            stop_gradient=stop_gradient,
        )

    def init_rules(self) -> dict[str, Rule]:
        """Starts the projections so that values of 1 give vectors as long as those of words."""
        rules = super().init_rules()
        for name, values in (("image", self.pixels), ("sound", self.samples)):
            rules[f"{name}.weight"] = ScaledNormal(values**-0.5)
        return rules

    def cut_in_time(self) -> str | None:
        """See Layer."""
        return "compares documents that lie in different pieces of a row"

    def decodes(self) -> str | None:
        """See Layer."""
        return "answers a request with one token, and writes no text"

    def columns(self, tokens: Tensor, span: Span) -> Columns:
        """Reads tokens [B, T, K], or makes an example of bare numbers [B, T]; see Columns.of."""
        return Columns.of(tokens, span, max(self.pixels, self.samples))

    def read(self, tokens: Tensor, span: Span) -> Tensor:
        """[B, T, K] int64 -> [B, T, width]: words looked up, patches and frames projected."""
        columns = self.columns(tokens, span)
        values = columns.values.to(self.image.weight.dtype) / SCALE
        role = span.role[..., None]
        vectors = torch.where(role == IMAGE, self.image(values[..., : self.pixels]), 0)
        vectors = torch.where(role == SOUND, self.sound(values[..., : self.samples]), vectors)
        is_word = (role != IMAGE) & (role != SOUND)
        return torch.where(is_word, self.embed(columns.word), vectors)

    def forward(self, batch: MicroBatch | Tensor) -> Tensor:
        """[B, T, K] int64 -> logits [B, T, vocabulary], or with targets the losses [B, T] in nats:
        of the answers (0 where IGNORE), and in training with the terms of the objective."""
        tokens, span, targets, _ = MicroBatch.of(batch)
        if targets is None or not self.training:
            hidden = self.hidden(tokens, span)
            if targets is None:
                return capped(self.head(hidden), self.logit_cap)
            return token_losses(hidden, self.head.weight, targets, cap=self.logit_cap)
        states = [self.embedded(tokens, span)]
        states += self.layer_outputs(states[0], span)
        aligned = [states[number] for number in self.objective.alignment_layers]
        return self.objective(
            self.norm(states[-1]),
            aligned,
            self.columns(tokens, span),
            span,
            targets,
            head=self.head.weight,
            cap=self.logit_cap,
        )


def states_of(chosen: list[int] | None, layers: int) -> list[int]:
    """Returns the numbers of the states that are chosen, all where None.

    Raises:
        ValueError: there is no such state.
    """
    if chosen is None:
        return list(range(layers + 1))
    for number in chosen:
        if not 0 <= number <= layers:
            raise ValueError(
                f"model.alignment_layers={chosen}: there is no state {number}; use 0, which the"
                f" first layer reads, to {layers}, which the last one gives"
            )
    return sorted(set(chosen))

"""Columns of numbers, of which a token of a request is made.

    0           number of the word; 0 for a patch or a frame
    1           part of the request: SHOWN where its object is shown, ASKED where the answer is due
    2           whether the document is the reference, with which others of the request are compared
    3, 4, ...   values of a patch or a frame, whole numbers up to SCALE; 0 for a word

Documents of one request follow one another in a row, the reference first. So the renderings of a
request are those from one reference up to the next.

Letters: B rows, T tokens, K columns.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from models.span import Span

WORD, PART, REFERENCE, FIRST_VALUE = range(4)
PLAIN, SHOWN, ASKED = range(3)
SCALE = 128  # a value of this size is 1 to a model


class Columns(NamedTuple):
    """The columns of some tokens.

    Attributes:
        word: [B, T] int64.
        part: [B, T] int64, PLAIN, SHOWN or ASKED.
        reference: [B, T] bool.
        values: [B, T, K - FIRST_VALUE] int64.
    """

    word: Tensor
    part: Tensor
    reference: Tensor
    values: Tensor

    @staticmethod
    def of(tokens: Tensor, span: Span, values: int) -> "Columns":
        """Reads the columns of tokens [B, T, K], or makes some for bare numbers [B, T].

        Of bare numbers every second document is a reference, its first token is asked for and the
        others are shown: an example for whoever examines a model without its data.

        Args:
            values: at least so many there must be.

        Raises:
            ValueError: there are fewer.
        """
        if tokens.dim() == 2:
            part = torch.where(span.opens(), ASKED, SHOWN)
            values_of = tokens[..., None] * torch.arange(1, values + 1, device=tokens.device)
            return Columns(
                tokens,
                torch.where(span.valid(), part, PLAIN),
                span.valid() & (span.doc % 2 == 0),
                values_of % SCALE,
            )
        given = tokens.shape[2] - FIRST_VALUE
        if given < values:
            raise ValueError(
                f"tokens bring {max(0, given)} values, and the model's patches and frames have up"
                f" to {values}; give the model and the data equal sizes (model.patch, model.frame)"
            )
        return Columns(
            tokens[..., WORD],
            tokens[..., PART],
            tokens[..., REFERENCE] == 1,
            tokens[..., FIRST_VALUE:],
        )

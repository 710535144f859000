"""What the layers of linear time compute, against counts made by hand."""

from math import log2

import pytest
import torch
from torch import nn

from models.convolution.hyena import Hyena
from models.convolution.short_conv import ShortConv
from models.cost.activation_memory import activation_bytes
from models.cost.flops import count_flops
from models.primitives.scan import Scan
from models.recurrent.delta import DeltaNet
from models.recurrent.linear import LinearAttention
from models.recurrent.mamba2 import Mamba2
from models.recurrent.retention import Retention
from models.recurrent.rwkv6 import Rwkv6
from models.span import Span
from tests.support.parity import packed

WIDTH, HEADS, HEAD = 12, 3, 4
LENGTHS = [[13, 1, 24, 9], [3, 40, 1, 1]]  # one row ends in padding
TOKENS = sum(map(sum, LENGTHS))


class Model(nn.Module):
    """An embedding and one layer."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.table, self.layer = nn.Embedding(7, WIDTH), layer

    def forward(self, batch):
        tokens, span, *_ = batch
        return self.layer(self.table(tokens), span)


def flops(layer):
    with torch.device("meta"):
        return count_flops(Model(layer()))


@pytest.mark.parametrize(
    "layer, weights, products",
    [
        (lambda: LinearAttention(WIDTH, HEADS), 4 * WIDTH**2, 2 * HEADS * HEAD * (HEAD + 1)),
        (lambda: Retention(WIDTH, HEADS), 8 * WIDTH**2, 2 * HEADS * HEAD * 2 * HEAD),
        (
            lambda: DeltaNet(WIDTH, HEADS),
            4 * WIDTH**2 + HEADS * WIDTH,
            4 * HEADS * HEAD**2 + 3 * 4 * WIDTH,
        ),
        (
            lambda: Mamba2(WIDTH, HEADS, state=5),
            (48 + 10 + 3) * WIDTH + 24 * WIDTH,
            2 * 24 * 5 + 4 * (24 + 10),
        ),
        (
            lambda: Rwkv6(WIDTH, HEADS, 0, 2, rank=2),
            5 * WIDTH**2 + 6 * 4 * WIDTH,
            2 * HEADS * HEAD**2 + 2 * WIDTH,
        ),
        (lambda: ShortConv(WIDTH, conv_kernel=5), 4 * WIDTH**2, 5 * WIDTH),
    ],
    ids=["linear", "retention", "delta", "mamba2", "rwkv6", "short_conv"],
)
def test_a_layer_of_linear_time_counts_its_weights_and_its_recurrence(layer, weights, products):
    found, span = flops(layer), packed(LENGTHS, 51)
    assert found.forward(span) == 2 * TOKENS * (weights + products)
    assert found.training(span) == 3 * found.forward(span)


def test_a_hyena_layer_counts_its_transforms_document_by_document_and_its_filter_once():
    found, span = (
        flops(lambda: Hyena(WIDTH, 60, order=3, conv_kernel=3, filter_width=5, bands=2)),
        packed(LENGTHS, 51),
    )
    tokens = 2 * TOKENS * (4 * WIDTH**2 + WIDTH**2 + 3 * 4 * WIDTH)
    filters = 2 * 60 * (5 * 5 + 5 * 5 + 5 * 2 * WIDTH)
    lengths = [n for row in LENGTHS for n in row]
    transforms = 2 * WIDTH * sum(round(15 * n * log2(2 * n) + 6 * n) for n in lengths)
    again = 2 * WIDTH * sum(round(15 * n * log2(2 * n) + 12 * n) for n in lengths)
    assert found.forward(span) == tokens + filters + transforms
    assert found.training(span) == 3 * (tokens + filters) + transforms + again


def test_products_with_matrices_that_are_no_weights_are_counted_where_a_module_names_them():
    class Featured(LinearAttention):
        multiply_adds = 77

    plain = flops(lambda: LinearAttention(WIDTH, HEADS))
    assert flops(lambda: Featured(WIDTH, HEADS)).token_flops == plain.token_flops + 2 * 77


def test_documents_of_a_single_token_are_counted():
    """A layer that takes no longer ones is traced with one token, not with two."""
    assert flops(lambda: Hyena(WIDTH, context_length=1)).forward(Span.line(1, 1)) > 0


def test_eight_times_the_row_is_eight_times_the_work_of_a_recurrence():
    found = flops(lambda: Retention(WIDTH, HEADS))
    assert found.training(Span.line(1, 800)) == 8 * found.training(Span.line(1, 100))


def test_a_scan_keeps_no_more_than_its_inputs_its_readers_and_its_states():
    """Per token: what Linear layers keep, q, k, v and the output; of chunks: reader [H, D], state
    and gain [D, E] / C."""

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = Scan()

        def forward(self, x, span):
            q, k, v = x.unflatten(-1, (3, 1, 4)).unbind(2)
            return self.mix((q,), (k, v, -q.exp()), span=span)

    with torch.device("meta"):
        kept = activation_bytes(Model(Bare()), 6400)
    few = 8 * 6400 + 4 * 6400 * (
        12 + 4 + 4 + 4 + 4 + 4 + 1
    )  # tokens, x, the four inputs of the scan, its reader, states / 64
    assert kept <= few

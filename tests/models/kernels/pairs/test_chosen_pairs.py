"""Attention over chosen pairs: what the tiles of the mask give, at a cost that follows pairs."""

import pytest
import torch

from models.attention.compressed import Compressed
from models.attention.lsh import LSHAttention
from models.init import initialise
from models.kernels import blockwise
from models.kernels.pairs import chosen_pairs, readings
from models.positions.rope import Rope
from models.span import Span

LAYERS = {
    "one_chunk": lambda: LSHAttention(8, 2, Rope(), 0, 5, 128, chunk_size=64, buckets=2),
    "lsh": lambda: LSHAttention(8, 2, Rope(), 0, 5, 128, chunk_size=4, hashes=3, buckets=4),
    "compressed": lambda: Compressed(8, 2, Rope(), block=3, top=4, window=5),
    "few_blocks": lambda: Compressed(8, 2, Rope(), block=4, top=99, window=3),
}


def _packed(first: int = 3) -> Span:
    """Documents of 70, 1 and 26 tokens and padding, and a row of one document."""
    pos = torch.cat([torch.arange(70), torch.arange(1), torch.arange(26), torch.zeros(3)]).long()
    doc = torch.tensor([first] * 70 + [first + 1] + [first + 2] * 26 + [-1] * 3)
    return Span.of(torch.stack([pos, torch.arange(100)]), torch.stack([doc, torch.full((100,), 7)]))


def _gradients(layer: torch.nn.Module, hidden: torch.Tensor, span: Span) -> list[torch.Tensor]:
    """Output at real tokens, and the gradients of the input and of all parameters."""
    hidden = hidden.clone().requires_grad_()
    layer.zero_grad()
    output = layer(hidden, span)[span.valid()]
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view_as(output)
    loss = (output * weight).sum()
    if isinstance(layer, Compressed):
        loss = loss + layer.auxiliary["indexer"][span.valid()].sum()
    loss.backward()
    return [output.detach(), hidden.grad, *(p.grad.clone() for p in layer.parameters())]


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("most", [64, 1 << 18])
def test_pairs_give_what_the_tiles_of_the_mask_give(name, most, monkeypatch):
    layer = initialise(LAYERS[name](), seed=0).double()
    for parameter in layer.parameters():
        parameter.data *= 6 if parameter.dim() > 1 else 1
    span = _packed()
    hidden = torch.randn(2, 100, 8, dtype=torch.float64)
    monkeypatch.setitem(readings.SCORES, "cpu", most)
    by_pairs = _gradients(layer, hidden, span)
    monkeypatch.setattr(blockwise.chosen_pairs, "chosen_blocks", lambda *args: None)
    by_tiles = _gradients(layer, hidden, span.fresh())
    for pairs, tiles in zip(by_pairs, by_tiles, strict=True):
        torch.testing.assert_close(pairs, tiles, rtol=0, atol=1e-11)


def test_numbers_of_chunks_beyond_those_of_float32():
    """Documents are counted over a corpus: buckets, documents and chunks make large numbers."""
    layer = initialise(LAYERS["lsh"](), seed=0).double()
    for parameter in layer.parameters():
        parameter.data *= 6
    layer.float()
    hidden = torch.randn(2, 100, 8)
    few = _gradients(layer, hidden, _packed())
    many = _gradients(layer, hidden, _packed(1 << 22))
    for a, b in zip(few, many, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["lsh", "compressed"])
def test_twice_the_tokens_are_twice_the_scores(name, monkeypatch):
    layer = initialise(LAYERS[name](), seed=0)
    scores = []
    found = chosen_pairs.chosen_blocks

    def counted(*args):
        for block in found(*args):
            scores[-1] += block.queries.numel() * block.keys.shape[1]
            yield block

    monkeypatch.setattr(blockwise.chosen_pairs, "chosen_blocks", counted)
    for tokens in (2048, 4096):
        scores.append(0)
        with torch.no_grad():
            layer(torch.randn(1, tokens, 8), Span.line(1, tokens))
    assert scores[1] < 2.2 * scores[0]
    assert scores[1] < 2 * 4096 * 300


@pytest.mark.parametrize(("name", "tolerance"), [("lsh", 0.25), ("compressed", 0)])
def test_flops_count_the_pairs_that_are_computed(name, tolerance, monkeypatch):
    """Compressed attention to a pair; LSH as if hashes spread tokens evenly, which they do not."""
    makers = {
        "lsh": lambda: LSHAttention(32, 2, Rope(), 0, 5, 512, chunk_size=64, hashes=3, buckets=16),
        "compressed": lambda: Compressed(32, 2, Rope(), block=3, top=30, window=20),
    }
    layer = initialise(makers[name](), seed=0)
    found = chosen_pairs.chosen_blocks
    computed = 0.0

    def counted(*args):
        nonlocal computed
        for block in found(*args):
            seen = torch.ones(()) if block.seen is None else block.seen
            real = torch.ones(()) if block.real is None else block.real[..., None]
            shape = (*block.queries.shape, block.keys.shape[1])
            computed += float((seen * real).expand(shape).double().sum())
            yield block

    monkeypatch.setattr(blockwise.chosen_pairs, "chosen_blocks", counted)
    pos = torch.cat([torch.arange(500), torch.arange(90), torch.zeros(10)]).long()
    span = Span.of(pos[None], torch.tensor([[3] * 500 + [4] * 90 + [-1] * 10]))
    with torch.no_grad():
        layer(torch.randn(1, 600, 32, generator=torch.Generator().manual_seed(1)), span)
    counter = layer.mix.score.pair_counter()
    assert 2 * counter(span) == pytest.approx(computed, rel=tolerance)


def test_a_number_that_is_not_finite_is_left_to_the_tiles():
    layer = initialise(LAYERS["lsh"](), seed=0).double()
    span = _packed()
    hidden = torch.randn(2, 100, 8, dtype=torch.float64)
    before = layer(hidden, span)
    hidden[0, :70] = torch.nan
    after = layer(hidden, span)
    torch.testing.assert_close(after[0, 70:97], before[0, 70:97], rtol=0, atol=1e-14)
    assert after[0, :70].isnan().all()

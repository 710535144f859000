"""The quantised cache holds what KIVI holds, in the bytes of its formula, row by row."""

import pytest
import torch

from models.attention.full import Attention
from models.attention.latent import LatentAttention
from models.cache.contiguous import Contiguous
from models.cache.decoding_state import DecodingState
from models.cache.quantized import QuantizedCache, QuantizedKV
from models.cache.quantizer import CHANNELS, TOKENS, Quantizer
from models.positions.alibi import Alibi
from models.positions.rope import Rope
from models.positions.yarn import Yarn
from models.recurrent.linear import LinearAttention
from models.span import Span
from tests.models.cache.eviction.test_eviction_in_models import Two, decoded, error, made
from tests.support.pieces import addresses, cut, piece_span, put, taken

WIDTH, HEADS, GROUPS, HEAD = 32, 4, 2, 8
GROUP, RESIDUAL = 4, 8


def settings(**more):
    return QuantizedKV(**{"group": GROUP, "residual": RESIDUAL, **more})


def pair(tokens, rows=1):
    generator = torch.Generator().manual_seed(tokens)
    shape = rows, tokens, GROUPS, HEAD
    key = torch.randn(shape, generator=generator, dtype=torch.float64)
    return key, torch.randn(shape, generator=generator, dtype=torch.float64)


def mixer(position=None):
    return made(Attention(WIDTH, HEADS, GROUPS, position or Rope()))


@pytest.mark.parametrize("cuts", [[29], [1] * 29, [5, 1, 1, 13, 9]])
def test_keys_become_codes_by_the_residual_and_values_one_by_one(cuts):
    """What is held does not depend on how the text came; 29 tokens: 24 keys and 21 values."""
    key, value = pair(29)
    cache = QuantizedCache(settings(key_bits=2, value_bits=4), None)
    span = Span.line(1, 29)
    start = 0
    for tokens in cuts:
        part = slice(start, start + tokens)
        cache.append((key[:, part], value[:, part]), span.map(lambda x, part=part: x[:, part]))
        start += tokens
    (held_key, held_value), held_span = cache.read()
    assert torch.equal(held_span.pos, span.pos)
    per_channel = Quantizer(2, TOKENS, GROUP)
    per_token = Quantizer(4, CHANNELS, GROUP)
    old_key = per_channel.dequantize(per_channel.quantize(key[:, :24]))
    old_value = per_token.dequantize(per_token.quantize(value[:, :21]))
    assert torch.equal(held_key, torch.cat([old_key, key[:, 24:]], 1))
    assert torch.equal(held_value, torch.cat([old_value, value[:, 21:]], 1))
    full = GROUPS * HEAD * 8
    formula = per_channel.bytes(key[:, :24].shape, 8) + per_token.bytes(value[:, :21].shape, 8)
    assert cache.bytes() == formula + (5 + 8) * full


@torch.no_grad()
def test_rows_of_uneven_length_are_quantised_as_if_each_were_alone():
    model = mixer()
    span = addresses(((30,), (17,), (25,)))
    x = torch.randn(*span.shape, WIDTH, dtype=torch.float64)
    first = ((9, 3), (12, 2), (4, 4))
    factory = settings(key_bits=2, value_bits=2)
    y, _ = decoded(model, x, span, factory, first)
    for row, length in enumerate((30, 17, 25)):
        alone = Span.line(1, length)
        y_alone, _ = decoded(model, x[row : row + 1, :length], alone, factory, (first[row],))
        assert error(y[row : row + 1, :length], y_alone, alone) < 1e-12
    exact, _ = decoded(model, x, span, Contiguous(), first)
    assert error(y, exact, span) > 1e-3


@pytest.mark.parametrize("position", [Rope(), Yarn(4.0, 64)])
@torch.no_grad()
def test_bits_order_the_error_and_keys_may_be_unrotated(position):
    model = mixer(position)
    span = addresses(((40,), (33,)))
    x = torch.randn(*span.shape, WIDTH, dtype=torch.float64)
    exact, _ = decoded(model, x, span, Contiguous())
    for before in (False, True):
        errors = []
        for bits in (8, 4, 2):
            factory = settings(key_bits=bits, value_bits=bits, before_rotation=before)
            y, _ = decoded(model, x, span, factory)
            errors.append(error(y, exact, span))
        assert 0 < errors[0] < 0.02
        assert errors[0] < errors[1] / 4 < errors[2] / 8


def test_before_the_rotation_codes_are_of_keys_without_it():
    model = mixer()
    factory = settings(key_bits=2, before_rotation=True)
    factory.prepare(model)
    cache = factory.create("mix", model.mix.mask, None)
    key, value = pair(16)
    span = Span.line(1, 16).map(lambda pos: pos)
    span = Span.of(span.pos + 500, span.doc)
    cache.append((model.position.rotate(key, span), value), span)
    per_channel = Quantizer(2, TOKENS, GROUP)
    expected = per_channel.dequantize(per_channel.quantize(key))
    (held, _), _ = cache.read()
    assert torch.allclose(held, model.position.rotate(expected, span), atol=1e-9)


@torch.no_grad()
def test_rows_leave_join_and_are_carried_elsewhere():
    model = mixer()
    span = addresses(((30,), (17,), (22,)))
    x = torch.randn(*span.shape, WIDTH, dtype=torch.float64)
    first = ((9, 3), (12, 2), (4, 4))
    factory = settings(key_bits=2, value_bits=2)
    truth, whole = decoded(model, x, span, factory, first)
    parts = [(DecodingState(factory), [2, 0]), (DecodingState(factory), [1])]
    y = torch.full_like(x, torch.nan)
    for number, index in enumerate(cut(span, first)):
        if number == 5:
            (state, _), (other, _) = parts
            state.join(other)
            moved = DecodingState(factory)
            moved.import_state(state.export_state())
            moved.select(torch.tensor([1, 2, 0]))
            parts = [(moved, [0, 1, 2])]
        for state, rows in parts:
            piece = index[rows]
            here_span = span.map(lambda tensor, rows=rows: tensor[rows])
            part = model(
                taken(x[rows], piece, torch.nan), state.attach(piece_span(here_span, piece))
            )
            state.advance()
            here = y[rows]
            put(here, piece, part)
            y[rows] = here
    assert error(y, truth, span) < 1e-12
    assert parts[0][0].bytes() == whole.bytes()


@pytest.mark.parametrize(
    ("factory", "model", "words"),
    [
        (settings(), LatentAttention(WIDTH, HEADS, Rope()), "mixer.mix holds latents"),
        (settings(), LinearAttention(WIDTH, HEADS), "no layer of this model holds any"),
        (
            settings(before_rotation=True),
            Attention(WIDTH, HEADS, GROUPS, Alibi()),
            "cache.before_rotation=true: the keys of mixer.mix are not rotated",
        ),
        (
            settings(group=16, residual=16),
            Attention(WIDTH, HEADS, GROUPS, Rope()),
            "cache.group=16 does not divide a head of 8 channels",
        ),
    ],
)
def test_models_that_it_does_not_fit_are_refused(factory, model, words):
    (sentence,) = factory.misfits(Two(model))
    assert words in sentence and "; use " in sentence


def test_settings_without_meaning_are_refused():
    with pytest.raises(ValueError, match=r"cache\.residual=6 .* no whole groups"):
        settings(residual=6)
    with pytest.raises(ValueError, match=r"cache\.keys=head is unknown"):
        settings(keys="head")
    assert not settings(keys="token", residual=6).misfits(
        Two(Attention(WIDTH, HEADS, GROUPS, Rope()))
    )

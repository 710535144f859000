"""Codes and scales are KIVI's; bytes are the formula's; outlier channels want keys per channel."""

import pytest
import torch

from models.cache.quantizer import CHANNELS, TOKENS, Quantizer

BITS = (2, 4, 8)


def numbers(tokens=16, heads=2, width=8, rows=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, tokens, heads, width, generator=generator, dtype=dtype)


def spelled_out(group, bits):
    """KIVI's equations for one group, number by number: (codes, scale, minimum)."""
    low = min(group)
    high = max(group)
    scale = (high - low) / (2**bits - 1)
    codes = [min(max(round((x - low) / scale), 0), 2**bits - 1) for x in group]
    return codes, scale, low


def packed_into_words(codes, bits):
    """32 / bits codes in a word, the first in the lowest bits, as in their kernels."""
    words = []
    per_word = 32 // bits
    for start in range(0, len(codes), per_word):
        word = 0
        for place, code in enumerate(codes[start : start + per_word]):
            word |= code << (place * bits)
        words.append(word)
    return words


@pytest.mark.parametrize("bits", BITS)
def test_keys_are_quantised_per_channel_over_groups_of_tokens(bits):
    keys = numbers(tokens=32)
    group = 16
    found = Quantizer(bits, TOKENS, group).quantize(keys)
    words = found.codes.contiguous().view(torch.int32).to(torch.int64) % 2**32
    for row, block, head, channel in [(0, 0, 0, 0), (1, 1, 1, 7), (0, 1, 1, 3)]:
        tokens = keys[row, block * group : (block + 1) * group, head, channel].tolist()
        codes, scale, low = spelled_out(tokens, bits)
        here = row, block, head, channel
        assert words[here].tolist() == packed_into_words(codes, bits)
        assert found.scale[here].item() == pytest.approx(scale, rel=1e-15)
        assert found.minimum[here].item() == low


@pytest.mark.parametrize("bits", BITS)
def test_values_are_quantised_per_token_over_groups_of_channels(bits):
    values = numbers(width=32)
    group = 16
    found = Quantizer(bits, CHANNELS, group).quantize(values)
    words = found.codes.contiguous().view(torch.int32).to(torch.int64) % 2**32
    for row, token, head, block in [(0, 0, 0, 0), (1, 15, 1, 1), (0, 3, 1, 0)]:
        channels = values[row, token, head, block * group : (block + 1) * group].tolist()
        codes, scale, low = spelled_out(channels, bits)
        here = row, token, head, block
        assert words[here].tolist() == packed_into_words(codes, bits)
        assert found.scale[here].item() == pytest.approx(scale, rel=1e-15)
        assert found.minimum[here].item() == low


@pytest.mark.every_case
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("along", "group"), [(TOKENS, 8), (CHANNELS, 4), (CHANNELS, None)])
def test_no_number_moves_by_more_than_half_a_step(bits, along, group):
    given = numbers()
    quantizer = Quantizer(bits, along, group)
    found = quantizer.quantize(given)
    returned = quantizer.dequantize(found)
    assert returned.shape == given.shape
    if along == TOKENS:
        step = found.scale.repeat_interleave(group, 1)
    else:
        step = found.scale.repeat_interleave(group or given.shape[-1], -1)
    assert ((returned - given).abs() <= step / 2 * (1 + 1e-9)).all()
    assert (returned != given).any()


@pytest.mark.every_case
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("along", "group"), [(TOKENS, 8), (CHANNELS, 4), (CHANNELS, None)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_bytes_equal_the_formula(bits, along, group, dtype):
    given = numbers(dtype=dtype)
    quantizer = Quantizer(bits, along, group)
    found = quantizer.quantize(given)
    held = sum(part.untyped_storage().nbytes() for part in found)
    assert found.bytes() == held
    assert quantizer.bytes(given.shape, given.element_size()) == held


def test_a_group_of_equal_numbers_returns_exactly():
    given = torch.full((1, 8, 1, 4), 0.1)
    for quantizer in (Quantizer(2, TOKENS, 8), Quantizer(4, CHANNELS, None)):
        assert torch.equal(quantizer.dequantize(quantizer.quantize(given)), given)


def test_padding_does_not_shape_a_group():
    given = numbers()
    valid = torch.rand(given.shape[:2], generator=torch.Generator().manual_seed(1)) < 0.6
    valid[1, 8:] = False
    spoiled = torch.where(valid[..., None, None], given, 1e6)
    quantizer = Quantizer(4, TOKENS, 8)
    found = quantizer.quantize(spoiled, valid)
    returned = quantizer.dequantize(found)
    assert ((returned - given).abs()[valid] < found.scale.max()).all()
    assert found.scale.max() < 1
    assert returned.isfinite().all()


def test_outlier_channels_cost_keys_per_token_several_times_the_error():
    """The layer that KIVI describes: one channel of a head is large for every token."""
    keys = numbers(tokens=64, width=32)
    keys[..., 5] = keys[..., 5] + 30
    error = {}
    for name, quantizer in (
        ("channel", Quantizer(2, TOKENS, 32)),
        ("token", Quantizer(2, CHANNELS, 32)),
    ):
        returned = quantizer.dequantize(quantizer.quantize(keys))
        error[name] = (returned - keys).square().mean().sqrt().item()
    assert error["channel"] < 0.5
    assert error["token"] > 5 * error["channel"]


def test_settings_that_fill_no_bytes_are_refused():
    with pytest.raises(ValueError, match="3 bits cannot be packed"):
        Quantizer(3, TOKENS, 32)
    with pytest.raises(ValueError, match=r"cache\.group=3 numbers of 2 bits do not fill bytes"):
        Quantizer(2, TOKENS, 3)
    with pytest.raises(ValueError, match="does not divide a head of 12 channels"):
        Quantizer(4, CHANNELS, 8).check(12)
    with pytest.raises(ValueError, match="a group of tokens needs a number"):
        Quantizer(4, TOKENS, None)

"""What texts will hold is compared with the memory at hand before the first token."""

import pytest
import torch

from models.cache.contiguous import Contiguous
from models.cache.eviction.h2o import H2O
from models.cache.paged import Paged
from models.cache.quantized import QuantizedKV
from models.masks.basic import Causal, FirstTokens, SameDocument, SlidingWindow
from models.masks.roles import GlobalKey
from tests.support.decoders import built
from trainer.decoding import room
from trainer.decoding.room import check_room, measured, tokens_held
from trainer.decoding.token_decoder import TokenDecoder


@pytest.mark.parametrize("name", ["full", "hybrid", "ntm"])
def test_the_need_is_what_is_held(name):
    model = built(name)
    cost = measured(model)
    for tokens in (7, 40):
        decoder = TokenDecoder(model, Contiguous(block=1))
        decoder.feed([[1] * tokens])
        held = decoder.bytes()
        need = cost.bytes(tokens, Contiguous())
        # A window holds more than a later query sees until slots are needed.
        assert need == held if name != "hybrid" else need <= held


@pytest.mark.parametrize("tokens", [1000, 10**13])
def test_a_text_of_any_length_is_measured(tokens):
    causal = Causal() & SameDocument()
    assert tokens_held(causal, tokens) == tokens
    assert tokens_held(causal & SlidingWindow(64), tokens) == 63
    assert tokens_held(causal & (SlidingWindow(64) | FirstTokens(4)), tokens) == 67


def test_what_cannot_be_decided_counts():
    sparse = Causal() & SameDocument() & (SlidingWindow(64) | GlobalKey(every=16))
    assert tokens_held(sparse, 1024) == 63 + (1024 - 64) // 16 + 1
    assert 10**9 // 16 <= tokens_held(sparse, 10**9) <= 10**9


def test_the_number_that_fits_fits():
    model = built("full")
    each = measured(model).bytes(1, Contiguous())
    free = 2 * 50 * each
    check_room(model, Contiguous(), [50, 50, 50], 2, free=free)
    with pytest.raises(ValueError, match=r"2 texts of up to 51 tokens .* 50 tokens of each would"):
        check_room(model, Contiguous(), [51, 3, 51], 2, free=free)
    # Of three ranks each holds a third.
    check_room(model, Contiguous(), [150, 150], 2, free=free, ranks=3)


@pytest.mark.parametrize(
    "cache", [H2O(20), QuantizedKV(4, 4, group=4, residual=4), Paged(4), Paged(4, pages=2)]
)
def test_what_holds_less_is_not_refused(cache):
    model = built("full").float()
    free = 50 * measured(model).bytes(1, Contiguous())
    check_room(model, cache, [51], 1, free=free)


def test_free_memory_is_looked_up(monkeypatch):
    assert room.memory_at_hand(torch.device("cpu")) > 0
    monkeypatch.setattr(room, "memory_at_hand", lambda device: 10)
    with pytest.raises(ValueError, match="0 tokens of each would fit"):
        check_room(built("full"), Contiguous(), [2], 1)


def test_a_container_has_less(tmp_path, monkeypatch):
    monkeypatch.setattr(room, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    assert room.memory_at_hand(torch.device("cpu")) == 600
    (tmp_path / "memory.max").write_text("max\n")
    assert room.memory_at_hand(torch.device("cpu")) > 10_000

"""Texts are written on a device beside the host as on the host; see tests/support/card.py."""

from collections import Counter
from unittest import mock

import pytest
import torch
from torch.autograd.grad_mode import inference_mode

import longspan
from tests.support import card
from tests.support.card import card_pool, the_card
from trainer.config.groups import choices

COMMON = ("model.width=32", "model.layers=2", "data=stdlib")
HEADS = "model.heads=2"
PROMPTS = ["hello world, this is a test", "ab", "the quick brown fox jumps over"]
TOKENS = 12
CASES = {
    "cache": ("model=full", HEADS),
    "pages": ("model=full", "cache=paged", HEADS),
    "eviction": ("model=full", "cache=h2o", HEADS),
    "states": ("mixer=rwkv7",),
    "memory": ("model=full", "memory=segments", HEADS),
}
WITHOUT_HEADS = ["hyena", "mamba2", "short_conv", "rwkv6", "rwkv7"]
# One sees what comes later; others ask for longer prompts than these.
OTHERS = ("bidirectional", "compressed", "prefix")


def written(env, words, on_card):
    """Texts and logits of a model, and by place how often the device was waited for."""
    model = longspan.build([*COMMON, *words])
    model.module.double()
    if on_card:
        model.to(the_card())
    card.waits.clear()
    # Views of what is computed in inference mode cannot be made of tensors around others.
    plain = torch.no_grad
    with (
        mock.patch.object(inference_mode, "__enter__", lambda self: plain().__enter__()),
        mock.patch.object(inference_mode, "__exit__", lambda self, *error: None),
        torch.no_grad(),
    ):
        texts = model.generate_many(PROMPTS, tokens=TOKENS, seed=1)
        waits = Counter(wait.where for wait in card.waits)
        logits = model.logits(model.encode("hello there"))
    return texts, logits.cpu(), waits


@pytest.fixture(scope="module")
def pool():
    with card_pool(1) as run:
        yield run


def compare(pool, words):
    [(texts, logits, waits)] = pool(written, words, True)
    [(expected, on_host, none)] = pool(written, words, False)
    assert texts == expected and all(texts)
    torch.testing.assert_close(logits, on_host, rtol=0, atol=1e-12)
    assert waits["trainer/decoding/scheduler.py _drawn"] == TOKENS and not none
    return waits


@pytest.mark.parametrize("case", CASES)
def test_texts_are_written_beside_the_host_as_on_it(case, pool):
    waits = compare(pool, CASES[case])
    # Where a token goes is worked out on the host.
    assert not [place for place in waits if place.startswith("models/cache/slots.py _place")]


def test_a_recurrent_state_waits_for_the_drawn_tokens_alone(pool):
    assert set(compare(pool, ("mixer=retention", HEADS))) == {
        "trainer/decoding/scheduler.py _drawn",
    }


@pytest.mark.full
@pytest.mark.parametrize("name", [name for name in choices("mixer") if name not in OTHERS])
def test_every_mixer_writes_beside_the_host(name, pool):
    compare(pool, (f"mixer={name}", *(() if name in WITHOUT_HEADS else (HEADS,))))


@pytest.mark.full
@pytest.mark.parametrize(
    "words",
    [f"cache={name}" for name in choices("cache") if name != "quantized"]
    + [f"position={name}" for name in choices("position")]
    + [f"memory={name}" for name in choices("memory")]
    + ["cache=quantized cache.group=16"],
)
def test_every_cache_position_and_memory_writes_beside_the_host(words, pool):
    compare(pool, ("model=full", HEADS, *words.split()))

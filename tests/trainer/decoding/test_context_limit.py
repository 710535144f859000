"""Texts that reach the end of their context, several at a time."""

import pytest
import torch

from models.cache.eviction.h2o import H2O
from models.cache.overflow import ContextFull, policy_of
from models.cache.paged import Paged
from tests.models.cache.test_overflow import MIXERS, small
from trainer.decoding.context_limit import ContextLimit
from trainer.decoding.scheduler import LENGTH, LIMIT, Scheduler, TextRequest
from trainer.decoding.token_decoder import TokenDecoder

PROMPTS = ([1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [2, 2])
LIMIT_TOKENS = 16


def texts(model, name, count, prompts=PROMPTS, cache=None):
    """The requests after all of them ran, and the largest context that was held."""
    limit = ContextLimit(policy_of(name), LIMIT_TOKENS)
    scheduler = Scheduler(model, cache, rows=2, limit=limit)
    requests = [TextRequest(prompt, count) for prompt in prompts]
    for request in requests:
        scheduler.submit(request)
    longest = 0
    while scheduler.busy():
        scheduler.step()
        if scheduler.decoder is not None:
            longest = max(longest, *scheduler.decoder.lengths)
    return requests, longest


@pytest.mark.parametrize("name", ["shift", "recompute"])
@torch.no_grad()
def test_ten_times_the_context_beside_others_is_as_alone(name):
    model = small(MIXERS["rope"])
    together, longest = texts(model, name, 10 * LIMIT_TOKENS)
    assert longest <= LIMIT_TOKENS
    for request in together:
        assert request.finished == LENGTH and len(request.tokens) == 10 * LIMIT_TOKENS
        (alone,), _ = texts(model, name, 10 * LIMIT_TOKENS, [request.prompt])
        assert alone.tokens == request.tokens
        assert len(request.context) <= LIMIT_TOKENS + 1


@torch.no_grad()
def test_what_was_read_again_is_a_fresh_prompt():
    model = small(MIXERS["rope"])
    contexts = [[*range(1, 11), 1, 2, 3, 4, 5, 6], [3, 1, 4]]
    decoder = TokenDecoder(model)
    decoder.feed([context[:-1] for context in contexts])
    limit = ContextLimit(policy_of("recompute", 2), LIMIT_TOKENS)
    decoder = limit.make_room(decoder, contexts, lambda: TokenDecoder(model))
    assert contexts == [[1, 2, 10, 1, 2, 3, 4, 5, 6], [3, 1, 4]]
    logits = decoder.feed([context[-1:] for context in contexts])
    fresh = TokenDecoder(model).feed(contexts)
    assert torch.allclose(logits, fresh, atol=1e-12)


@torch.no_grad()
def test_stop_and_raise_at_the_limit():
    model = small(MIXERS["rope"])
    stopped, _ = texts(model, "stop", 100)
    for request in stopped:
        assert request.finished == LIMIT
        assert len(request.prompt) + len(request.tokens) == LIMIT_TOKENS
    with pytest.raises(ContextFull, match="overflow=raise: the text has reached the limit of 16"):
        texts(model, "raise", 100)


@torch.no_grad()
def test_long_prompts_and_what_has_no_meaning():
    model = small(MIXERS["rope"])
    long = list(range(1, 10)) * 4
    (request,), _ = texts(model, "truncate_middle", 4, [long])
    assert request.context[:12] == [*long[:4], *long[-8:]]
    with pytest.raises(ContextFull, match="the prompt has 36 tokens"):
        texts(model, "stop", 4, [long])
    with pytest.raises(ValueError, match="overflow=shift turns cached keys, but H2O"):
        texts(model, "shift", 4, cache=H2O(8))
    with pytest.raises(ValueError, match="context=3 tokens cannot be cut"):
        ContextLimit(policy_of("shift"), 3)


@torch.no_grad()
def test_samples_and_common_beginnings_share_pages_in_a_scheduler():
    model = small(MIXERS["rope"])
    factory = Paged(4)
    scheduler = Scheduler(model, factory, rows=4)
    prompt = [1, 2, 3, 4, 5, 6, 7, 8, 9]
    requests = [TextRequest(prompt, 6) for _ in range(3)] + [TextRequest([*prompt, 10], 6)]
    plain = [TextRequest(list(request.prompt), 6) for request in requests]
    for request in requests:
        scheduler.submit(request)
    scheduler.step()
    # each layer: two full pages of the prompt in common, and a last page for each of four rows
    assert scheduler.decoder.state.counters() == {"pages": 12, "pages_shared": 4}
    while scheduler.busy():
        scheduler.step()
    exact = Scheduler(model, rows=4)
    for request in plain:
        exact.submit(request)
    while exact.busy():
        exact.step()
    assert [each.tokens for each in requests] == [each.tokens for each in plain]

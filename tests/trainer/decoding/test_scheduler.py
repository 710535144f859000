"""Texts of requests that join and leave equal texts that are made from scratch, token by token."""

from typing import Any

import pytest
import torch

from models.micro_batch import MicroBatch
from models.span import Span
from parallel.collectives import Communicator
from parallel.context_parallel import apply_context_parallel
from tests.support.decoders import WORDS, built, stack
from tests.support.pool import ranks
from tests.variants import VARIANTS
from trainer.decoding.sampling import Sampling, choose, uniform
from trainer.decoding.scheduler import END, LENGTH, STOP, Scheduler, TextRequest
from trainer.decoding.token_decoder import TokenDecoder

WARM = Sampling(temperature=1.3, top_k=9, repetition_penalty=1.1)
PROMPTS = ([3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9], [3], [2, 3, 8])


@torch.no_grad()
def spelled(model, request):
    """The text, each token from a pass over all tokens before it."""
    tokens = []
    while len(tokens) < request.count:
        row = [*request.prompt, *tokens]
        logits = model(MicroBatch(torch.tensor([row]), Span.line(1, len(row))))[0, -1]
        token = choose(logits, request.sampling, row, uniform(*request.seed, len(tokens)))
        if token == request.end:
            return tokens, END
        tokens.append(token)
        if request.stop is not None and request.stop(tokens):
            return tokens, STOP
    return tokens, LENGTH


def requests():
    made = []
    for number, prompt in enumerate(PROMPTS):
        made.append(
            TextRequest(
                prompt,
                (4, 11, 7, 9, 1)[number],
                WARM,
                seed=(7, number),
                end=None if number else 0,
                stop=(lambda tokens: tokens[-1] == 5) if number == 3 else None,
            )
        )
    return made


@pytest.mark.parametrize("name", ["full", "hybrid", "memory_tokens", "ntm", "hybrid_convolutions"])
def test_requests_join_and_leave(name):
    model = built(name)
    scheduler = Scheduler(model, rows=2)
    asked = requests()
    for request in asked[:4]:
        scheduler.submit(request)
    scheduler.step()
    scheduler.submit(asked[4])
    assert len(list(scheduler.run())) == sum(len(r.tokens) for r in asked) - _first_step(asked)
    for request in asked:
        tokens, finished = spelled(model, request)
        assert (request.tokens, request.finished) == (tokens, finished)
    assert not scheduler.busy() and scheduler.decoder is None


def _first_step(asked):
    # What the first step gave, and the ends that came without a token.
    return 2 - sum(request.finished == END for request in asked)


def test_samples_of_one_prompt_read_it_once_and_differ():
    model = built("full")
    passes = []
    model.register_forward_hook(lambda module, args, out: passes.append(args[0].tokens.shape))
    scheduler = Scheduler(model, rows=4)
    asked = [TextRequest(PROMPTS[0], 8, WARM, seed=(1, sample)) for sample in range(4)]
    for request in asked:
        scheduler.submit(request)
    list(scheduler.run())
    assert passes[0] == (1, 5) and passes[1] == (4, 1)
    assert len({tuple(request.tokens) for request in asked}) == 4
    for request in asked:
        assert request.tokens == spelled(model, request)[0]


def in_rank(env, name, policy):
    model = built(name)
    apply_context_parallel(model, env.group, "ring")
    scheduler = Scheduler(model, rows=2, communicator=Communicator(env.group), policy=policy)
    asked = requests()
    for request in asked:
        scheduler.submit(request)
    list(scheduler.run())
    return [(request.tokens, request.finished) for request in asked]


@pytest.mark.parametrize("policy", [None, "zigzag"])
def test_texts_are_the_same_on_any_ranks(policy):
    for name in ("hybrid", "lstm"):
        wanted = [spelled(built(name), request) for request in requests()]
        for found in ranks(3, in_rank, name, policy):
            assert found == wanted


@pytest.mark.parametrize(
    ("prompts", "words"),
    [([[]], "has no token"), ([[1] * 65], "takes 64")],
)
def test_prompts_that_cannot_be_read_are_refused(prompts, words):
    inner: Any = VARIANTS["learned"]()
    model: Any = stack([inner.inner], position=None)
    model.position = inner.position
    with pytest.raises(ValueError, match=words):
        TokenDecoder(model).feed(prompts)


def test_what_cannot_decode_is_refused_before_any_request():
    with pytest.raises(ValueError, match="sees later tokens"):
        Scheduler(stack([VARIANTS["bidirectional"]()]))


def test_a_prefix_comes_whole():
    decoder = TokenDecoder(stack([VARIANTS["prefix"]()]))
    with pytest.raises(ValueError, match="first 5 of a document"):
        decoder.feed([[1, 2, 3, 4, 5], [1, 2]])
    assert decoder.feed([[1, 2, 3, 4, 5]]).shape == (1, WORDS)

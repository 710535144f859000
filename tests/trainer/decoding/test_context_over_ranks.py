"""Texts at the end of their context over ranks are read again, as on one device."""

import torch

import parallel.decoding_state as sharded
from models.cache.overflow import policy_of
from parallel.collectives import Communicator
from parallel.context_parallel import apply_context_parallel
from tests.models.cache.test_overflow import MIXERS, small
from tests.support.pool import ranks
from trainer.decoding.context_limit import ContextLimit
from trainer.decoding.scheduler import Scheduler, TextRequest

PROMPTS = ([1, 2, 3], [4, 5, 6, 7, 8, 9, 10], [2, 2])
TOKENS = 16


def texts(model, name, **places):
    limit = ContextLimit(policy_of(name, 2), TOKENS)
    scheduler = Scheduler(model, rows=2, limit=limit, **places)
    requests = [TextRequest(prompt, 2 * TOKENS) for prompt in PROMPTS]
    for request in requests:
        scheduler.submit(request)
    list(scheduler.run())
    return [request.tokens for request in requests]


@torch.no_grad()
def in_rank(env, name):
    sharded.OWNED = 3
    model = small(MIXERS["rope"])
    wanted = texts(model, name)
    apply_context_parallel(model, env.group, "ring")
    found = texts(model, name, communicator=Communicator(env.group), policy="zigzag")
    return found, wanted


def test_a_second_reading_is_that_of_one_device():
    for found, wanted in ranks(3, in_rank, "recompute"):
        assert found == wanted
        assert len(set(map(tuple, found))) > 1

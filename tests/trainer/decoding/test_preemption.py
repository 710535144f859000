"""Where the pool of pages is full, rows wait by themselves and end in the tokens of a large one."""

import pytest

from models.cache.paged import Paged
from parallel.collectives import Communicator
from parallel.context_parallel import apply_context_parallel
from tests.support.decoders import built
from tests.support.pool import ranks
from trainer.decoding.sampling import Sampling
from trainer.decoding.scheduler import Scheduler, TextRequest

PROMPTS = ([3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9], [9, 2])
WARM = Sampling(temperature=1.3, top_k=9)


def texts(scheduler: Scheduler) -> list[list[int]]:
    requests = [TextRequest(p, 14, WARM, seed=(3, n)) for n, p in enumerate(PROMPTS)]
    for request in requests:
        scheduler.submit(request)
    list(scheduler.run())
    return [request.tokens for request in requests]


@pytest.mark.parametrize("preempt", ["recompute", "swap"])
@pytest.mark.parametrize("name", ["full", "hybrid"])
def test_a_small_pool_gives_the_same_texts(name, preempt):
    model = built(name)
    wanted = texts(Scheduler(model, Paged(2), rows=4))
    # The longest text fills 11 pages of 2 tokens; all four would want 37.
    cache = Paged(2, pages=14)
    scheduler = Scheduler(model, cache, rows=4, preempt=preempt)
    assert texts(scheduler) == wanted
    assert scheduler.counters["preempted"] > 1
    assert not scheduler._aside
    assert cache.admits([27]) and not cache.admits([28])  # every page is free again


def test_what_never_fits_is_said():
    model = built("full")
    scheduler = Scheduler(model, Paged(2, pages=4))
    scheduler.submit(TextRequest([1] * 9, 2))
    with pytest.raises(ValueError, match=r"no room for 9 tokens and the next one.*cache\.pages"):
        scheduler.step()
    scheduler = Scheduler(model, Paged(2, pages=4))
    scheduler.submit(TextRequest([1] * 3, 9))
    with pytest.raises(ValueError, match=r"full at 9 tokens of one text.*cache\.pages"):
        list(scheduler.run())


def test_a_bad_word_is_refused():
    with pytest.raises(ValueError, match="preempt=drop: choose one of recompute, swap"):
        Scheduler(built("full"), preempt="drop")


def _over_ranks(env):
    model = built("full")
    apply_context_parallel(model, env.group, "ring")
    communicator = Communicator(env.group)
    with pytest.raises(ValueError, match="preempt=swap"):
        Scheduler(model, communicator=communicator, preempt="swap")
    settings = {"rows": 4, "communicator": communicator, "policy": "zigzag"}
    wanted = texts(Scheduler(model, Paged(2), **settings))
    # Neighbours of 64 tokens lie on one rank, so the first holds all that is generated.
    scheduler = Scheduler(model, Paged(2, pages=14), **settings)
    assert texts(scheduler) == wanted
    return scheduler.counters["preempted"]


def test_ranks_put_the_same_rows_aside():
    preempted = ranks(3, _over_ranks)
    assert preempted[0] > 0
    assert len(set(preempted)) == 1

"""Measures what paged and contiguous caches waste on one mix of requests in the same memory.

Requests arrive at once and are served as memory allows; at every step each running one gains a
token. A contiguous cache reserves the limit for each request; a paged one takes pages as it fills
them, and where none is left the youngest request gives its pages back and is computed again later.
Bookkeeping alone is run: no model, no tensors.

The mix: log-normal lengths, mean 161 tokens of a prompt and 338 of an answer, which are the means
that Kwon et al. 2023 (arXiv:2309.06180) give for ShareGPT, cut at the limit.
"""

import math
import random
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from models.cache.paged_pool import PagePool, PoolFull
from scripts.benchmarks.attention import parse_into

PROMPT_MEAN = 161
ANSWER_MEAN = 338
SPREAD = 1.0  # deviation of the logarithm of a length


@dataclass(frozen=True)
class CacheSizes:
    """Settings of the benchmark; every field is a word `key=value` of the command."""

    requests: int = 300
    limit: int = 2048
    memory: int = 32768
    page_tokens: int = 16
    samples: int = 8
    seed: int = 0
    ranks: int = 1
    device: str = "cpu"


class CachedRequest(NamedTuple):
    """A request: tokens of its prompt and tokens of prompt and answer together."""

    number: int
    prompt: int
    total: int


@dataclass
class Account:
    """The tokens that were held while requests ran, summed over steps.

    Attributes:
        held: tokens whose keys and values lie in memory.
        taken: room that running requests have taken.
        running: requests that ran at a step.
        finished: tokens of the requests that reached their end.
        preempted: times that a request gave its memory back before its end.
    """

    held: int = 0
    taken: int = 0
    running: int = 0
    steps: int = 0
    finished: int = 0
    preempted: int = 0
    waste_of_steps: list[float] = field(default_factory=list)

    def note(self, held: int, taken: int, running: int) -> None:
        """Adds a step."""
        self.held += held
        self.taken += taken
        self.running += running
        self.steps += 1
        self.waste_of_steps.append(1 - held / taken)


def parse(words: list[str]) -> CacheSizes:
    """`key=value` words; see scripts.benchmarks.attention.parse_into.

    Raises:
        ValueError: also where no request would fit.
    """
    sizes = parse_into(CacheSizes(), words)
    if sizes.ranks > 1:
        raise ValueError(f"ranks={sizes.ranks}: the books are kept on one device; use ranks=1")
    if sizes.memory < sizes.limit:
        raise ValueError(
            f"memory={sizes.memory} tokens hold no request of limit={sizes.limit}; use"
            f" memory={sizes.limit} or more"
        )
    return sizes


def mix(sizes: CacheSizes) -> list[CachedRequest]:
    """Draws the requests, the same for every cache."""
    draw = random.Random(sizes.seed)
    requests = []
    for number in range(sizes.requests):
        prompt = _length(draw, PROMPT_MEAN, sizes.limit - 1)
        answer = _length(draw, ANSWER_MEAN, sizes.limit - prompt)
        requests.append(CachedRequest(number, prompt, prompt + answer))
    return requests


def _length(draw: random.Random, mean: int, longest: int) -> int:
    """Draws a log-normal length of this mean, at least 1 and at most `longest`."""
    middle = math.log(mean) - SPREAD**2 / 2
    return min(max(1, round(draw.lognormvariate(middle, SPREAD))), longest)


def serve_contiguous(requests: list[CachedRequest], sizes: CacheSizes) -> Account:
    """Serves requests from memory that is cut into places of `limit` tokens."""
    account = Account()
    waiting = deque(requests)
    lengths: dict[CachedRequest, int] = {}
    while waiting or lengths:
        while waiting and len(lengths) < sizes.memory // sizes.limit:
            request = waiting.popleft()
            lengths[request] = request.prompt
        account.note(sum(lengths.values()), len(lengths) * sizes.limit, len(lengths))
        for request in list(lengths):
            lengths[request] += 1
            if lengths[request] > request.total:
                account.finished += request.total
                del lengths[request]
    return account


def serve_paged(requests: list[CachedRequest], sizes: CacheSizes) -> Account:
    """Serves requests from a pool of pages; the youngest is preempted where it is full."""
    account = Account()
    pool = PagePool(sizes.memory // sizes.page_tokens, sizes.page_tokens)
    waiting = deque(requests)
    running: list[CachedRequest] = []
    reached: dict[int, int] = {}
    while waiting or running:
        while waiting and _join(pool, waiting[0], reached):
            running.append(waiting.popleft())
        held = sum(pool.length(request.number) for request in running)
        taken = (pool.pages - pool.free_pages()) * sizes.page_tokens
        account.note(held, taken, len(running))
        for request in list(running):
            if request not in running:
                continue
            if pool.length(request.number) >= request.total:
                account.finished += pool.length(request.number)
                pool.release(request.number)
                running.remove(request)
                continue
            while request in running and not _grow(pool, request):
                youngest = running.pop()
                reached[youngest.number] = pool.length(youngest.number)
                pool.release(youngest.number)
                waiting.appendleft(youngest)
                account.preempted += 1
    return account


def _join(pool: PagePool, request: CachedRequest, reached: dict[int, int]) -> bool:
    """Opens a request with all tokens that it had reached, if the pool has room for them."""
    length = reached.get(request.number, request.prompt)
    # one page of room beside its tokens, or the next token would throw it out again
    if pool.free_pages() * pool.page_tokens < length + pool.page_tokens:
        return False
    # every request has tokens of its own: sharing is measured apart
    tokens = [request.number] * length
    found = pool.open(request.number, tokens)
    pool.extend(request.number, tokens[found:])
    return True


def _grow(pool: PagePool, request: CachedRequest) -> bool:
    try:
        pool.extend(request.number, [request.number])
    except PoolFull:
        return False
    return True


def samples_of_one_prompt(sizes: CacheSizes) -> dict:
    """Counts the pages of several samples of a prompt, before and after their first tokens."""
    prompt = list(range(PROMPT_MEAN))
    pool = PagePool(sizes.memory // sizes.page_tokens, sizes.page_tokens)
    pool.open(0, prompt)
    pool.extend(0, prompt)
    for sample in range(1, sizes.samples):
        pool.fork(0, sample)
    shared = pool.pages - pool.free_pages()
    copies = 0
    for sample in range(sizes.samples):
        copies += pool.extend(sample, [-1 - sample]).copied is not None
    return {
        "samples": sizes.samples,
        "prompt_tokens": len(prompt),
        "pages_shared": shared,
        "pages_of_copies": shared * sizes.samples,
        "pages_copied_by_first_tokens": copies,
    }


def measure(sizes: CacheSizes, group: Any) -> Iterator[dict]:
    """A row of figures for each cache, and one for the samples of a prompt."""
    requests = mix(sizes)
    for name, serve in (("contiguous", serve_contiguous), ("paged", serve_paged)):
        account = serve(requests, sizes)
        yield {
            "cache": name,
            "waste": 1 - account.held / account.taken,
            "worst_step": max(account.waste_of_steps),
            "running": account.running / account.steps,
            "steps": account.steps,
            "finished": account.finished,
            "preempted": account.preempted,
        }
    yield {"cache": "samples", **samples_of_one_prompt(sizes)}


def table(rows: list[dict]) -> str:
    """Rows as text."""
    columns = ("cache", "waste", "at once", "steps", "preempted")
    lines = [
        "waste: share of the room taken by running requests in which no token lies",
        "".join(f"{name:>14}" for name in columns),
    ]
    for row in rows[:2]:
        cells = (
            row["cache"],
            f"{100 * row['waste']:.1f} %",
            f"{row['running']:.1f}",
            row["steps"],
            row["preempted"],
        )
        lines.append("".join(f"{cell:>14}" for cell in cells))
    shared = rows[2]
    lines.append(
        f"{shared['samples']} samples of a prompt of {shared['prompt_tokens']} tokens:"
        f" {shared['pages_shared']} pages together, {shared['pages_of_copies']} if each had its"
        f" own; their first tokens copy {shared['pages_copied_by_first_tokens']} pages"
    )
    return "\n".join(lines)

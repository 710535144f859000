"""Continuous batching: requests join and leave between the steps of one model.

A step feeds one token of every running request. A request whose text is complete leaves at once,
and a waiting one takes its row: its prompt is read by itself and its state joins the others. A text
does not depend on what runs beside it, up to the rounding of the kernels.

Where the pages of a cache are used up, the youngest row is put aside: it is read again when there
is room (recompute), or its state waits in host memory (swap).

Source: Yu et al. 2022, Orca (OSDI), scheduling by iteration. Theirs mixes prompts and single tokens
in one pass; ours reads prompts in a pass of their own.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from models.cache.base import KVCacheFactory
from models.cache.preemption import swap_out
from parallel.collectives import Communicator
from trainer.decoding.context_limit import ContextLimit
from trainer.decoding.sampling import GREEDY, Sampling, choose, uniform
from trainer.decoding.token_decoder import TokenDecoder

END = "end"
STOP = "stop"
LENGTH = "length"
LIMIT = "limit"
PREEMPT = "recompute", "swap"


@dataclass(eq=False)
class TextRequest:
    """A prompt and what is wanted after it.

    Args:
        prompt: tokens, one or more.
        count: new tokens at most.
        sampling: how they are chosen.
        seed: names from which the random numbers are made, besides the index of the token.
        end: the token that ends a text; it is not part of it. None: none does.
        stop: called with the new tokens so far; True ends the text.

    Attributes:
        tokens: new tokens so far.
        context: tokens that the model reads: prompt and new tokens, but for what a limit cut.
        finished: END, STOP, LENGTH or LIMIT; None while it runs.
    """

    prompt: Sequence[int]
    count: int
    sampling: Sampling = GREEDY
    seed: tuple[object, ...] = (0,)
    end: int | None = None
    stop: Callable[[list[int]], bool] | None = None
    tokens: list[int] = field(default_factory=list)
    context: list[int] = field(default_factory=list)
    finished: str | None = None

    def take(self, logits: Tensor) -> int:
        """Chooses the next token from logits [V]."""
        number = uniform(*self.seed, len(self.tokens))
        seen = [*self.prompt, *self.tokens] if self.sampling.repetition_penalty != 1 else ()
        return choose(logits, self.sampling, seen, number)

    def append(self, token: int) -> bool:
        """Adds a token and notes whether the text is complete; False where it is no part of it."""
        if token == self.end:
            self.finished = END
            return False
        self.tokens.append(token)
        self.context.append(token)
        if self.stop is not None and self.stop(self.tokens):
            self.finished = STOP
        elif len(self.tokens) >= self.count:
            self.finished = LENGTH
        return True


class Scheduler:
    """Runs requests, at most `rows` at a time.

    Args:
        model, cache, communicator, policy: as in TokenDecoder.
        rows: requests that run at once.
        limit: what texts do at the end of their context; None: they have no end but that of the
            model's positions.
        preempt: what is done with a row for which there is no room: recompute or swap.

    Attributes:
        most_bytes: the largest number of bytes that the state took.
        counters: what caches report (evicted tokens, ...), the largest of each.
        decoder: of the running requests; None while there is none.
    """

    def __init__(
        self,
        model: nn.Module,
        cache: KVCacheFactory | None = None,
        *,
        rows: int = 8,
        communicator: Communicator | None = None,
        policy: str | None = None,
        limit: ContextLimit | None = None,
        preempt: str = "recompute",
    ):
        if preempt not in PREEMPT:
            raise ValueError(f"preempt={preempt}: choose one of {', '.join(PREEMPT)}")
        if preempt == "swap" and communicator is not None:
            raise ValueError(
                "preempt=swap: the state of a row lies over ranks; use preempt=recompute"
            )
        if rows < 1:
            raise ValueError(f"rows={rows} is how many texts run at once; use 1 or more")
        self.rows = rows
        self.communicator = communicator
        self.waiting: deque[TextRequest] = deque()
        self.running: list[TextRequest] = []
        self.decoder: TokenDecoder | None = None
        self.most_bytes = 0
        self.counters: dict[str, int] = {}
        self._logits: Tensor | None = None
        self._blank = lambda: TokenDecoder(model, cache, communicator=communicator, policy=policy)
        self.preempt = preempt
        self._aside: dict[TextRequest, dict[str, Tensor]] = {}
        blank = self._blank()  # refuses a model that cannot decode before any request comes
        self.cache = blank.cache
        self.device = blank.device()
        self.limit = limit
        if limit is not None:
            reasons = limit.misfits(model, blank.cache)
            if reasons:
                raise ValueError("\n".join(reasons))
            limit.prepare(model)

    def submit(self, request: TextRequest) -> None:
        """Queues a request."""
        if request.count < 1:
            raise ValueError(f"{request.count} new tokens are none; ask for 1 or more")
        request.context = list(request.prompt)
        if self.limit is not None:
            request.context = self.limit.read(request.prompt, request.count)
        self.waiting.append(request)

    def lengths(self) -> list[int]:
        """Returns the most tokens that each waiting request will have read in the end."""
        ends = [len(request.context) + request.count for request in self.waiting]
        if self.limit is None:
            return ends
        return [min(end, self.limit.tokens) for end in ends]

    def busy(self) -> bool:
        """Tells whether a request runs or waits."""
        return bool(self.waiting or self.running)

    def step(self) -> list[tuple[TextRequest, int | None]]:
        """Lets requests join, and gives every running one its next token.

        Returns:
            The requests that ran, each with its new token; None where its text ended without one.
        """
        self._admit()
        if self._logits is None:
            return []
        drawn = self._drawn(self._logits)
        results: list[tuple[TextRequest, int | None]] = []
        for request, token in zip(self.running, drawn, strict=True):
            results.append((request, token if request.append(token) else None))
            if self.limit is not None and request.finished is None:
                request.finished = LIMIT if self.limit.ends(request.context) else None
        self._leave()
        if self.decoder is not None:
            if self.limit is not None:
                contexts = [request.context for request in self.running]
                self.decoder = self.limit.make_room(self.decoder, contexts, self._blank)
            self._put_aside(self.decoder)
            self._logits = self.decoder.feed([[request.tokens[-1]] for request in self.running])
            self._note(self.decoder)
        return results

    def run(self) -> Iterator[tuple[TextRequest, int | None]]:
        """Yields what `step` returns until all requests are complete."""
        while self.busy():
            yield from self.step()

    def _drawn(self, logits: Tensor) -> list[int]:
        """Returns the next token of each running request, the same on all ranks."""
        wide = logits.to("cpu", torch.float64)
        tokens = [request.take(row) for request, row in zip(self.running, wide, strict=True)]
        if self.communicator is None:
            return tokens
        # Ranks of different machines may round differently: that of rank 0 counts for all.
        size = self.communicator.size
        mine = torch.tensor(tokens, device=logits.device)
        parts = self.communicator.all_to_all([mine] * size, [len(tokens)] * size, "decode tokens")
        return parts[0].tolist()

    def _admit(self) -> None:
        """Lets waiting requests join while there are free rows, and room for what they hold."""
        admitted = self._joining()
        fresh = [request for request in admitted if request not in self._aside]
        if fresh:
            self._add(fresh, *self._read(fresh))
        for request in admitted:
            if request not in fresh:
                self._add([request], *self._returned(request))

    def _joining(self) -> list[TextRequest]:
        """Takes from the queue the requests that join now."""
        admitted: list[TextRequest] = []
        # One more token of each row that runs must have room too, or it would be put aside at once.
        lengths = [0] * len(self.running)
        prompts: set[tuple[int, ...]] = set()
        while self.waiting and len(self.running) + len(admitted) < self.rows:
            context = self.waiting[0].context
            # Samples of one prompt share what they hold of it.
            lengths.append(0 if tuple(context) in prompts else len(context))
            if not self._all_agree(self.cache.admits(lengths)):
                break
            prompts.add(tuple(context))
            admitted.append(self.waiting.popleft())
        if self.waiting and not admitted and not self.running:
            raise ValueError(
                f"the cache has no room for {len(self.waiting[0].context)} tokens and the next one;"
                " give it more pages (cache.pages), or shorter texts"
            )
        return admitted

    def _read(self, admitted: list[TextRequest]) -> tuple[TokenDecoder, Tensor]:
        """Returns a decoder of these requests, and the logits of what follows."""
        # Samples of one prompt read it once.
        prompts: dict[tuple[int, ...], int] = {}
        rows = [prompts.setdefault(tuple(request.context), len(prompts)) for request in admitted]
        newcomers = self._blank()
        logits = newcomers.feed(list(prompts))
        if rows != list(range(len(prompts))):
            newcomers.select(rows)
            logits = logits[rows]
        return newcomers, logits

    def _returned(self, request: TextRequest) -> tuple[TokenDecoder, Tensor]:
        """Returns a decoder of a request whose state waited in host memory."""
        decoder = self._blank()
        device = decoder.device()
        swapped = self._aside.pop(request)
        decoder.state.import_state({name: held.to(device) for name, held in swapped.items()})
        decoder.lengths = [len(request.context) - 1]
        return decoder, decoder.feed([request.context[-1:]])

    def _add(self, admitted: list[TextRequest], newcomers: TokenDecoder, logits: Tensor) -> None:
        """Puts rows below those that run."""
        if self.decoder is None:
            self.decoder = newcomers
            self._logits = logits
        else:
            assert self._logits is not None
            self.decoder.join(newcomers)
            self._logits = torch.cat([self._logits, logits])
        self.running += admitted
        self._note(self.decoder)

    def _put_aside(self, decoder: TokenDecoder) -> None:
        """Puts the youngest rows aside until every other has room for its next token.

        Raises:
            ValueError: there is no room for a single one.
        """
        while not self._all_agree(decoder.state.fits(1)):
            if len(self.running) == 1:
                raise ValueError(
                    f"the cache is full at {len(self.running[0].context)} tokens of one text; give"
                    " it more pages (cache.pages), or shorter texts"
                )
            youngest = self.running.pop()
            if self.preempt == "swap":
                self._aside[youngest] = swap_out(decoder.state, len(self.running))
            decoder.select(range(len(self.running)))
            self.waiting.appendleft(youngest)
            self.counters["preempted"] = self.counters.get("preempted", 0) + 1

    def _all_agree(self, fits: bool) -> bool:
        """Tells whether it fits on every rank; each may hold another part of the rows."""
        if self.communicator is None or not self.cache.bounded:
            return fits
        size = self.communicator.size
        mine = torch.tensor([fits], dtype=torch.long, device=self.device)
        parts = self.communicator.all_to_all([mine] * size, [1] * size, "decode room")
        return all(bool(part) for part in parts)

    def _note(self, decoder: TokenDecoder) -> None:
        self.most_bytes = max(self.most_bytes, decoder.bytes())
        for name, number in decoder.state.counters().items():
            self.counters[name] = max(number, self.counters.get(name, 0))

    def _leave(self) -> None:
        """Drops the rows whose texts are complete."""
        rows = [row for row, request in enumerate(self.running) if request.finished is None]
        if len(rows) == len(self.running):
            return
        self.running = [self.running[row] for row in rows]
        if not rows:
            if self.decoder is not None:
                self.decoder.state.release()
            self.decoder = None
            self._logits = None
            return
        assert self.decoder is not None
        self.decoder.select(rows)

"""Texts from prompts: tokens in, words out, with stop strings and several samples a prompt.

from trainer.decoding.texts import Completion, complete

for completion in complete(model, tokenizer, ["Once upon"], tokens=100, seed=1):
    print(completion.text)
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from models.cache.base import KVCacheFactory
from parallel.collectives import Communicator
from trainer.data.tokenizers import Tokenizer
from trainer.decoding.context_limit import ContextLimit
from trainer.decoding.room import check_room
from trainer.decoding.sampling import Sampling
from trainer.decoding.scheduler import STOP, Scheduler, TextRequest

UNFINISHED = "\ufffd"  # what a decoder writes for the first bytes of a character


@dataclass
class Completion:
    """One text.

    Attributes:
        prompt: number of its prompt.
        sample: number among the samples of the prompt.
        text: what follows the prompt; a stop string is not part of it.
        tokens: new tokens.
        finished: end (the model ended the text), stop (a stop string), length or limit (the context
            is full).
    """

    prompt: int
    sample: int
    text: str
    tokens: int
    finished: str


class TextStream:
    """Turns the tokens of one text into characters as they come.

    Args:
        tokenizer: of the model.
        stops: strings that end the text.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self.tokenizer = tokenizer
        self.stops = [stop for stop in stops if stop]
        self.written = 0

    def stopped(self, tokens: Sequence[int]) -> bool:
        """Tells whether a stop string has come."""
        if not self.stops:
            return False
        text = self.tokenizer.decode(tokens)
        return any(stop in text for stop in self.stops)

    def text(self, tokens: Sequence[int]) -> str:
        """Returns the text before the first stop string."""
        text = self.tokenizer.decode(tokens)
        ends = [text.find(stop) for stop in self.stops if stop in text]
        return text[: min(ends)] if ends else text

    def new(self, tokens: Sequence[int], finished: bool) -> str:
        """Returns what may be written now and was not before.

        Held back until the text is finished: a character of which bytes are missing, and what may
        be the beginning of a stop string.
        """
        text = self.text(tokens)
        end = len(text)
        if not finished:
            end = len(text.rstrip(UNFINISHED))
            for stop in self.stops:
                for length in range(len(stop) - 1, 0, -1):
                    if text[:end].endswith(stop[:length]):
                        end -= length
                        break
        end = max(end, self.written)
        fresh = text[self.written : end]
        self.written = end
        return fresh


Streams = dict[TextRequest, tuple[int, int, TextStream]]


def complete(
    model: nn.Module,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    *,
    tokens: int,
    samples: int = 1,
    sampling: Sampling | None = None,
    stops: Sequence[str] = (),
    seed: int = 0,
    cache: KVCacheFactory | None = None,
    rows: int = 8,
    communicator: Communicator | None = None,
    policy: str | None = None,
    limit: ContextLimit | None = None,
    preempt: str = "recompute",
    on_text: Callable[[int, int, str], None] | None = None,
    on_end: Callable[[Scheduler], None] | None = None,
) -> Iterator[Completion]:
    """Continues prompts, several at a time, and yields each text when it is complete.

    Args:
        model: in evaluation mode.
        tokenizer: of its training data.
        prompts: texts; an empty one begins a document.
        tokens: new tokens of a text, at most.
        samples: texts for each prompt.
        sampling: how tokens are chosen; temperature 1 by default.
        stops: strings that end a text.
        seed: a text is a function of (seed, number of the prompt, number of the sample).
        cache: what holds keys and values; contiguous by default.
        rows: texts that run at once.
        communicator, policy, limit, preempt: as in TokenDecoder and Scheduler.
        on_text: called with (prompt, sample, new characters) as they come.
        on_end: called with the scheduler when all is done, for what it counted.

    Raises:
        ValueError: the model cannot continue rows; a setting or a prompt is out of its range; the
            memory at hand does not hold the texts.
    """
    scheduler = Scheduler(
        model,
        cache,
        rows=rows,
        communicator=communicator,
        policy=policy,
        limit=limit,
        preempt=preempt,
    )
    wish = partial(
        TextRequest, count=tokens, sampling=sampling or Sampling(), end=tokenizer.end_of_text
    )
    streams = _streams(tokenizer, prompts, samples, stops, seed, wish)
    for request in streams:
        scheduler.submit(request)
    if communicator is None:
        check_room(model, scheduler.cache, scheduler.lengths(), rows)
    yield from _completions(scheduler, tokenizer, streams, on_text)
    if on_end is not None:
        on_end(scheduler)


def _streams(
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    samples: int,
    stops: Sequence[str],
    seed: int,
    wish: Callable[..., TextRequest],
) -> Streams:
    """Returns the requests of all texts, each with its numbers and its stream."""
    if samples < 1:
        raise ValueError(f"samples={samples} texts are none; ask for 1 or more")
    streams: Streams = {}
    for number, prompt in enumerate(prompts):
        for sample in range(samples):
            stream = TextStream(tokenizer, stops)
            request = wish(
                _begins(tokenizer, prompt),
                seed=(seed, "text", number, sample),
                stop=stream.stopped,
            )
            streams[request] = number, sample, stream
    return streams


def _begins(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Returns the tokens of a prompt, at least one."""
    # The end of one document is what stands before the next.
    return [int(token) for token in tokenizer.encode(prompt)] or [tokenizer.end_of_text]


def _completions(
    scheduler: Scheduler,
    tokenizer: Tokenizer,
    streams: Streams,
    on_text: Callable[[int, int, str], None] | None,
) -> Iterator[Completion]:
    """Runs the scheduler to its end and yields each text when it is complete."""
    for request, _ in scheduler.run():
        number, sample, stream = streams[request]
        done = request.finished is not None
        if on_text is not None:
            on_text(number, sample, stream.new(request.tokens, done))
        if done:
            text = stream.text(request.tokens)
            if request.finished != STOP:
                text = tokenizer.decode(request.tokens)
            yield Completion(number, sample, text, len(request.tokens), str(request.finished))
